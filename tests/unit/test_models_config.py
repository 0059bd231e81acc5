"""Editing models.config: one model changes, everything else stays to the byte."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikeless.errors import FailedPrecondition, InvalidArgument
from spikeless.repository import models_config
from spikeless.repository.models_config import (
    ModelsConfig,
    edit,
    model_in,
    new_block,
    read,
    with_versions,
)

FILE = """\
# Who may change this: the platform team.
model_config_list {
  config {
    name: "boston"  # the first one
    base_path: "/models/boston"
    model_platform: "tensorflow"
    # Pinned by hand.
    model_version_policy { specific { versions: 1 } }
    version_labels { key: "stable" value: 1 }
    version_labels { key: "old" value: 1 }
    shiny_new_option { [type.example.com/some.Thing] { depth: -3 } }
  }
  config: <
    name: 'ctr' "_model",
    base_path: "/models/ctr";
    model_platform: "tensorflow"
  >
}
"""


def block_of(config: ModelsConfig, name: str) -> str:
    block = config.block(name)
    assert block is not None
    return block


def model_of(config: ModelsConfig, name: str) -> Any:
    model = config.model(name)
    assert model is not None
    return model


def test_one_model_changes_and_nothing_else() -> None:
    config = ModelsConfig(FILE)
    block = with_versions(block_of(config, "boston"), [1, 2], {"stable": 2, "old": 1})
    edited = config.with_block("boston", block)
    assert edited.text == FILE.replace(
        "specific { versions: 1 }", "specific { versions: 1 versions: 2 }"
    ).replace(
        'version_labels { key: "stable" value: 1 }\n    version_labels { key: "old" value: 1 }',
        'version_labels { key: "old" value: 1 }\n    version_labels { key: "stable" value: 2 }',
    )
    model = model_of(edited, "boston")
    assert list(model.model_version_policy.specific.versions) == [1, 2]
    assert dict(model.version_labels) == {"stable": 2, "old": 1}
    assert edited.names == ["boston", "ctr_model"]
    assert "shiny_new_option" in edited.text
    assert edited.with_block("boston", config.block("boston")).text == FILE


def test_the_same_versions_and_labels_leave_the_text_alone() -> None:
    block = block_of(ModelsConfig(FILE), "boston")
    assert with_versions(block, [1], {"old": 1, "stable": 1}) == block


def test_fields_are_added_and_taken_out() -> None:
    block = block_of(ModelsConfig(FILE), "ctr_model")
    pinned = with_versions(block, [7], {"stable": 7})
    assert list(model_in(pinned).model_version_policy.specific.versions) == [7]
    assert dict(model_in(pinned).version_labels) == {"stable": 7}
    assert pinned.startswith(block.rstrip(">\n "))
    assert "version_labels" not in with_versions(pinned, [7], {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing yet",
        "model_config_list {\n}\n",
        "model_config_list {}",
        'model_config_list: { config { name: "a" base_path: "/a" model_platform: "tensorflow" } }',
        FILE,
    ],
)
def test_a_model_is_added_and_taken_out_again(text: str) -> None:
    config = ModelsConfig(text)
    block = with_versions(new_block("neu ü\"'", "/models/neu"), [3], {"canary": 3})
    added = config.with_block("neu ü\"'", block)
    assert added.names == [*config.names, "neu ü\"'"]
    assert added.block("neu ü\"'") == block
    removed = added.with_block("neu ü\"'", None)
    assert removed.message == config.message or not config.names
    assert removed.names == config.names
    if text == FILE:
        assert removed.text == text


def test_models_in_a_list_and_on_one_line(tmp_path: Path) -> None:
    text = (
        'model_config_list { config: [ { name: "a" base_path: "/a" model_platform: "tensorflow" }, '
        '{ name: "b" base_path: "/b" model_platform: "tensorflow" # last\n } ] }'
    )
    (tmp_path / "models.config").write_text(text)
    config = edit(tmp_path, {"b": with_versions(block_of(read(tmp_path), "b"), [2], {"stable": 2})})
    assert config.names == ["a", "b"]
    assert dict(model_of(config, "b").version_labels) == {"stable": 2}
    assert "# last" in config.text
    assert read(tmp_path).message == config.message


def test_an_edit_that_would_change_another_model_is_refused() -> None:
    config = ModelsConfig(FILE)
    with pytest.raises(InvalidArgument, match="configures 'ctr_model', not 'boston'"):
        config.with_block("boston", config.block("ctr_model"))
    with pytest.raises(InvalidArgument, match=r"labels \{'stable': 3\} point at versions"):
        with_versions(block_of(config, "boston"), [1], {"stable": 3})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model_config_list {", r"line 1"),
        (b"\n\nmodel_config_list { config ! }", r"line 3: cannot make sense of '! }'"),
        (b"model_config_list { config { name: 3 } }", r"not in protocol buffer text format"),
        (b"\xff", "cannot be read"),
        (b"model_config_list { config { name 'a' } }", "line 1"),
        (b"model_config_list { config " + b"{ a " * 5000, "nested too deeply"),
        (b"a: " + b"- " * 5000, "nested too deeply"),
        (b"model_config_list: -", "line 1: cannot make sense of 'the end'"),
    ],
)
def test_a_file_that_cannot_be_read_names_the_file_and_the_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "models.config").write_bytes(content)
    with pytest.raises(InvalidArgument, match=message) as caught:
        read(tmp_path)
    assert str(tmp_path / "models.config") in str(caught.value)
    assert (tmp_path / "models.config").read_bytes() == content


VERSIONS = st.sets(st.integers(0, 2**63 - 1), min_size=1, max_size=5)


@given(VERSIONS, VERSIONS, st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_versions_and_labels_can_be_set_and_put_back(
    first: set[int], second: set[int], label: str
) -> None:
    config = ModelsConfig(FILE)
    block = with_versions(block_of(config, "boston"), first, {label: max(first)})
    block = with_versions(block, second, {label: min(second), "stable": max(second)})
    model = model_of(config.with_block("boston", block), "boston")
    assert set(model.model_version_policy.specific.versions) == second
    assert dict(model.version_labels) == {label: min(second), "stable": max(second)}
    assert config.with_block("boston", block).with_block("boston", config.block("boston")).text == FILE


def test_links_and_modes_are_kept_and_nothing_is_written_without_a_change(tmp_path: Path) -> None:
    real = tmp_path / "elsewhere.config"
    real.write_text(FILE)
    real.chmod(0o640)
    (tmp_path / "models.config").symlink_to(real.name)
    inode = real.stat().st_ino
    edit(tmp_path, {"boston": read(tmp_path).block("boston")})
    assert real.stat().st_ino == inode
    edit(tmp_path, {"boston": with_versions(block_of(read(tmp_path), "boston"), [5], {})})
    assert (tmp_path / "models.config").is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert "versions: 5" in real.read_text()


def test_concurrent_edits_of_different_models_are_all_kept(tmp_path: Path) -> None:
    """Processes, not threads: the lock is the kernel's."""
    script = """
import sys
from spikeless.repository.models_config import edit, new_block, with_versions
models, name = sys.argv[1:]
for version in range(1, 6):
    edit(models, {name: with_versions(new_block(name, "/m"), [version], {"stable": version})})
"""
    names = ["a", "b", "c", "d"]
    running = [subprocess.Popen([sys.executable, "-c", script, tmp_path, name]) for name in names]
    assert [process.wait(120) for process in running] == [0] * len(names)
    config = read(tmp_path)
    assert sorted(config.names) == names
    assert all(dict(model_of(config, name).version_labels) == {"stable": 5} for name in names)


def test_nobody_edits_while_somebody_sends(tmp_path: Path) -> None:
    edit(tmp_path, {"a": new_block("a", "/a")})
    done = threading.Event()

    def change() -> None:
        edit(tmp_path, {"a": None})
        done.set()

    with models_config.sending(tmp_path) as content, models_config.sending(tmp_path):
        thread = threading.Thread(target=change)
        thread.start()
        assert not done.wait(0.2)
        assert read(tmp_path) == content
    thread.join(60)
    assert read(tmp_path).names == []


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models.config").write_text(FILE)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FailedPrecondition, match=r"No space left on device.*as it was"):
        edit(tmp_path, {"boston": None})
    assert (tmp_path / "models.config").read_text() == FILE
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == [".models.config.lock", "models.config"]
