"""Publishing by real processes: killed at every point, several at once, on a full disk, broken models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from trained_models import spikeless

from spikeless.repository import CHECK_FILES, publish, versions


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def leftovers(models: Path) -> list[Path]:
    return [path for path in models.glob("*/.spikeless/staging/*") if path.is_dir()]


@pytest.fixture
def saved_model(boston_run, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(boston_run / "saved_model", tmp_path / "saved_model")


def test_publish_loads_the_model_and_prints_the_new_version(boston_run, tmp_path):
    arguments = ("publish", boston_run / "saved_model", "--name=boston", "--models", tmp_path)
    done = spikeless(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/boston/1\n"
    assert done.stderr.splitlines()[1:3] == ["boston: checking files", "boston: loading"]
    assert tree(tmp_path / "boston" / "1") == tree(boston_run / "saved_model")

    again = spikeless(*arguments, "--version=1")
    assert again.returncode == 1
    assert again.stderr == (
        f"spikeless: error: {tmp_path}/boston/1 is there already; versions are never overwritten\n"
    )


def test_a_kill_at_any_point_leaves_every_visible_version_whole_and_the_next_publish_cleans_up(
    boston_run, tmp_path
):
    source = boston_run / "saved_model"
    script = Path(__file__).with_name("killed_publishers.py")
    done = subprocess.run(
        [sys.executable, script, source, tmp_path], capture_output=True, text=True, cwd=script.parents[2]
    )
    assert done.returncode == 0, done.stderr
    kills = done.stdout.splitlines()
    events = {line.partition(" ")[0] for line in kills}
    assert events >= {"open", "os.mkdir", "os.chmod", "shutil.copyfile", "os.rename", "os.rmdir"}, kills
    expected = tree(source)
    outcomes = []
    for number, kill in enumerate(kills):
        models = tmp_path / str(number)
        found = versions(models, "boston")
        assert all(tree(path) == expected for path in found.values()), kill
        outcomes.append(list(found))
        publish(source, models, "boston", steps=[CHECK_FILES])
        assert len(versions(models, "boston")) == len(found) + 1, kill
        assert not leftovers(models), kill
    renamed = next(number for number, kill in enumerate(kills) if kill.startswith("os.rename")) + 1
    assert outcomes == [[1]] * renamed + [[1, 2]] * (len(kills) - renamed)


def test_publishers_at_once_all_succeed_with_numbers_of_their_own(boston_run, tmp_path):
    command = [sys.executable, "-m", "spikeless", "publish", boston_run / "saved_model"]
    command += ["--name=boston", "--models", tmp_path, "--no-load"]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [child.communicate()[0].strip() for child in children]
    assert [child.returncode for child in children] == [0] * 4
    assert sorted(outputs) == [f"{tmp_path}/boston/{number}" for number in range(1, 5)]


def test_a_model_that_tensorflow_cannot_load_is_refused(saved_model, tmp_path):
    file = saved_model / "saved_model.pb"
    # A whole message with a graph that no kernel can run.
    file.write_bytes(file.read_bytes().replace(b"ParseExampleV2", b"ParseExampleV9"))
    done = spikeless("publish", saved_model, "--name=boston", "--models", tmp_path / "models")
    assert done.returncode == 1
    assert "cannot be loaded" in done.stderr
    assert "ParseExampleV9" in done.stderr
    assert versions(tmp_path / "models", "boston") == {}
    assert not leftovers(tmp_path / "models")


def test_a_full_disk_leaves_nothing_behind(boston_run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=32k none {disk} && touch {disk}/mounted"
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    command = f"{sys.executable} -m spikeless publish {boston_run}/saved_model --name boston --models {disk}"
    script = f"{mount} && {command}; echo exit $?; find {disk} -type f -size +0; find {disk} -name '[0-9]*'"
    done = subprocess.run([*unshare, script], capture_output=True, text=True, env=os.environ)
    assert done.stdout == "exit 1\n"
    assert "No space left on device" in done.stderr
