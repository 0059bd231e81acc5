"""Promotion in waves through a folder: who gets what, who is asked, what is refused.

Machines are reports that the tests write, or followers without servers; real ones with
servers are in ``tests/server/test_waves.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fleet_models import NAME
from places import SUPPORT
from small_versions import small_version
from trained_models import spikeless

from spikeless.errors import (
    Cancelled,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SpikelessError,
)
from spikeless.repository import models_config
from spikeless.store import promotions
from spikeless.store.changes import Change, Changes, Waves, check_node
from spikeless.store.follow import FollowSettings, StoreFollower
from spikeless.store.health import Health, HealthLimits, Silence, Standing, Watch
from spikeless.store.objects import Store
from spikeless.store.pull import PullSettings, pull
from spikeless.store.push import push
from spikeless.store.reporting import ReportSettings
from spikeless.store.reports import MAX_BYTES, NodeModel, NodeReport, NodeTraffic, Reports, clean
from spikeless.store.waves import WaveSettings, promote_in_waves

NODES = tuple(f"node-{number}" for number in range(10))
#: No test fails because the machine is slow, and none waits long.
LIMITS = HealthLimits(soak=10.0, load_timeout=60.0, patience=60.0)


def said(node: str, version: int, *, busy: bool = False, age: float = 0.0, **model: Any) -> NodeReport:
    """The report of a machine whose server has a version."""
    one = NodeModel(NAME, (1, 2), {version: "AVAILABLE"}, {"stable": version}, "", False, 60.0, None, None)
    one = msgspec.structs.replace(one, **model)
    now = time.time()
    return NodeReport(1, node, int(1000 * now), now - age, 60.0, 10**6, busy, 1, (one,))


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A store with versions 1 and 2, of which 1 is promoted, and ten machines."""
    models, store = tmp_path / "models", str(tmp_path / "store")
    for number in (1, 2):
        push(small_version(models, number, b"%d" % number * 1000), store)
    promotions.promote(store, NAME, 1)
    for node in NODES:
        Reports(Store(store)).write(said(node, 1))
    return store


class Machines:
    """Machines that take what applies to them, and report that they serve it."""

    def __init__(self, store: str, say: Callable[[str, int], NodeReport | None] = said) -> None:
        self._store = Store(store)
        self._say = say
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        #: What each machine had, one after the other.
        self.history: dict[str, list[int]] = {node: [] for node in NODES}

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            promoted = promotions.read(self._store)
            for node in NODES:
                (version,) = promotions.pinned(promoted.of(node), NAME)
                if self.history[node][-1:] != [version]:
                    self.history[node].append(version)
                    report = self._say(node, version)
                    if report is not None:
                        Reports(self._store).write(report)

    def __enter__(self) -> Machines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def waves(*sizes: str, limits: HealthLimits = LIMITS, **more: object) -> WaveSettings:
    return WaveSettings(sizes or ("1", "30%", "100%"), limits=limits, interval=0.05, **more)  # type: ignore[arg-type]


def versions_of(store: str) -> dict[str, int]:
    """What each machine should serve."""
    promoted = promotions.read(Store(store))
    return {node: promotions.pinned(promoted.of(node), NAME)[0] for node in NODES}


def test_a_fleet_gets_a_version_in_waves(store: str) -> None:
    lines: list[str] = []
    with Machines(store) as machines:
        outcome = promote_in_waves(store, NAME, 2, waves(), reason="better", progress=lines.append)
    assert (outcome.result, outcome.version, outcome.previous) == ("promoted", 2, 1)
    assert all(history[0] == 1 and 2 in history[:2] for history in machines.history.values() if history[1:])
    assert versions_of(store) == dict.fromkeys(NODES, 2)
    changes = list(Changes(Store(store)).backwards(Changes(Store(store)).last()))[::-1]
    assert [change.action for change in changes] == ["promote", "wave", "wave", "wave", "promote"]
    reached = [len(change.waves[0].reached) for change in changes if change.waves]
    assert reached == [1, 3, 10]
    assert {change.reason for change in changes[1:]} == {"better"}
    assert next(line for line in lines if line.startswith("wave ")).startswith("wave 1 of 3: node-")
    # A rollback knows the version from before the waves.
    assert promotions.rollback(store, NAME).version == 1
    assert promote_in_waves(store, NAME, 1, waves()).result == "unchanged"


def test_the_order_is_the_same_each_time_and_others_are_last(store: str) -> None:
    first, second = (promote_in_waves(store, NAME, 2, waves(), dry_run=True).steps for _ in range(2))
    assert first == second
    assert len(first) == 4
    assert Changes(Store(store)).last().number == 1  # type: ignore[union-attr]
    # Silent machines, those without servers, and those of other models are in no wave.
    reports = Reports(Store(store))
    reports.write(said("node-0", 1, age=1000))
    reports.write(msgspec.structs.replace(said("node-1", 1), servers=0))
    reports.write(msgspec.structs.replace(said("node-2", 1), models=()))
    lines: list[str] = []
    steps = promote_in_waves(store, NAME, 2, waves(), dry_run=True, progress=lines.append).steps
    assert not any(f"node-{number}" in step for number in range(3) for step in steps)
    assert len([line for line in lines if "in no wave" in line]) == 3
    named = waves("100%", first=("node-7", "node-5"))
    assert promote_in_waves(store, NAME, 2, named, dry_run=True).steps[0] == "wave 1 of 2: node-7, node-5"
    with pytest.raises(FailedPrecondition, match="no report of node-0, node-77"):
        promote_in_waves(store, NAME, 2, waves(first=("node-0", "node-77", "node-5")))


SINCE, BEFORE = NodeTraffic(1000.0, 5.0, 8.0), NodeTraffic(1000.0, 5.0, 8.0)
OLD = {"labels": {"stable": 1}, "states": {1: "AVAILABLE"}}


@pytest.mark.parametrize(
    ("says", "limits", "health", "text"),
    [
        ({}, {}, Health.WELL, ""),
        ({"since": SINCE, "before": BEFORE}, {"max_p99": 0.008}, Health.WELL, ""),
        ({"since": SINCE}, {}, Health.BAD, "5 of 1000 requests failed (--max-error-rate 0.1%)"),
        ({"since": SINCE}, {"max_error_rate": 0.005}, Health.WELL, ""),
        (
            {"since": NodeTraffic(1000.0, 7.0, 8.0), "before": BEFORE},
            {},
            Health.BAD,
            "7 of 1000 requests failed, 0.50 % before (--max-error-rate 0.1%)",
        ),
        ({"since": BEFORE, "before": BEFORE}, {"max_p99": 0.0075}, Health.BAD, "p99 is up to 8.0 ms"),
        ({"watched": 2.0, "since": SINCE}, {}, Health.BAD, "5 of 1000 requests failed"),
        ({"watched": 2.0}, {"max_p99": 0.001}, Health.WAITING, "watched for 2 s of 10 s"),
        ({}, {"max_p99": 0.05}, Health.WAITING, "it has no metrics"),
        ({}, {"max_p99": 0.05, "load_timeout": 0.0}, Health.BAD, "it has no metrics"),
        ({**OLD, "refused": True, "error": "NaN"}, {}, Health.BAD, "it refused version 2: NaN"),
        ({**OLD, "error": "store: cannot read"}, {}, Health.WAITING, "store: cannot read"),
        (
            OLD,
            {"load_timeout": 0.0},
            Health.BAD,
            "it does not serve version 2 after 0 s: it is not there yet",
        ),
        (
            {**OLD, "states": {2: "END: no variables"}},
            {"load_timeout": 0.0},
            Health.BAD,
            "it does not serve version 2 after 0 s: END: no variables",
        ),
    ],
)
def test_how_a_machine_does(
    says: dict[str, Any], limits: dict[str, float], health: Health, text: str
) -> None:
    chosen = HealthLimits(**{"soak": 10.0, "load_timeout": 60.0, "patience": 60.0, **limits})
    (standing,) = watch(chosen).standings(in_wave("node-0"), {"node-0": said("node-0", 2, **says)})
    assert (standing.health, standing.text[: len(text)]) == (health, text)


def in_wave(*nodes: str) -> Waves:
    return Waves(NAME, "stable", 2, 1, "", ("100%",), (), (nodes,), 2, "me", "here", 0.0)


def watch(limits: HealthLimits) -> Watch:
    return Watch(limits, Silence(limits.patience))


def test_a_machine_that_is_silent_or_loses_the_version() -> None:
    limits = HealthLimits(patience=0.0)
    wave, watching = in_wave("node-0"), watch(limits)

    def one(report: NodeReport | SpikelessError) -> Standing:
        return watching.standings(wave, {"node-0": report})[0]

    # Its clock counts only for the first report: one that is behind is not silent.
    behind = said("node-0", 2, age=500)
    assert one(behind).health is Health.SILENT
    assert one(behind).text.startswith("its last report is 5")
    behind = msgspec.structs.replace(behind, number=behind.number + 1)
    assert one(behind).health is Health.WELL
    assert one(said("node-0", 2, busy=True, age=500)).health is Health.WELL, "it is at work"
    assert one(NotFound("it has no report any more")).health is Health.LEFT
    assert one(DataLoss("it cannot be used")).health is Health.SILENT
    # One that no longer serves what it has served is given three reports' time.
    lost = msgspec.structs.replace(said("node-0", 1, error="no server answers"), every=0.001)
    deadline = time.monotonic() + 300
    number = lost.number
    while (standing := one(lost)).health is not Health.BAD and time.monotonic() < deadline:
        number += 1
        lost = msgspec.structs.replace(lost, number=number)
    assert standing.text == "it does not serve version 2 any more: no server answers"
    # One whose puller starts again and again is never watched for long enough.
    limits = HealthLimits(soak=0.001, load_timeout=0.0, patience=0.0)
    watching = watch(limits)
    again = msgspec.structs.replace(said("node-0", 2, watched=0.0), every=0.001)
    while (standing := one(again)).health is not Health.BAD and time.monotonic() < deadline:
        number += 1
        again = msgspec.structs.replace(again, number=number)
    assert standing.text == "it keeps starting again, watched for 0 s"


def test_a_wave_that_fails_is_taken_back(store: str) -> None:
    failing: list[str] = []

    def say(node: str, version: int) -> NodeReport:
        if version == 1:
            return said(node, 1)
        failing.append(node)
        wrong: dict[str, Any] = {"error": "NaN", "refused": True, "labels": {"stable": 1}}
        return said(node, 2, **(wrong if len(failing) == 2 else {}))

    with Machines(store, say), pytest.raises(FailedPrecondition) as caught:
        promote_in_waves(store, NAME, 2, waves())
    table = str(caught.value).splitlines()
    assert table[0] == f"wave 2 of 3 of version 2 of {NAME} failed; the fleet goes back to version 1"
    assert [row.split()[:3] for row in table[1:3]] == [["node", "wave", "serves"], [failing[0], "1", "2"]]
    assert any(f"{failing[1]}" in row and "bad: it refused version 2: NaN" in row for row in table[3:])
    assert len(table) == 2 + 3
    assert versions_of(store) == dict.fromkeys(NODES, 1)
    last = last_change(store)
    assert (last.action, last.version, last.previous, last.waves) == ("rollback", 1, 2, ())
    assert last.reason.startswith(f"wave 2 of 3: {failing[1]}: it refused version 2: NaN")
    # Repeated, a rollback changes nothing more.
    assert promotions.rollback(store, NAME).result == "unchanged"


def test_silent_machines_are_named(store: str) -> None:
    silent = said("node-4", 1, age=1000)

    def resume(**more: Any) -> str:
        begun(store, "wave 3 of 3")
        Reports(Store(store)).write(silent)
        with Machines(store, lambda node, version: said(node, version) if node != "node-4" else None):
            return promote_in_waves(store, NAME, 2, waves(**more)).result

    with pytest.raises(FailedPrecondition, match=r"node-4 .*silent: its last report is 1\d\d\d s old"):
        resume()
    assert versions_of(store) == dict.fromkeys(NODES, 1)
    assert resume(max_silent=1) == "promoted"


def test_machines_that_leave_hold_up_nobody(store: str) -> None:
    """Unless all do: then nobody says how the version does."""
    gone: set[str] = {"node-4"}

    def say(node: str, version: int) -> NodeReport | None:
        if version == 1 or node not in gone:
            return said(node, version)
        Reports(Store(store)).remove(node)
        return None

    with Machines(store, say):
        assert promote_in_waves(store, NAME, 2, waves("100%")).result == "promoted"
    promotions.promote(store, NAME, 1)
    for node in NODES:
        Reports(Store(store)).write(said(node, 1))
    gone.update(NODES)
    with Machines(store, say), pytest.raises(FailedPrecondition, match="left: it has no report any more"):
        promote_in_waves(store, NAME, 2, waves("100%"))
    assert versions_of(store) == dict.fromkeys(NODES, 1)
    # One that was not stopped is forgotten after a week.
    for node in NODES:
        Reports(Store(store)).remove(node)
    for node, age in (("node-1", 0.0), ("node-2", 5 * 86400.0), ("node-3", 8 * 86400.0)):
        Reports(Store(store)).write(said(node, 1, age=age))
    promote_in_waves(store, NAME, 2, waves(), dry_run=True)
    assert Reports(Store(store)).nodes() == ["node-1", "node-2", "node-3"]
    lines: list[str] = []
    with Machines(store, lambda node, version: said(node, version) if node == "node-1" else None):
        promote_in_waves(store, NAME, 2, waves(), progress=lines.append)
    assert Reports(Store(store)).nodes() == ["node-1", "node-2"]
    assert "node-3: it is in no wave: it has not reported for a week, and is forgotten" in lines


def last_change(store: str) -> Change:
    last = Changes(Store(store)).last()
    assert last is not None
    return last


class Stop(threading.Event):
    """An interruption at the first line of progress that has a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def __call__(self, line: str) -> None:
        if self._text in line:
            self.set()


def begun(store: str, text: str = "wave 2 of 3") -> None:
    """Interrupt a promotion of version 2 when it reaches something."""
    stop = Stop(text)
    with Machines(store), pytest.raises(Cancelled, match=r"the same command goes on, `spikeless rollback"):
        promote_in_waves(store, NAME, 2, waves(), progress=stop, interrupted=stop)


def test_between_waves_everything_is_valid(store: str, tmp_path: Path) -> None:
    """Who applies for what: machines of waves, others, new ones; and who may change."""
    begun(store)
    (going,) = last_change(store).waves
    assert len(going.reached) == 3
    assert {node for node, version in versions_of(store).items() if version == 2} == set(going.reached)
    # A machine that comes up takes what applies to it.
    for node, version in ((going.reached[0], 2), ("new", 1)):
        models = tmp_path / node
        assert pull(store, models, settings=PullSettings(node=node))
        model = models_config.read(models).model(NAME)
        assert model is not None
        assert dict(model.version_labels) == {"stable": version}
    # Another promotion of the model is refused, with who and when; of another one not.
    acts: tuple[Callable[[], object], ...] = (
        lambda: promotions.promote(store, NAME, 2),
        lambda: promotions.promote(store, NAME, 1, label="old"),
        lambda: promotions.rollback(store, NAME, label="old"),
        lambda: promote_in_waves(store, NAME, 1, waves()),
        lambda: promote_in_waves(store, NAME, 2, waves(), label="other"),
        lambda: promote_in_waves(store, NAME, 2, waves(), dry_run=True),
    )
    for act in acts:
        with pytest.raises(
            FailedPrecondition, match=rf"in waves, begun by {going.user} on {going.host} at 20\d\d"
        ):
            act()
    with pytest.raises(FailedPrecondition, match=r"began with --waves 1,30%,100%: repeat it with these"):
        promote_in_waves(store, NAME, 2, waves("100%"))
    with pytest.raises(InvalidArgument, match="to go on to 2"):
        promotions.rollback(store, NAME, version=2)
    (tmp_path / "models" / NAME).rename(tmp_path / "models" / "other")
    push(tmp_path / "models" / "other" / "1", store)
    promotions.promote(store, "other", 1)
    assert last_change(store).waves == (going,)
    assert versions_of(store)[going.reached[0]] == 2
    # The same command goes on.
    lines: list[str] = []
    with Machines(store):
        assert promote_in_waves(store, NAME, 2, waves(), progress=lines.append).result == "promoted"
    assert lines[0] == "going on with wave 2 of 3"
    assert versions_of(store) == dict.fromkeys(NODES, 2)
    assert promotions.read(Store(store)).config.names == [NAME, "other"]


def test_a_rollback_ends_the_waves(store: str) -> None:
    begun(store)
    outcome = promotions.rollback(store, NAME, reason="night")
    assert (outcome.result, outcome.version, outcome.previous) == ("rolled back", 1, 2)
    assert versions_of(store) == dict.fromkeys(NODES, 1)
    assert promotions.rollback(store, NAME).result == "unchanged"
    # While the command runs, it says who has done that.
    lines: list[str] = []

    def progress(line: str) -> None:
        lines.append(line)
        if line.startswith("wave 1 of 3"):
            promotions.rollback(store, NAME, reason="night")

    with pytest.raises(FailedPrecondition, match=r"promotion of version 2 was ended by .*: night"):
        promote_in_waves(store, NAME, 2, waves(), progress=progress)


def test_the_same_command_twice_at_once_does_it_once(store: str) -> None:
    results: list[str] = []

    def run() -> None:
        results.append(promote_in_waves(store, NAME, 2, waves()).result)

    threads = [threading.Thread(target=run) for _ in range(3)]
    with Machines(store):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(results) <= {"promoted", "unchanged"}
    assert len(results) == 3
    actions = [change.action for change in Changes(Store(store)).backwards(last_change(store))]
    assert actions == ["promote", "wave", "wave", "wave", "promote"]


def test_killed_at_every_step_and_repeated(store: str, tmp_path: Path) -> None:
    """Each machine has one of the two versions, and the same command completes it."""
    script = [sys.executable, str(SUPPORT / "killed_waves.py"), store, str(tmp_path / "kills")]
    (tmp_path / "kills").mkdir()
    done = subprocess.run(script, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = len(done.stdout.splitlines())
    assert kills > 20
    for number in range(kills):
        folder = str(tmp_path / "kills" / str(number))
        assert set(versions_of(folder).values()) <= {1, 2}
        assert promote_in_waves(folder, NAME, 2, waves("1", "100%")).result in ("promoted", "unchanged")
        assert versions_of(folder) == dict.fromkeys(NODES, 2)
        assert not last_change(folder).waves


def test_what_cannot_go_in_waves(store: str, tmp_path: Path) -> None:
    for wrong in (("0", "100%"), ("101%",), ("1", "10%"), (), ("many", "100%"), ("1.5", "100%")):
        with pytest.raises(InvalidArgument, match="--waves"):
            WaveSettings(sizes=wrong)
    for node in ("../x", "a/b", "", ".hidden", "a b", "x" * 129, "a\n", "ä"):
        with pytest.raises(InvalidArgument, match="no name of a machine"):
            check_node(node)
        with pytest.raises(InvalidArgument, match="no name of a machine"):
            PullSettings(node=node)
    with pytest.raises(FailedPrecondition, match="promote the first one without --waves"):
        promote_in_waves(store, NAME, 2, waves(), label="other")
    empty = str(tmp_path / "empty")
    push(tmp_path / "models" / NAME / "1", empty)
    push(tmp_path / "models" / NAME / "2", empty)
    promotions.promote(empty, NAME, 1)
    with pytest.raises(FailedPrecondition, match=r"no machine with a server reports on ctr.*--report"):
        promote_in_waves(empty, NAME, 2, waves())
    assert last_change(empty).number == 1


@pytest.mark.parametrize(
    "edit",
    [
        {"node": "node-2"},
        {"node": "../node-1"},
        {"more": 1},
        {"every": 1e9},
        {"number": -1},
        {"models": [{"name": NAME}]},
        {"models": "x" * (MAX_BYTES + 1)},
    ],
)
def test_reports_are_checked(edit: dict[str, object], store: str) -> None:
    file = Path(store, ".fleet", "node-1.json")
    report = json.loads(file.read_bytes())
    file.write_text(json.dumps({**report, **edit}))
    with pytest.raises(DataLoss, match=r"\.fleet/node-1\.json"):
        Reports(Store(store)).read("node-1")
    # It is named, and in no wave.
    lines: list[str] = []
    steps = promote_in_waves(store, NAME, 2, waves(), dry_run=True, progress=lines.append).steps
    assert not any("node-1," in step or step.endswith("node-1") for step in steps)
    assert any(line.startswith("node-1: it is in no wave") for line in lines)


def test_texts_of_reports_have_no_control_characters(store: str) -> None:
    file = Path(store, ".fleet", "node-1.json")
    report = json.loads(file.read_bytes())
    report["models"][0]["error"] = "\x1b[2J"
    file.write_text(json.dumps(report))
    with pytest.raises(DataLoss):
        Reports(Store(store)).read("node-1")
    assert clean("a\nb\x1b[2J\x9bc  d\u202e" + "x" * 1000) == "a b [2J c d " + "x" * 488
    Path(store, ".fleet", "..json").write_text("{}")
    Path(store, ".fleet", "x y.json").write_text("{}")
    assert Reports(Store(store)).nodes() == sorted(NODES)


def test_a_follower_without_a_server_reports(store: str, tmp_path: Path) -> None:
    settings = FollowSettings(pull=PullSettings(node="node-x"), report=ReportSettings(3600.0))
    follower = StoreFollower(store, tmp_path / "pulled", NAME, settings)
    reports = Reports(Store(store))
    follower.look()
    first = reports.read("node-x")
    assert (first.change, first.busy, first.servers) == (1, False, 0)
    model = first.model(NAME)
    assert model is not None
    assert (model.on_disk, model.labels, model.since, model.error) == ((1, 2), {}, None, "")
    # Nothing has changed, so nothing is written.
    follower.look()
    assert reports.read("node-x") == first
    promotions.promote(store, NAME, 2)
    follower.look()
    assert reports.read("node-x").change == 2
    assert reports.read("node-x").number > first.number
    wave = follower.registry.get_sample_value("spikeless_pull_wave", {"model_name": NAME})
    assert wave == 0
    # Stopped, it takes its report back.
    stopped = Stop("version 2")
    follower = StoreFollower(store, tmp_path / "again", NAME, settings, progress=stopped, interrupted=stopped)
    follower.look()
    stopped.set()
    follower.run()
    assert reports.nodes() == sorted(NODES)


def test_a_store_that_takes_no_reports_is_followed_all_the_same(store: str, tmp_path: Path) -> None:
    fleet = Path(store, ".fleet")
    for file in fleet.iterdir():
        file.unlink()
    fleet.rmdir()
    fleet.write_text("in the way")
    lines: list[str] = []
    settings = FollowSettings(pull=PullSettings(node="node-x"), report=ReportSettings(60.0))
    follower = StoreFollower(store, tmp_path / "pulled", NAME, settings, progress=lines.append)
    for _ in range(2):
        follower.look()
    assert len([line for line in lines if line.startswith("no report: ")]) == 1
    assert (tmp_path / "pulled" / NAME / "2").exists()


def test_the_status_of_a_fleet(store: str) -> None:
    done = spikeless("status", "--store", store)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2 + len(NODES)), done.stderr
    assert done.stdout.startswith(f"{NAME}: stable is version 1\n  node ")
    begun(store)
    for node, report in (
        ("node-0", said("node-0", 1, age=1000)),
        ("node-1", said("node-1", 1, refused=True, error="NaN")),
        ("node-2", said("node-2", 3)),
        ("node-3", msgspec.structs.replace(said("node-3", 1), models=())),
    ):
        Reports(Store(store)).write(msgspec.structs.replace(report, node=node))
    Path(store, ".fleet", "node-4.json").write_text("{")
    done = spikeless("status", NAME, "--store", store)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == f"{NAME}: stable is version 1; wave 2 of version 2"
    for row, text in zip(
        lines[2:],
        ("silent", "bad: it refused", "waiting: stable", "waiting: it does", "silent: "),
        strict=False,
    ):
        assert text in row
    done = spikeless("status", NAME, "--store", store, "--json")
    (found,) = json.loads(done.stdout)
    (going,) = last_change(store).waves
    assert {one["node"] for one in found["nodes"] if one["wave"]} == set(going.reached)
    assert (found["labels"], found["promoting"], found["wave"]) == ({"stable": 1}, 2, 2)
    assert spikeless("status", "other", "--store", store).returncode == 1
    assert spikeless("status", "--store", store, "--watch").returncode == 2


def test_the_command(store: str, tmp_path: Path) -> None:
    done = spikeless("promote", NAME, 2, "--store", store, "--waves=1,100%", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "wave 1 of 2: node-" in done.stdout
    with Machines(
        store, lambda node, version: said(node, version, refused=version == 2, labels={"stable": 1})
    ):
        command = ["promote", NAME, 2, "--store", store, "--wave=node-3", "--waves=50%,100%", "--soak=1s"]
        done = spikeless(*command, "--poll=100ms", "--max-p99=50ms", "--max-error-rate=0.1%")
    assert done.returncode == 1
    assert "wave 1 of 3: node-3\n" in done.stderr
    assert "wave 1 of 3 of version 2 of ctr failed; the fleet goes back to version 1\n" in done.stderr
    assert "bad: it refused version 2" in done.stderr
    for wrong in (
        ("promote", NAME, 2, "--waves=1,100%"),
        ("promote", NAME, 2, "--max-p99=1ms"),
        ("promote", NAME, 2, "--store", store, "--soak=1s"),
        ("promote", NAME, 2, "--store", store, "--waves=100%", "--canary"),
        ("promote", NAME, 2, "--store", store, "--waves=100%", "--max-error-rate=2"),
        ("pull", store, NAME, "--models", tmp_path / "pulled", "--report=1m"),
        ("pull", store, NAME, "--models", tmp_path / "pulled", "--follow", "--metrics=http://x"),
    ):
        assert spikeless(*wrong).returncode == 2
    done = spikeless("pull", store, NAME, "--models", tmp_path / "pulled", "--node=../x")
    assert (done.returncode, "no name of a machine" in done.stderr) == (1, True)
