"""Promotion in waves: real servers that follow a store on an S3 server, under load."""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Machine, machines, wait_for
from promotion_models import NAME, SLOW_SECONDS, Load, add_version, flawless, served
from stores import ACCESS_KEY, S3, SECRET_KEY, s3_server

from spikeless.client import Client
from spikeless.launch import ServerProcess, free_port
from spikeless.rollout.fleet import FleetSettings
from spikeless.store import promotions
from spikeless.store.changes import Change, Changes
from spikeless.store.objects import Store
from spikeless.store.push import push
from spikeless.store.reporting import FollowedModel, Reporter, ReportSettings
from spikeless.store.reports import MAX_BYTES, Reports

NODES = ("node-a", "node-b", "node-c")
#: No test fails because the machine is slow.
PATIENT = ("--patience=120s", "--load-timeout=300s")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def store(s3: S3, scales: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store with three versions, of which the first is promoted.

    Without warmup records nothing is compared, so that no version is ever too slow.
    """
    for variable, value in s3.environment().items():
        monkeypatch.setenv(variable, value)
    url = f"{s3.url}/{tmp_path.name}"
    for number in (1, 2, 3):
        push(add_version(scales / str(number), tmp_path / "trained", number, warmup=False), url)
    promotions.promote(url, NAME, 1)
    return url


def command(store: str, version: int, *options: str) -> list[str]:
    promote = ["promote", NAME, str(version), "--store", store, "--poll=100ms", *options]
    return [sys.executable, "-m", "spikeless", *promote]


def run(store: str, version: int, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(store, version, *options), capture_output=True, text=True, timeout=600)


def last_change(store: str) -> Change:
    last = Changes(Store(store)).last()
    assert last is not None
    return last


def all_serve(fleet: list[Machine], version: int) -> None:
    for machine in fleet:
        wait_for(lambda machine=machine: machine.serves(version), f"{machine.node}: {machine.log}")  # type: ignore[misc]


@pytest.mark.timeout(900)
def test_a_healthy_fleet_goes_through_its_waves_under_load(store: str, tmp_path: Path) -> None:
    """No call fails; then the promoting process is killed at each of its lines."""
    waves = ("--waves=1,100%", "--soak=1s", "--max-error-rate=0%", "--max-p99=10s", *PATIENT)
    with machines(store, tmp_path, NODES, 1) as fleet, contextlib.ExitStack() as stack:
        loads = [stack.enter_context(flawless(machine.server.target)) for machine in fleet]
        done = run(store, 2, *waves)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{NAME}: stable is version 2 (it was 1)\n"
        assert [change.action for change in Changes(Store(store)).backwards(last_change(store))] == [
            "promote",
            "wave",
            "wave",
            "promote",
        ]
        all_serve(fleet, 2)
        for machine, load in zip(fleet, loads, strict=True):
            wait_for(lambda machine=machine: measured(machine), f"{machine.node}: {machine.log}")  # type: ignore[misc]
            load.sees(2.0)
        for kills in itertools.count():
            if not killed_at_line(command(store, 3, *waves), kills):
                break
            served = {machine.node: served_by(store, machine.node) for machine in fleet}
            assert set(served.values()) <= {2, 3}
        assert kills > 3
        all_serve(fleet, 3)
        assert last_change(store).waves == ()
        for load in loads:
            load.sees(3.0)
            assert load.factors == {1.0, 2.0, 3.0}
        for machine in fleet:
            assert SECRET_KEY not in machine.log
        opened = Store(store)
        records = [(folder, name) for folder in (".promotions", ".fleet") for name in opened.names(folder)]
        assert len(records) > len(NODES)
        for folder, name in records:
            record = opened.read(f"{folder}/{name}", MAX_BYTES).decode()
            assert ACCESS_KEY not in record
            assert SECRET_KEY not in record


def measured(machine: Machine) -> bool:
    """Whether its servers' metrics say that requests came, and that none failed."""
    model = machine.reported()
    since = None if model is None else model.since
    return since is not None and since.requests > 0 and since.errors == 0 and since.p99_ms is not None


def served_by(store: str, node: str) -> int:
    (version,) = promotions.pinned(promotions.read(Store(store)).of(node), NAME)
    return version


def killed_at_line(arguments: list[str], number: int) -> bool:
    """Run a command, and kill it at a line of progress; False where it has ended."""
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    with process.stderr as lines:
        for _ in itertools.islice(lines, number + 1):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    return process.returncode == -signal.SIGKILL


def test_credentials_are_in_no_report(server: ServerProcess, models: Path, tmp_path: Path) -> None:
    """Not even those of an address of metrics that does not work."""
    store, closed = tmp_path / "store", free_port()
    for number, metrics in enumerate(
        (
            f"http://me:hunter2@127.0.0.1:{closed}/metrics",
            "http://me:hunter2@127.0.0.1/metrics",
            f"http://127.0.0.1:{closed}/metrics?token=hunter2",
            f"htp://me:hunter2@127.0.0.1:{closed}/metrics",
        )
    ):
        settings = ReportSettings(60.0, metrics)
        reporter = Reporter(Store(str(store)), "node-a", models, FleetSettings([server.target]), settings)
        reporter.report(number, [FollowedModel(NAME, {"stable": 1})])
        model = Reports(Store(str(store))).read("node-a").model(NAME)
        assert model is not None
        assert (model.labels, model.since) == ({"stable": 1}, None)
        assert "metrics" in model.error
        assert b"hunter2" not in (store / ".fleet" / "node-a.json").read_bytes()


@pytest.mark.timeout(900)
def test_one_server_refuses_and_the_fleet_rolls_back_by_itself(store: str, tmp_path: Path) -> None:
    with machines(store, tmp_path, NODES, 1) as fleet, contextlib.ExitStack() as stack:
        broken = fleet[2]
        for machine in fleet:
            wait_for(lambda machine=machine: machine.has(3), f"{machine.node}: {machine.log}")  # type: ignore[misc]
        # Version 3 is broken on the disk of one machine.
        graph = broken.models / NAME / "3" / "saved_model.pb"
        graph.unlink()
        graph.write_bytes(b"no graph")
        loads = [stack.enter_context(flawless(machine.server.target)) for machine in fleet]
        for first, wave, given_back in (("node-c", 1, ()), ("node-a", 2, ("node-a",))):
            done = run(store, 3, f"--wave={first}", "--waves=100%", *PATIENT)
            assert done.returncode == 1
            failed = f"wave {wave} of 2 of version 3 of {NAME} failed; the fleet goes back to version 1\n"
            assert f"spikeless: error: {failed}" in done.stderr
            (row,) = [line for line in done.stderr.splitlines() if line.split()[:2] == ["node-c", str(wave)]]
            assert "bad: it refused version 3: " in row
            change = last_change(store)
            assert (change.action, change.version, change.waves) == ("rollback", 1, ())
            assert change.reason.startswith(f"wave {wave} of 2: node-c: it refused version 3")
            all_serve(fleet, 1)
            for machine, load in zip(fleet, loads, strict=True):
                assert (3.0 in load.factors) <= (machine.node in (*given_back, "node-b"))
                assert machine.has(1)
        # What is whole there is promoted all the same.
        assert run(store, 2, "--waves=1,100%", *PATIENT).returncode == 0
        all_serve(fleet, 2)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("saved_model", "limits", "problem"),
    [
        pytest.param(
            "brittle",
            ("--max-error-rate=1%", "--max-p99=1m"),
            r"[1-9]\d* of \d+ requests failed, \d\.\d\d % before \(--max-error-rate 1%\)",
            id="fails",
        ),
        pytest.param(
            "slow",
            ("--max-error-rate=0%", f"--max-p99={900 * SLOW_SECONDS:g}ms"),
            r"p99 is up to [1-9]\d\d+\.\d ms \(--max-p99 90ms\)",
            id="is slow",
        ),
    ],
)
def test_what_callers_of_a_new_version_get_takes_it_back(
    store: str, scales: Path, tmp_path: Path, saved_model: str, limits: tuple[str, ...], problem: str
) -> None:
    """A version passes every check, then raises for some inputs or is too slow."""
    push(add_version(scales / saved_model, tmp_path / "trained", 4, warmup=False), store)
    with machines(store, tmp_path, NODES[:2], 1) as fleet, contextlib.ExitStack() as stack:
        reached, spared = fleet
        calls = stack.enter_context(Load(reached.server.target))
        others = stack.enter_context(flawless(spared.server.target))
        for machine in fleet:
            wait_for(lambda machine=machine: measured(machine), f"{machine.node}: {machine.log}")  # type: ignore[misc]
        done = run(store, 4, "--wave=node-a", "--waves=100%", "--soak=5s", *limits, *PATIENT)
        assert done.returncode == 1
        failed = f"wave 1 of 2 of version 4 of {NAME} failed; the fleet goes back to version 1\n"
        assert f"spikeless: error: {failed}" in done.stderr
        change = last_change(store)
        assert (change.action, change.version, change.waves) == ("rollback", 1, ())
        assert re.match(f"wave 1 of 2: node-a: {problem}", change.reason), change.reason
        all_serve(fleet, 1)
        for machine in fleet:
            with Client(machine.server.target, timeout=60.0) as client:
                assert served(client) == 1
        # Some callers of one machine noticed it, no others did.
        assert bool(calls.failures) == (saved_model == "brittle")
        assert calls.factors == ({1.0} if saved_model == "brittle" else {1.0, 4.0})
        assert others.factors == {1.0}


@pytest.mark.timeout(900)
def test_a_machine_that_dies_in_its_wave_ends_the_promotion(store: str, tmp_path: Path) -> None:
    with machines(store, tmp_path, NODES, 1) as fleet:
        dying = fleet[1]
        arguments = command(store, 2, "--wave=node-b", "--waves=100%", "--soak=1h", "--patience=15s")
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        with process.stderr as lines:
            seen = []
            for line in lines:
                seen.append(line)
                if line.startswith("node-b: watched for"):
                    dying.kill()
                    break
            rest = lines.read()
        assert process.wait(timeout=120) == 1, seen
        assert "node-b: its last report is" in rest
        assert f"wave 1 of 2 of version 2 of {NAME} failed; the fleet goes back to version 1" in rest
        assert last_change(store).reason.startswith("wave 1 of 2: node-b: its last report is")
        # Up again, it serves what the others do.
        dying.start()
        all_serve(fleet, 1)
        assert promotions.read(Store(store)).waves == ()
    # Stopped, machines take their reports back.
    assert Reports(Store(store)).nodes() == []
