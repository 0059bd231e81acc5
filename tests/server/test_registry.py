"""Versions from a real MLflow tracking server: published, promoted, refused, tagged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Running, ServerFactory, refused
from places import SUPPORT
from trained_models import spikeless

from spikeless import launch, warmup
from spikeless.errors import Code
from spikeless.registry import AliasFollower, Registry, publish
from spikeless.repository import gates, origin
from spikeless.repository.gates import FILES, GateSettings
from spikeless.repository.journal import ChangeBegun, Journal, Published
from spikeless.repository.layout import versions
from spikeless.rollout.fleet import FleetSettings
from spikeless.rollout.promotion import rollback

pytestmark = pytest.mark.xdist_group("registry")  # one registry serves all of these tests

#: Loading is tested where it matters.
QUICK = [FILES]
GATES = [gate.name for gate in gates.GATES]


@pytest.fixture
def client(registered: dict[str, str]) -> Any:
    import mlflow

    return mlflow.MlflowClient()


def tags(client: Any, name: str, version: int = 1) -> dict[str, str]:
    return dict(client.get_model_version(name, str(version)).tags)


def forget(client: Any, name: str, version: int = 1) -> None:
    for key in tags(client, name, version):
        client.delete_model_version_tag(name, str(version), key)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def published(models: Path, name: str) -> list[Published]:
    return [entry for entry in Journal(models, name).entries() if isinstance(entry, Published)]


def test_the_champion_is_published_once_and_the_registry_hears_of_it(client: Any, tmp_path: Path) -> None:
    forget(client, "times")
    client.set_registered_model_alias("times", "champion", 1)
    arguments = ("publish", "models:/times@champion", "--models", tmp_path, "--json")
    dry = spikeless(*arguments, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert json.loads(dry.stdout)["dry_run"]
    assert versions(tmp_path, "times") == {}
    assert tags(client, "times") == {}

    done = spikeless(*arguments)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["path"], told["version"], told["name"]) == (f"{tmp_path}/times/1", 1, "times")
    run = client.get_model_version("times", "1").run_id
    assert (told["source"], told["run"]) == ("models:/times/1", run)
    assert told["gates"] == GATES
    assert "no warmup file" in told["warnings"][0]
    (entry,) = published(tmp_path, "times")
    assert (entry.version, entry.source, entry.run) == (1, "models:/times/1", run)
    found = tags(client, "times")
    assert json.loads(found.pop("spikeless.findings")) == told["findings"]
    assert found == {
        "spikeless.state": "published",
        "spikeless.model": "times",
        "spikeless.version": "1",
        "spikeless.gates": ",".join(GATES),
    }

    before = tree(tmp_path)
    forget(client, "times")
    again = spikeless(*arguments)
    assert again.returncode == 0, again.stderr
    assert again.stderr == f"times: {tmp_path}/times/1 is there already\n"
    told.pop("warnings")
    repeated = json.loads(again.stdout)
    assert {key: repeated[key] for key in told} == told
    assert tree(tmp_path) == before
    assert tags(client, "times")["spikeless.gates"] == ",".join(GATES)


def test_a_keras_model_is_exported_and_warmed_with_its_input_example(
    registered: dict[str, str], serve: ServerFactory, tmp_path: Path
) -> None:
    done = spikeless("publish", registered["dense"], "layers", "--models", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    (record,) = warmup.inspect(tmp_path / "layers" / "1")
    flags = ("--model_name=layers", f"--model_base_path={tmp_path / 'layers'}")
    with serve(*flags, wait_for=("layers",)) as running:
        (signature,) = record.signatures
        answer = running.client.predict(
            "layers", {record.inputs[0].name: np.array([[3.0, 4.0]], np.float32)}, signature=signature
        )
    assert np.allclose(next(iter(answer.values())), [[7.0]])


def test_a_folder_brings_its_own_warmup_and_a_run_needs_a_name(
    registered: dict[str, str], client: Any, boston_run: Path, tmp_path: Path
) -> None:
    registry = Registry()
    candidate = publish(registry, registry.resolve("models:/folder/latest"), tmp_path, gates=QUICK)
    copied = tree(candidate.target)
    taken = origin.read(candidate.target)
    assert taken is not None
    assert taken.gates == ("files",)
    del copied[origin.FILE_NAME]
    assert copied == tree(boston_run / "saved_model")
    assert "assets.extra/tf_serving_warmup_requests" in copied
    nameless = spikeless("publish", registered["run"], "--models", tmp_path)
    assert nameless.returncode == 1
    assert f"{registered['run']} is no registered model: give it a NAME" in nameless.stderr
    # It has no number of its own.
    for number in (2, 3):
        release = registry.resolve(registered["run"])
        assert publish(registry, release, tmp_path, "folder", gates=QUICK).version == number
    assert published(tmp_path, "folder")[-1].source == registered["run"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("old", "data has model.h5, neither a SavedModel nor model.keras"),
        ("pickled", "it needs custom_objects.cloudpickle, and nothing is unpickled"),
        ("echo", "its flavours are python_function, not tensorflow"),
    ],
)
def test_what_cannot_be_served_is_refused_and_the_registry_says_why(
    name: str, reason: str, registered: dict[str, str], client: Any, tmp_path: Path
) -> None:
    registry = Registry()
    forget(client, name)
    with refused(Code.UNIMPLEMENTED, f"{registered[name]}: {reason}.*: log a|log that folder"):
        publish(registry, registry.resolve(registered[name]), tmp_path)
    assert versions(tmp_path, name) == {}
    found = tags(client, name)
    assert found.keys() == {"spikeless.state", "spikeless.error"}
    assert found["spikeless.state"] == "refused"
    assert reason in found["spikeless.error"]


def test_a_gate_refuses_once_and_the_next_version_passes(client: Any, tmp_path: Path) -> None:
    for version in (1, 2, 3):
        forget(client, "times", version)
    gates = GateSettings(load=False).pipeline()
    lines: list[str] = []
    follower = AliasFollower(Registry(), "models:/times@next", tmp_path, gates=gates, progress=lines.append)
    client.set_registered_model_alias("times", "next", 1)
    followed = follower.poll()
    assert followed is not None
    assert str(followed) == "models:/times/1 is version 1 of times: published"
    assert follower.poll() is None
    client.set_registered_model_alias("times", "next", 3)
    with refused(Code.FAILED_PRECONDITION, "gate signatures: .* has no input|signatures"):
        follower.poll()
    seen = len(lines)
    assert follower.poll() is None
    assert len(lines) == seen
    assert tags(client, "times", 3)["spikeless.state"] == "refused"
    assert "callers of" in tags(client, "times", 3)["spikeless.error"]
    client.set_registered_model_alias("times", "next", 2)
    assert follower.poll() is not None
    assert sorted(versions(tmp_path, "times")) == [1, 2]
    # Allowed later, the reason goes.
    registry = Registry()
    publish(registry, registry.resolve("models:/times/3"), tmp_path, gates=QUICK)
    assert tags(client, "times", 3)["spikeless.state"] == "published"
    assert "spikeless.error" not in tags(client, "times", 3)


def test_a_version_from_elsewhere_is_not_taken_for_the_registrys(
    registered: dict[str, str], saved_models: Path, tmp_path: Path
) -> None:
    done = spikeless("publish", saved_models / "times_one", "times", "--models", tmp_path, "--no-load")
    assert done.returncode == 0, done.stderr
    assert published(tmp_path, "times")[0].source == str(saved_models / "times_one")
    before = tree(tmp_path)
    done = spikeless("publish", "models:/times/1", "--models", tmp_path)
    assert done.returncode == 1
    assert f"{tmp_path}/times/1 is there already and comes from elsewhere" in done.stderr
    assert "--version" in done.stderr
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("uri", "code", "message"),
    [
        ("models:/nobody@champion", Code.NOT_FOUND, "does it exist, and is MLFLOW_TRACKING_URI right"),
        ("models:/times@nothing", Code.INVALID_ARGUMENT, "alias nothing not found; does it exist"),
        ("models:/times/77", Code.NOT_FOUND, "does it exist"),
        ("models:/times", Code.INVALID_ARGUMENT, "names no version: say models:/times@ALIAS"),
        ("models:/times/Production", Code.INVALID_ARGUMENT, "say models:/times@ALIAS"),
        ("runs:/0123", Code.INVALID_ARGUMENT, "names no folder: say runs:/RUN/PATH"),
        ("runs:/0123/model", Code.NOT_FOUND, "does it exist"),
    ],
)
def test_what_names_nothing_is_an_error(
    uri: str, code: Code, message: str, registered: dict[str, str]
) -> None:
    with refused(code, message):
        Registry().resolve(uri)


def test_a_registry_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    dead = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{launch.free_port()}"}
    done = spikeless(
        "follow", "models:/times@champion", "--once", "--models", tmp_path, env={**os.environ, **dead}
    )
    assert done.returncode == 1
    assert "cannot find models:/times@champion" in done.stderr
    assert "is MLFLOW_TRACKING_URI right?" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(900)
def test_a_kill_at_any_point_leaves_whole_versions_and_none_is_published_twice(
    client: Any, tmp_path: Path
) -> None:
    uri = "models:/times/1"
    whole = tmp_path / "whole"
    assert AliasFollower(Registry(), uri, whole, gates=QUICK).poll() is not None
    expected = tree(whole / "times" / "1")
    kills_in = tmp_path / "kills"
    kills_in.mkdir()
    done = subprocess.run(
        [sys.executable, SUPPORT / "killed_followers.py", uri, kills_in], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    events = {line.partition(" ")[0] for line in done.stdout.splitlines()}
    assert events >= {"open", "os.mkdir", "os.rename"}
    folders = sorted(kills_in.iterdir(), key=lambda folder: int(folder.name))
    before = [list(versions(folder, "times")) for folder in folders]
    renamed = before.index([1])
    assert before == [[]] * renamed + [[1]] * (len(folders) - renamed)
    assert 0 < renamed < len(folders) - 1
    for number, models in enumerate(folders):
        inode = versions(models, "times")[1].stat().st_ino if before[number] else None
        if number == renamed:  # killed before the registry heard of it
            forget(client, "times")
        followed = AliasFollower(Registry(), uri, models, gates=QUICK).poll()
        assert followed is not None
        assert list(versions(models, "times")) == [1], number
        assert inode in (None, followed.path.stat().st_ino), number
        assert tree(followed.path) == expected, number
        assert tags(client, "times")["spikeless.gates"] == "files", number
        assert [path for path in models.glob("times/.spikeless/*/*") if path.is_dir()] == [], number


@contextmanager
def following(*arguments: object, log: Path) -> Iterator[subprocess.Popen[str]]:
    with open(log, "a") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "spikeless", "follow", *map(str, arguments), "--poll=0.1s", "--json"],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield child
        finally:
            child.kill()
            child.wait()


def next_line(child: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line, log.read_text()
    found: dict[str, Any] = json.loads(line)
    return found


def answer(running: Running) -> float:
    (value,) = running.client.predict("times", {"x": np.ones(1, np.float32)}, label="stable")["y"]
    return float(value)


def test_callers_get_what_the_alias_names_and_a_rollback_stands(
    client: Any, serve: ServerFactory, tmp_path: Path
) -> None:
    for version in (1, 2):
        forget(client, "times", version)
    models, log = tmp_path / "models", tmp_path / "follow.log"
    models.mkdir()
    (models / "models.config").write_text("model_config_list {}\n")
    uri = "models:/times@served"
    client.set_registered_model_alias("times", "served", 1)
    flags = (f"--model_config_file={models / 'models.config'}", "--max_num_load_retries=0")
    with serve(*flags) as running:
        arguments = (uri, "--models", models, "--promote", "--servers", running.server.target, "--no-load")
        with following(*arguments, log=log) as child:
            assert next_line(child, log)["state"] == "promoted"
            assert answer(running) == 2.0
            client.set_registered_model_alias("times", "served", 2)
            assert next_line(child, log)["version"] == 2
            assert answer(running) == 3.0
            child.kill()
        assert tags(client, "times", 2)["spikeless.state"] == "promoted"
        fleet = FleetSettings([running.server.target])
        rollback(models, "times", fleet)
        assert answer(running) == 2.0
        # Started again, it leaves the rollback alone ...
        with following(*arguments, log=log) as child:
            assert (told := next_line(child, log))["version"] == 2, told
            assert answer(running) == 2.0
            # ... until the alias moves.
            client.set_registered_model_alias("times", "served", 1)
            assert next_line(child, log)["version"] == 1
            client.set_registered_model_alias("times", "served", 2)
            assert next_line(child, log)["version"] == 2
            assert answer(running) == 3.0
            child.send_signal(signal.SIGTERM)
            assert child.wait(120) == 0, log.read_text()
    entries = Journal(models, "times").entries()
    assert [entry.source for entry in entries if isinstance(entry, Published)] == [
        "models:/times/1",
        "models:/times/2",
    ]
    reasons = [entry.reason for entry in entries if isinstance(entry, ChangeBegun)]
    # What the rollback had done already was no change.
    numbers = [1, 2, None, 2]
    assert reasons == ["" if number is None else f"{uri} is version {number}" for number in numbers]
