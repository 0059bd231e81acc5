"""Publishing without a load: names, numbers, copies, refusals, and failures."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spikeless.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SpikelessError,
)
from spikeless.formats.protos import saved_model_pb2
from spikeless.formats.variables import restores
from spikeless.repository.candidate import Candidate
from spikeless.repository.gates import FILES, Gate
from spikeless.repository.layout import versions
from spikeless.repository.publishing import publish, stage


def write_saved_model(path: Path, *, variables: bool = False, asset: str | None = None) -> Path:
    """A SavedModel without a signature: enough for everything but a load."""
    proto = saved_model_pb2.SavedModel(saved_model_schema_version=1)
    graph = proto.meta_graphs.add()
    graph.meta_info_def.tags.append("serve")
    if variables:
        graph.graph_def.node.add(name="v", op="VarHandleOp")
        graph.graph_def.node.add(name="restore", op="AssignVariableOp", input=["v"])
        graph.saver_def.restore_op_name = "restore"
    if asset:
        graph.asset_file_def.add(filename=asset)
    path.mkdir()
    (path / "saved_model.pb").write_bytes(proto.SerializeToString())
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_saved_model(tmp_path / "source")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def put(source: Path, models: Path, version: int | None = None, **options: Any) -> Path:
    options.setdefault("gates", [FILES])
    return publish(source, models, "boston", version, **options)


def tree(root: Path) -> dict[str, bytes]:
    """Every file below ``root`` with its content."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def leftovers(models: Path) -> list[Path]:
    return [path for path in models.glob("*/.spikeless/staging/*") if path.is_dir()]


def test_versions_count_up_and_hold_what_the_source_holds(source: Path, models: Path) -> None:
    (source / "assets.extra").mkdir()
    (source / "assets.extra" / "note").write_text("kept")
    before = tree(source)
    assert put(source, models) == models / "boston" / "1"
    assert put(source, models, 7) == models / "boston" / "7"
    assert put(source, models) == models / "boston" / "8"
    assert put(source, models, 0) == models / "boston" / "0"
    assert list(versions(models, "boston")) == [0, 1, 7, 8]
    assert all(tree(path) == before for path in versions(models, "boston").values())
    assert tree(source) == before
    assert not leftovers(models)


def test_a_server_sees_no_name_that_is_a_number_but_finished_versions(source: Path, models: Path) -> None:
    seen = []

    def look(candidate: Candidate) -> None:
        directory = models / "boston"
        seen.append(sorted(path.name for path in directory.iterdir()))
        assert candidate.path.stat().st_dev == directory.stat().st_dev
        assert (candidate.name, candidate.version) == ("boston", 2)

    put(source, models)
    put(source, models, gates=[Gate("look", "look", look)])
    assert seen == [[".spikeless", "1"]]


@pytest.mark.parametrize("existing", ["3", "003"])
def test_an_existing_version_is_never_overwritten(source: Path, models: Path, existing: str) -> None:
    taken = models / "boston" / existing
    taken.mkdir(parents=True)
    (taken / "precious").write_text("data")
    with pytest.raises(AlreadyExists, match=existing):
        put(source, models, 3)
    assert tree(taken) == {"precious": b"data"}
    assert put(source, models).name == "4"


def test_a_version_that_appears_meanwhile_is_not_overwritten(source: Path, models: Path) -> None:
    def appear(candidate: Candidate) -> None:
        (models / "boston" / str(candidate.version)).mkdir()
        (models / "boston" / str(candidate.version) / "precious").write_text("data")

    with pytest.raises(AlreadyExists, match="appeared meanwhile"):
        put(source, models, gates=[Gate("appear", "appear", appear)])
    assert tree(models / "boston" / "1") == {"precious": b"data"}
    assert not leftovers(models)


@pytest.mark.parametrize("name", ["", "1", "12", "a/b", "../up", ".hidden", "-x", "ö", "a" * 129, "a\n"])
def test_model_names_that_paths_or_servers_would_misread_are_refused(
    source: Path, models: Path, name: str
) -> None:
    with pytest.raises(InvalidArgument, match="model name"):
        publish(source, models, name)
    assert not models.exists()


@pytest.mark.parametrize("version", [-1, 1 << 63])
def test_version_numbers_out_of_range_are_refused(source: Path, models: Path, version: int) -> None:
    with pytest.raises(InvalidArgument, match="version"):
        put(source, models, version)
    assert not models.exists()


def test_after_the_highest_version_a_number_has_to_be_given(source: Path, models: Path) -> None:
    put(source, models, (1 << 63) - 1)
    with pytest.raises(InvalidArgument, match="give a free one"):
        put(source, models)
    put(source, models, 5)


def test_two_publishers_at_once_get_different_numbers(source: Path, models: Path) -> None:
    inside = threading.Barrier(2, timeout=60)
    got = []

    def meet(candidate: Candidate) -> None:
        inside.wait()

    def run() -> None:
        got.append(put(source, models, gates=[Gate("meet", "meet", meet)]))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in got) == ["1", "2"]


def test_the_same_number_twice_at_once_is_refused_and_the_first_one_goes_on(
    source: Path, models: Path
) -> None:
    def second(candidate: Candidate) -> None:
        with pytest.raises(AlreadyExists, match="being published by another process"):
            put(source, models, 4)

    assert put(source, models, 4, gates=[Gate("second", "second", second)]).name == "4"
    assert list(versions(models, "boston")) == [4]


def test_a_step_may_rewrite_the_staged_copy(source: Path, models: Path) -> None:
    def rewrite(candidate: Candidate) -> None:
        (candidate.path / "extra").write_text(str(candidate.version))

    published = put(source, models, gates=[Gate("rewrite", "rewrite", rewrite)])
    assert (published / "extra").read_text() == "1"
    assert not (source / "extra").exists()


def test_a_step_that_refuses_leaves_nothing(source: Path, models: Path) -> None:
    def refuse(candidate: Candidate) -> None:
        raise FailedPrecondition("not this one")

    with pytest.raises(FailedPrecondition, match="not this one"):
        put(source, models, gates=[FILES, Gate("refuse", "refuse", refuse)])
    assert versions(models, "boston") == {}
    assert not leftovers(models)


def test_progress_names_each_stage(source: Path, models: Path) -> None:
    titles: list[str] = []
    models.mkdir()
    put(
        source,
        models,
        gates=[Gate("one", "one", lambda _: None), Gate("two", "two", lambda _: None)],
        progress=titles.append,
    )
    assert titles == ["copying", "one", "two", "writing to disk", "publishing"]


def test_modes_let_every_user_read_and_only_the_owner_write(source: Path, models: Path) -> None:
    (source / "variables").mkdir(mode=0o700)
    (source / "variables" / "secret").write_text("x")
    (source / "variables" / "secret").chmod(0o600)
    (source / "saved_model.pb").chmod(0o666)

    def add(candidate: Candidate) -> None:
        (candidate.path / "added").touch(mode=0o400)

    old = os.umask(0o077)
    try:
        published = put(source, models, gates=[Gate("add", "add", add)])
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in published.rglob("*")}
    assert modes == {"variables": 0o755, "secret": 0o644, "saved_model.pb": 0o644, "added": 0o444}
    assert published.stat().st_mode & 0o777 == 0o755
    assert published.parent.stat().st_mode & 0o777 == 0o755


def test_links_are_copied_as_what_they_point_at(source: Path, models: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "vocabulary").write_text("a b c")
    (source / "assets").symlink_to(tmp_path / "elsewhere")
    (source / "note").symlink_to("assets/vocabulary")
    published = put(source, models)
    shutil.rmtree(tmp_path / "elsewhere")
    assert (published / "assets" / "vocabulary").read_text() == "a b c"
    assert (published / "note").read_text() == "a b c"
    assert not any(path.is_symlink() for path in published.rglob("*"))


def test_a_linked_version_shares_the_files_whose_modes_are_right(
    source: Path, models: Path, tmp_path: Path
) -> None:
    (source / "large").write_text("x")
    (source / "large").chmod(0o644)
    (source / "secret").write_text("x")
    (source / "secret").chmod(0o600)
    (tmp_path / "elsewhere").write_text("x")
    (tmp_path / "elsewhere").chmod(0o444)
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    before = tree(source)
    with stage(source, models, "boston", gates=[FILES], link=True) as candidate:
        published = candidate.publish()
    assert tree(published) == tree(source) == before
    assert (published / "large").samefile(source / "large")
    assert (published / "linked").samefile(tmp_path / "elsewhere")
    assert not (published / "linked").is_symlink()
    assert not (published / "secret").samefile(source / "secret")
    assert (published / "secret").stat().st_mode & 0o777 == 0o644
    assert (source / "secret").stat().st_mode & 0o777 == 0o600, "the source is left as it is"


def test_what_cannot_be_linked_is_copied(source: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "saved_model.pb").chmod(0o644)

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with stage(source, models, "boston", gates=[FILES], link=True) as candidate:
        assert tree(candidate.path) == tree(source)
    assert versions(models, "boston") == {}


def test_links_to_nowhere_or_to_themselves_and_special_files_are_refused(source: Path, models: Path) -> None:
    bad = source / "bad"
    bad.symlink_to("missing")
    with pytest.raises(InvalidArgument, match=r"source/bad .*broken link"):
        put(source, models)
    bad.unlink()
    bad.symlink_to(source)
    with pytest.raises(InvalidArgument, match="source/bad is a link to a folder that contains it"):
        put(source, models)
    bad.unlink()
    os.mkfifo(bad)
    with pytest.raises(InvalidArgument, match="source/bad is neither a file nor a folder"):
        put(source, models)
    assert versions(models, "boston") == {}
    assert not leftovers(models)


def _no_directory(source: Path) -> None:
    shutil.rmtree(source)


def _no_file(source: Path) -> None:
    (source / "saved_model.pb").unlink()


def _garbage(source: Path) -> None:
    (source / "saved_model.pb").write_bytes(b"\xff" * 100)


def _empty(source: Path) -> None:
    (source / "saved_model.pb").write_bytes(b"")


def _other_tags(source: Path) -> None:
    proto = saved_model_pb2.SavedModel()
    proto.meta_graphs.add().meta_info_def.tags.append("train")
    (source / "saved_model.pb").write_bytes(proto.SerializeToString())


def _no_variables(source: Path) -> None:
    shutil.rmtree(source)
    write_saved_model(source, variables=True)


def _no_asset(source: Path) -> None:
    shutil.rmtree(source)
    write_saved_model(source, asset="vocabulary.txt")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_no_directory, NotFound, "does not exist"),
        (_no_file, NotFound, "has no saved_model.pb"),
        (_garbage, InvalidArgument, "cannot be read as a SavedModel"),
        (_empty, InvalidArgument, "no meta graph"),
        (_other_tags, NotFound, "no meta graph is tagged serve; there is: train"),
        (_no_variables, NotFound, "variables.index is missing"),
        (_no_asset, NotFound, "vocabulary.txt is missing"),
    ],
)
def test_what_could_not_be_loaded_is_refused_before_anything_is_created(
    source: Path, models: Path, spoil: Callable[[Path], None], error: type[SpikelessError], message: str
) -> None:
    spoil(source)
    with pytest.raises(error, match=message):
        put(source, models)
    assert not models.exists()


def test_variables_that_nothing_restores_need_no_file(source: Path, models: Path) -> None:
    """What the operation that restores does decides, not the folder."""
    proto = saved_model_pb2.SavedModel.FromString((source / "saved_model.pb").read_bytes())
    graph = proto.meta_graphs[0]
    graph.graph_def.node.add(name="v", op="VarHandleOp")
    graph.graph_def.node.add(name="init", op="AssignVariableOp", input=["v"])
    graph.graph_def.node.add(name="restore", op="NoOp")
    for restore in ("", "restore"):
        graph.saver_def.restore_op_name = restore
        assert not restores(graph)
        (source / "saved_model.pb").write_bytes(proto.SerializeToString())
        put(source, models)
    graph.graph_def.node[-1].input.append("^init")
    assert restores(graph)


def test_a_missing_data_shard_is_refused(source: Path, models: Path) -> None:
    (source / "variables").mkdir()
    (source / "variables" / "variables.index").touch()
    (source / "variables" / "variables.data-00001-of-00002").touch()
    with pytest.raises(DataLoss, match="1 of the 2 data files"):
        put(source, models)


def test_file_system_errors_name_the_file_and_leave_nothing(
    source: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    put(source, models)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ResourceExhausted, match=r"boston: No space left on device \(somewhere\)"):
        put(source, models)
    assert list(versions(models, "boston")) == [1]
    assert not leftovers(models)


def test_a_repository_that_is_no_directory_is_refused(source: Path, models: Path) -> None:
    models.write_text("a file")
    with pytest.raises(SpikelessError, match="cannot publish to"):
        put(source, models)
    assert models.read_text() == "a file"


def test_what_a_dead_publisher_left_is_removed_and_what_is_in_use_is_kept(source: Path, models: Path) -> None:
    staging = models / "boston" / ".spikeless" / "staging"
    put(source, models)
    for name, owned in [("2-dead", True), ("3-killed-early", False)]:
        (staging / name / "version").mkdir(parents=True)
        if owned:
            (staging / name / "owner").touch()
    in_use = []

    def nested(candidate: Candidate) -> None:
        assert put(source, models).name == "3"
        in_use.extend(leftovers(models))
        assert candidate.path.is_dir()

    assert put(source, models, gates=[Gate("nested", "nested", nested)]).name == "2"
    assert [path.name.partition("-")[0] for path in in_use] == ["2"]
    assert not leftovers(models)
