"""Publishing by real processes: killed at every point, at once, on a full disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import ROOT, SUPPORT
from trained_models import spikeless

from spikeless import warmup
from spikeless.errors import SpikelessError
from spikeless.formats import tfrecord
from spikeless.formats.tensors import to_proto
from spikeless.repository import trial
from spikeless.repository.candidate import Candidate
from spikeless.repository.gates import FILES, GATES, WARMUP, Gate
from spikeless.repository.journal import Journal, Published
from spikeless.repository.layout import versions
from spikeless.repository.publishing import publish
from spikeless.repository.trial import GateError
from spikeless.warmup import records

SAMPLES = ROOT / "warmup" / "boston" / "samples.jsonl"


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def leftovers(models: Path) -> list[Path]:
    return [path for path in models.glob("*/.spikeless/staging/*") if path.is_dir()]


@pytest.fixture
def saved_model(boston_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(boston_run / "saved_model", tmp_path / "saved_model")


def test_publish_loads_the_model_and_prints_the_new_version(boston_run: Path, tmp_path: Path) -> None:
    arguments = ("publish", boston_run / "saved_model", "boston", "--models", tmp_path)
    dry = spikeless(*arguments, "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    told = json.loads(dry.stdout)
    assert (told["path"], told["version"], told["dry_run"]) == (f"{tmp_path}/boston/1", 1, True)
    assert told["gates"] == ["files", "target", "warmup", "cold", "signatures", "trial"]
    assert told["warnings"] == []
    assert not (tmp_path / "boston" / "1").exists()

    done = spikeless(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/boston/1\n"
    titles = [
        "copying",
        "checking files",
        "comparing with servers",
        "checking warmup",
        "looking for warmup",
        "comparing signatures",
    ]
    titles += ["loading and asking it", "writing to disk", "publishing"]
    assert done.stderr.splitlines() == [f"boston: {title}" for title in titles]
    assert tree(tmp_path / "boston" / "1") == tree(boston_run / "saved_model")

    again = spikeless(*arguments, "--version=1")
    assert again.returncode == 1
    assert again.stderr == (
        f"spikeless: error: {tmp_path}/boston/1 is there already; versions are never overwritten\n"
    )


def test_a_version_without_warmup_is_published_with_a_warning(saved_model: Path, tmp_path: Path) -> None:
    shutil.rmtree(saved_model / "assets.extra")
    arguments = ("publish", saved_model, "boston", "--models", tmp_path / "models", "--no-load")
    done = spikeless(*arguments, "--json")
    assert done.returncode == 0
    assert "no warmup file" in json.loads(done.stdout)["warnings"][0]
    assert "boston: warning: it has no warmup file" in done.stderr
    assert "warning" not in spikeless(*arguments, "--allow-cold").stderr


def test_a_version_that_nobody_can_ask_is_refused(tmp_path: Path) -> None:
    program = "import sys, tensorflow as tf; tf.saved_model.save(tf.Module(), sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, tmp_path / "mute"], check=True, capture_output=True)
    arguments = ("publish", tmp_path / "mute", "mute", "--models", tmp_path / "new")
    done = spikeless(*arguments)
    assert done.returncode == 1
    assert "has no signature" in done.stderr
    assert not (tmp_path / "new").exists()
    done = spikeless(*arguments, "--allow-cold")
    assert done.returncode == 0, done.stderr
    assert f"making a new model repository, {tmp_path / 'new'}" in done.stderr
    assert "warning" not in done.stderr


def test_a_kill_at_any_point_leaves_every_visible_version_whole_and_the_next_publish_cleans_up(
    boston_run: Path, tmp_path: Path
) -> None:
    source = boston_run / "saved_model"
    script = SUPPORT / "killed_publishers.py"
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
        publish(source, models, "boston", gates=[FILES])
        assert len(versions(models, "boston")) == len(found) + 1, kill
        assert not leftovers(models), kill
    renamed = next(number for number, kill in enumerate(kills) if kill.startswith("os.rename")) + 1
    assert outcomes == [[1]] * renamed + [[1, 2]] * (len(kills) - renamed)


def test_the_layout_of_tfx_is_a_source(boston_run: Path, tmp_path: Path) -> None:
    pushed, models = tmp_path / "push_destination", tmp_path / "models"
    for timestamp in ("1760000000", "1760003600"):
        shutil.copytree(boston_run / "saved_model", pushed / timestamp)
        arguments = ("--version", timestamp, "--models", models, "--no-load")
        done = spikeless("publish", pushed / timestamp, "boston", *arguments)
        assert done.returncode == 0, done.stderr
    assert sorted(versions(models, "boston")) == [1760000000, 1760003600]
    entry = Journal(models, "boston").entries()[-1]
    assert isinstance(entry, Published)
    assert entry.source == f"{pushed}/1760003600"


def test_publishers_at_once_all_succeed_with_numbers_of_their_own(boston_run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spikeless", "publish", str(boston_run / "saved_model")]
    command += ["boston", "--models", str(tmp_path), "--no-load"]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [child.communicate()[0].strip() for child in children]
    assert [child.returncode for child in children] == [0] * 4
    assert sorted(outputs) == [f"{tmp_path}/boston/{number}" for number in range(1, 5)]


def test_a_model_that_tensorflow_cannot_load_is_refused(saved_model: Path, tmp_path: Path) -> None:
    file = saved_model / "saved_model.pb"
    # A whole message with a graph that no kernel can run.
    file.write_bytes(file.read_bytes().replace(b"ParseExampleV2", b"ParseExampleV9"))
    done = spikeless("publish", saved_model, "boston", "--models", tmp_path / "models")
    assert done.returncode == 1
    assert "TensorFlow here has no operation ParseExampleV9" in done.stderr
    assert versions(tmp_path / "models", "boston") == {}
    assert not leftovers(tmp_path / "models")


def rewrite_records(saved_model: Path, change: Callable[[Any], None]) -> None:
    """Build the warmup file and change the PredictionLog of its first record."""
    file = warmup.build(saved_model, warmup.BuildSettings(samples=(warmup.SampleFile(SAMPLES),)))
    logs = [record.log for record in records.read(file)]
    change(logs[0])
    tfrecord.write(file, (log.SerializeToString() for log in logs))


def _unknown_signature(log: Any) -> None:
    log.predict_log.request.model_spec.signature_name = "nope"


def _unknown_input(log: Any) -> None:
    log.predict_log.request.inputs["more"].CopyFrom(log.predict_log.request.inputs["features"])


def _not_replayed(log: Any) -> None:
    log.session_run_log.SetInParent()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_unknown_signature, "record 1: there is no signature 'nope'"),
        (_unknown_input, "record 1: signature 'serving_default' has no input 'more'"),
        (_not_replayed, "record 1: servers do not replay session_run_log"),
    ],
)
def test_a_warmup_record_that_would_fail_the_load_is_refused_without_one(
    saved_model: Path, tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    rewrite_records(saved_model, change)
    with pytest.raises(SpikelessError, match=f"{saved_model}/assets.extra/.*{message}"):
        publish(saved_model, tmp_path / "models", "boston", gates=[FILES, WARMUP])
    assert not (tmp_path / "models").exists()


def test_a_warmup_file_is_replayed_before_its_version_is_published(saved_model: Path, tmp_path: Path) -> None:
    def default_signature(log: Any) -> None:
        log.predict_log.request.model_spec.signature_name = ""

    rewrite_records(saved_model, default_signature)
    assert publish(saved_model, tmp_path / "models", "boston").name == "1"

    def incomplete(candidate: Candidate) -> None:  # after the checks, so that only the load can tell
        def cut(log: Any) -> None:
            log.predict_log.request.inputs["features"].CopyFrom(to_proto(np.zeros([1, 29], np.float32)))

        rewrite_records(candidate.path, cut)

    with pytest.raises(SpikelessError, match=r"gate warmup: warmup record 1 of assets\.extra/"):
        publish(saved_model, tmp_path / "models", "boston", gates=[Gate("cut", "cut", incomplete), GATES[-1]])
    assert list(versions(tmp_path / "models", "boston")) == [1]


def test_a_truncated_warmup_file_is_refused(saved_model: Path, tmp_path: Path) -> None:
    rewrite_records(saved_model, lambda log: None)
    file = warmup.warmup_file(saved_model)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(GateError, match=r"gate warmup: .*tf_serving_warmup_requests"):
        publish(saved_model, tmp_path / "models", "boston", gates=[WARMUP])


def test_a_model_that_kills_the_process_that_loads_it_is_refused(
    saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(trial, "_COMMAND", (sys.executable, "-c", program))
    with pytest.raises(GateError, match=r"gate load: .*TensorFlow died of SIGSEGV"):
        publish(saved_model, tmp_path / "models", "boston")
    assert not leftovers(tmp_path / "models")


def test_a_full_disk_leaves_nothing_behind(boston_run: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=32k none {disk} && touch {disk}/mounted"
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    command = f"{sys.executable} -m spikeless publish {boston_run}/saved_model boston --models {disk}"
    script = f"{mount} && {command}; echo exit $?; find {disk} -type f -size +0; find {disk} -name '[0-9]*'"
    done = subprocess.run([*unshare, script], capture_output=True, text=True, env=os.environ)
    assert done.stdout == "exit 1\n"
    assert "No space left on device" in done.stderr
