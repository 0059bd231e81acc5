"""Promotion and rollback against real servers, whose callers must see no failure."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness import IS_EMBEDDED
from places import SUPPORT
from promotion_models import (
    NAME,
    X,
    add_version,
    flawless,
    fleet_of,
    model_of,
    prediction_log,
    served,
    settings,
    start_server,
)

from spikeless import launch
from spikeless.client import Client
from spikeless.errors import FailedPrecondition, NotFound, SpikelessError
from spikeless.formats import tfrecord
from spikeless.formats.states import State
from spikeless.repository import models_config
from spikeless.repository.models_config import new_block
from spikeless.rollout.fleet import states
from spikeless.rollout.promotion import Outcome, PromotionError, promote, rollback
from spikeless.rollout.soak import SoakSettings
from spikeless.rollout.status import status

#: States of a version that answers, or soon will.
LIVE = (State.START, State.LOADING, State.AVAILABLE)


@pytest.fixture
def client(server: launch.ServerProcess) -> Iterator[Client]:
    with Client(server.target, timeout=60.0) as client:
        yield client


def config_text(models: Path) -> str:
    return (models / "models.config").read_text()


def journal(models: Path) -> list[dict[str, Any]]:
    path = models / NAME / ".spikeless" / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_promote_and_roll_back_under_load(models: Path, server: launch.ServerProcess, client: Client) -> None:
    said: list[str] = []
    with flawless(server.target) as load:
        outcome = promote(models, NAME, 2, fleet_of(server), settings(reason="better"), said.append)
        assert (outcome.version, outcome.previous, outcome.result) == (2, 1, "promoted")
        assert served(client) == served(client, label="stable") == served(client, version=2) == 2
        assert served(client, version=1) == 1, "the version before stays loaded"
        assert any("AVAILABLE" in line for line in said)

        assert promote(models, NAME, 2, fleet_of(server), settings()).result == "unchanged"

        outcome = rollback(models, NAME, fleet_of(server))
        assert (outcome.version, outcome.previous, outcome.result) == (1, 2, "rolled back")
        assert served(client) == served(client, label="stable") == 1
        assert rollback(models, NAME, fleet_of(server)).version == 1, "repeated, it goes back no further"

        assert promote(models, NAME, 2, fleet_of(server), settings()).result == "promoted"
        load.sees(2.0)
    assert load.factors == {1.0, 2.0}
    model = model_of(models)
    assert set(model.model_version_policy.specific.versions) == {1, 2}
    assert dict(model.version_labels) == {"stable": 2}
    events = [(record["event"], record.get("result")) for record in journal(models)]
    assert [result for event, result in events if event == "end"] == ["promoted", "rolled back", "promoted"]
    begin = journal(models)[0]
    assert (begin["reason"], begin["version"], begin["previous"]) == ("better", 2, 1)
    assert begin["user"]
    assert begin["servers"] == [server.target]
    assert any(event == "check" for event, _ in events)


def test_a_dry_run_names_the_steps_and_changes_nothing(
    models: Path, server: launch.ServerProcess, client: Client
) -> None:
    before = config_text(models)
    outcome = promote(models, NAME, 2, fleet_of(server), settings(), dry_run=True)
    assert outcome.result == "dry run"
    assert outcome.steps[0] == f"serving version 2 as {NAME}-canary"
    assert outcome.steps[-1] == "moving stable"
    assert "nothing was changed" in str(outcome)
    with pytest.raises(NotFound, match="no version 9"):
        promote(models, NAME, 9, fleet_of(server), settings(), dry_run=True)
    assert config_text(models) == before
    assert not (models / NAME / ".spikeless" / "journal.jsonl").exists()
    promote(models, NAME, 2, fleet_of(server), settings())
    outcome = rollback(models, NAME, fleet_of(server), dry_run=True)
    assert (outcome.version, outcome.steps) == (1, ("moving stable back to version 1",))
    assert served(client) == 2


def test_a_restart_serves_what_was_promoted(models: Path) -> None:
    with start_server(models) as server:
        promote(models, NAME, 2, fleet_of(server), settings())
    with start_server(models) as server, Client(server.target, timeout=60.0) as client:
        assert served(client) == served(client, label="stable") == 2
        assert served(client, version=1) == 1


def valid(models: Path) -> bool:
    """Whether a server can start with models.config: versions and labels exist."""
    model = model_of(models)
    versions = set(model.model_version_policy.specific.versions)
    return versions <= {1, 2} and set(model.version_labels.values()) <= versions and bool(versions)


def test_requests_never_reach_a_canary(models: Path, server: launch.ServerProcess, client: Client) -> None:
    before = config_text(models)
    with flawless(server.target) as load:
        outcome = promote(models, NAME, 2, fleet_of(server), settings(canary=True))
        assert outcome.result == "canary"
        assert served(client, f"{NAME}-canary") == 2
        assert served(client) == served(client, label="stable") == 1
        with pytest.raises(SpikelessError, match="Servable not found"):
            served(client, version=2)
        again = promote(models, NAME, 2, fleet_of(server), settings(canary=True))
        assert str(again) == f"{NAME}: version 2 is served as {NAME}-canary already"
        with pytest.raises(FailedPrecondition, match="version 2 is the canary"):
            promote(models, NAME, 1, fleet_of(server), settings(canary=True))

        rollback(models, NAME, fleet_of(server), canary=True)
        assert config_text(models) == before
    assert load.factors == {1.0}
    with pytest.raises(NotFound, match="has no canary"):
        rollback(models, NAME, fleet_of(server), canary=True)

    with flawless(server.target) as load:
        promote(models, NAME, 2, fleet_of(server), settings(canary=True))
        promote(models, NAME, 2, fleet_of(server), settings())
        assert served(client) == 2
    assert f"{NAME}-canary" not in config_text(models)


def test_a_canary_comes_and_goes_without_a_pause(
    models: Path, server: launch.ServerProcess, client: Client
) -> None:
    """A server may still be unloading the one before, for as long as it has callers."""
    ended = threading.Event()

    def call() -> None:
        with Client(server.target, timeout=60.0) as caller:
            while not ended.is_set():
                with suppress(SpikelessError):
                    served(caller, f"{NAME}-canary")

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    try:
        for _ in range(8):
            promote(models, NAME, 2, fleet_of(server), settings(canary=True))
            assert served(client, f"{NAME}-canary") == 2
            rollback(models, NAME, fleet_of(server), canary=True)
    finally:
        ended.set()
        for caller in callers:
            caller.join()


@pytest.fixture
def unpinned(models: Path) -> Iterator[launch.ServerProcess]:
    """A server that serves the newest version on disk."""
    models_config.edit(models, {NAME: new_block(NAME, str(models / NAME))})
    with start_server(models, "--num_request_iterations_for_warmup=10") as server:
        yield server


def test_a_version_that_is_published_meanwhile_does_not_disturb(
    models: Path, unpinned: launch.ServerProcess, scales: Path
) -> None:
    with Client(unpinned.target, timeout=60.0) as client:

        def publish(line: str) -> None:
            if line == "checking version 2":
                add_version(scales / "3", models.parent / "staged", 3)
                (models.parent / "staged" / NAME / "3").rename(models / NAME / "3")
                unpinned.wait_for(lambda: served(client) == 3, "the newest version to be served")

        assert promote(models, NAME, 2, fleet_of(unpinned), settings(), publish).result == "promoted"
        assert served(client) == served(client, label="stable") == 2
        assert {one.version: one.state for one in states(client, NAME)}[3] not in LIVE


def test_a_version_that_is_being_loaded_is_waited_for(
    models: Path, unpinned: launch.ServerProcess, scales: Path
) -> None:
    with Client(unpinned.target, timeout=60.0) as client:
        # It takes seconds to warm up.
        staged = add_version(scales / "3", models.parent / "staged", 3)
        records = [prediction_log().SerializeToString()] * 1000
        tfrecord.write(staged / "assets.extra" / "tf_serving_warmup_requests", records)
        staged.rename(models / NAME / "3")
        # Or later, where this process was kept from looking.
        begun = (State.LOADING, State.AVAILABLE)
        unpinned.wait_for(
            lambda: {one.version: one.state for one in states(client, NAME)}.get(3) in begun,
            "version 3 to be loading",
        )
        promote(models, NAME, 2, fleet_of(unpinned), settings())
        assert {one.version: one.state for one in states(client, NAME)}[3] not in LIVE
        assert served(client) == 2


def test_the_state_of_a_version_with_damaged_text_can_be_read(
    models: Path, unpinned: launch.ServerProcess, scales: Path
) -> None:
    """A server's message quotes the text of the record, whatever its bytes are."""
    staged = add_version(scales / "3", models.parent / "staged", 3)
    log = prediction_log()
    log.predict_log.request.inputs["XXX"].CopyFrom(log.predict_log.request.inputs["x"])
    record = log.SerializeToString().replace(b"XXX", b"\xff\xfe\x80")
    tfrecord.write(staged / "assets.extra" / "tf_serving_warmup_requests", [record])
    staged.rename(models / NAME / "3")
    with Client(unpinned.target, timeout=60.0) as client:
        unpinned.wait_for(
            lambda: {one.version: one.state for one in states(client, NAME)}.get(3) is State.END,
            "version 3 to fail",
        )
        (failed,) = client.statuses(NAME, 3)
        assert failed.error is not None
        (report,) = status(models, NAME, (unpinned.target,))
        shown = {one.version: one.servers.get(unpinned.target, "") for one in report.versions}
        assert shown[2].startswith("AVAILABLE")
        assert shown[3].startswith("END")


def test_other_labels_and_versions_above_the_stable_one(
    models: Path, server: launch.ServerProcess, client: Client
) -> None:
    with pytest.raises(FailedPrecondition, match="requests without a label go to the highest version"):
        promote(models, NAME, 2, fleet_of(server), settings(label="blue"))
    promote(models, NAME, 2, fleet_of(server), settings(label="blue", takes_unlabelled=True))
    assert (served(client, label="blue"), served(client, label="stable"), served(client)) == (2, 1, 2)
    promote(models, NAME, 2, fleet_of(server), settings(keep_previous=False))
    assert served(client, label="stable") == 2
    assert list(model_of(models).model_version_policy.specific.versions) == [2]
    with pytest.raises(FailedPrecondition, match=r"labels \{'blue': 2\}"):
        rollback(models, NAME, fleet_of(server))


@pytest.mark.parametrize("broken", ["golden", "not finite", "does not load", "bad warmup"])
def test_a_version_that_does_wrong_changes_nothing(
    models: Path, server: launch.ServerProcess, client: Client, scales: Path, broken: str
) -> None:
    if broken == "golden":
        add_version(scales / "3", models, 7, expected=4.0)
        reason = r"y is 3 at \[0, 0\] instead of 4"
    elif broken == "not finite":
        add_version(scales / "nan", models, 7)
        reason = "warmup record 1 with a value in y that is not finite"
    elif broken == "does not load":
        version = add_version(scales / "3", models, 7)
        data = version / "variables" / "variables.data-00000-of-00001"
        data.write_bytes(data.read_bytes()[:10])
        reason = "version 7 cannot be loaded"
    else:
        version = add_version(scales / "whole", models, 7)
        # TensorFlow Serving only says what is wrong with the record.
        reason = f"cannot be loaded: .*{'warmup record 1' if IS_EMBEDDED else 'int32 but float'}"
    before = config_text(models)
    with flawless(server.target) as load:
        with pytest.raises(PromotionError, match=rf"(?s){reason}.*everything is as it was$"):
            promote(models, NAME, 7, fleet_of(server), settings())
        assert config_text(models) == before
        assert served(client) == served(client, label="stable") == 1
        deadline = time.monotonic() + 60
        while any(one.state is not State.END for one in states(client, f"{NAME}-canary")):
            assert time.monotonic() < deadline, "the candidate is still loaded"
            time.sleep(0.02)
        # And nothing of it stands in the way of a good one.
        assert promote(models, NAME, 2, fleet_of(server), settings()).result == "promoted"
        load.sees(2.0)
    assert load.factors == {1.0, 2.0}
    assert [r["result"] for r in journal(models) if r["event"] == "end"] == ["put back", "promoted"]


@pytest.mark.parametrize("action", ["promote", "rollback"])
def test_killed_at_every_step_it_is_valid_and_repeating_finishes(
    models: Path, server: launch.ServerProcess, client: Client, action: str
) -> None:
    goal, start = (2, 1) if action == "promote" else (1, 2)

    def repeat() -> Outcome:
        if action == "promote":
            return promote(models, NAME, 2, fleet_of(server), settings())
        return rollback(models, NAME, fleet_of(server))

    def reset() -> None:
        other = rollback(models, NAME, fleet_of(server)) if action == "promote" else None
        other = other or promote(models, NAME, 2, fleet_of(server), settings())
        assert other.version == start

    if action == "rollback":
        promote(models, NAME, 2, fleet_of(server), settings())
    kills = []
    with flawless(server.target) as load:
        for number in range(100):
            script = SUPPORT / "killed_promotions.py"
            done = subprocess.run(
                [sys.executable, script, action, models, server.target, str(number)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                capture_output=True,
                text=True,
                timeout=120,
            )
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL, done.stderr
            kills.append(done.stdout.splitlines()[-1])
            assert valid(models), kills[-1]
            assert {served(client), served(client, label="stable")} <= {1, 2}, kills[-1]
            repeat()
            assert served(client) == served(client, label="stable") == goal, kills[-1]
            assert f"{NAME}-canary" not in config_text(models), kills[-1]
            reset()
    # Before and after each state of models.config, and before and after servers have
    # taken it.
    wanted = {
        "promote": ("serving version", "adding", "moving", "asking", "done"),
        "rollback": ("moving", "done"),
    }
    for text in (*wanted[action], "reloading"):
        assert any(text in kill for kill in kills), kills
    assert load.factors == {1.0, 2.0}


def test_a_rollback_undoes_a_promotion_that_was_killed(
    models: Path, server: launch.ServerProcess, client: Client
) -> None:
    before = config_text(models)
    for moment in ("AVAILABLE", "comparing", "adding", "moving"):
        script = SUPPORT / "killed_promotions.py"
        done = subprocess.run(
            [sys.executable, script, "promote", models, server.target, moment],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            timeout=120,
        )
        assert done.returncode == -signal.SIGKILL
        assert rollback(models, NAME, fleet_of(server)).result == "undone"
        assert config_text(models) == before
        assert served(client) == served(client, label="stable") == 1
    assert rollback(models, NAME, fleet_of(server)).version == 1, "and repeated, it goes back no further"


def test_soaking_watches_what_real_callers_of_the_canary_see(models: Path, tmp_path: Path) -> None:
    monitoring = tmp_path / "monitoring.config"
    monitoring.write_text("prometheus_config { enable: true }")
    before = config_text(models)
    rest = launch.free_port()
    flags = (f"--rest_api_port={rest}", f"--monitoring_config_file={monitoring}")
    with (
        start_server(models, *flags) as server,
        Client(server.target, timeout=60.0) as client,
        flawless(server.target),
    ):
        watch = SoakSettings(
            seconds=60.0, interval=0.05, metrics=f"http://{{host}}:{rest}/monitoring/prometheus/metrics"
        )

        def fail(line: str) -> None:
            if "soaking" in line:
                with pytest.raises(SpikelessError):
                    client.predict(f"{NAME}-canary", {"x": X.astype("int64")})

        with pytest.raises(PromotionError, match=r"metrics say that 1 of \d+ requests failed, 0 of"):
            promote(models, NAME, 2, fleet_of(server), settings(soak=watch), fail)
        assert config_text(models) == before

        watch = dataclasses.replace(watch, seconds=0.3)
        said: list[str] = []
        promote(models, NAME, 2, fleet_of(server), settings(soak=watch), said.append)
        assert "soaking for 0.3 s" in said
        (soaked,) = (record for record in journal(models) if record["event"] == "soak")
        assert soaked["candidate"]["requests"] > 0
        assert soaked["traffic"]["errors"] == 0
