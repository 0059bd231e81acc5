"""The life of versions, with loads that the test holds and lets through."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from spikeless.engine.flags import ServerFlags
from spikeless.engine.manager import Manager
from spikeless.errors import DataLoss, NotFound
from spikeless.formats.states import State, VersionStatus

TIMEOUT = 30.0
PATH = Path("unused")


class Loaded:
    """What a load returned; knows whether it was closed."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


class Harness:
    """A manager, a gate for each version's load, and every state that was announced."""

    def __init__(self, flags: ServerFlags) -> None:
        self.gates: dict[int, threading.Event] = {}
        self.failures: dict[int, list[Exception]] = {}
        self.models: list[Loaded] = []
        self.seen: list[VersionStatus] = []
        self._changed = threading.Condition()
        self.manager: Manager[Loaded] = Manager(self._load, flags)
        self.manager.add_listener(self._note)
        self.manager.start()

    def _load(self, name: str, version: int, path: Path) -> Loaded:
        if version in self.gates:
            assert self.gates[version].wait(TIMEOUT)
        if self.failures.get(version):
            raise self.failures[version].pop(0)
        model = Loaded(version)
        self.models.append(model)
        return model

    def _note(self, name: str, status: VersionStatus) -> None:
        with self._changed:
            self.seen.append(status)
            self._changed.notify_all()

    def aspire(self, *versions: int) -> None:
        self.manager.set_aspired("m", dict.fromkeys(versions, PATH))

    def wait(self, version: int, state: State) -> None:
        with self._changed:
            assert self._changed.wait_for(
                lambda: any(status.version == version and status.state is state for status in self.seen),
                TIMEOUT,
            ), f"version {version} never reached {state.name}: {self.seen}"

    def states(self) -> dict[int, State]:
        return {status.version: status.state for status in self.manager.statuses("m")}


@pytest.fixture(params=[0, 2], ids=["own-thread", "pools"])
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    flags = ServerFlags(
        num_load_threads=request.param,
        num_unload_threads=request.param,
        max_num_load_retries=1,
        load_retry_interval_micros=10_000,
    )
    made = Harness(flags)
    yield made
    for gate in made.gates.values():
        gate.set()
    made.manager.stop()


def test_a_version_goes_through_its_states_in_order(harness: Harness) -> None:
    harness.aspire(1)
    harness.wait(1, State.AVAILABLE)
    harness.aspire()
    harness.wait(1, State.END)
    assert [status.state for status in harness.seen] == [
        State.START,
        State.LOADING,
        State.AVAILABLE,
        State.UNLOADING,
        State.END,
    ]
    assert harness.models[0].closed.is_set()


def test_the_old_version_serves_until_the_new_one_is_available(harness: Harness) -> None:
    harness.gates[2] = threading.Event()
    harness.aspire(1)
    harness.wait(1, State.AVAILABLE)
    harness.aspire(2)
    harness.wait(2, State.LOADING)
    with harness.manager.use("m") as model:
        assert model.version == 1
    assert harness.states() == {1: State.AVAILABLE, 2: State.LOADING}
    harness.gates[2].set()
    harness.wait(1, State.END)
    with harness.manager.use("m") as model:
        assert model.version == 2


def test_a_version_in_use_is_closed_only_after_its_last_request(harness: Harness) -> None:
    harness.aspire(1)
    harness.wait(1, State.AVAILABLE)
    with harness.manager.use("m", 1) as model:
        harness.aspire(2)
        harness.wait(1, State.UNLOADING)
        # Nobody new gets it, and whoever has it keeps it.
        with pytest.raises(NotFound, match=r"Servable not found for request: Specific\(m, 1\)"):
            harness.manager.use("m", 1)
        assert not model.closed.is_set()
    harness.wait(1, State.END)
    assert model.closed.is_set()


def test_requests_without_a_version_get_the_highest(harness: Harness) -> None:
    harness.aspire(3, 7, 5)
    for version in (3, 5, 7):
        harness.wait(version, State.AVAILABLE)
    with harness.manager.use("m") as latest, harness.manager.use("m", 5) as specific:
        assert (latest.version, specific.version) == (7, 5)
    assert harness.manager.available("m") == [3, 5, 7]


def test_an_unknown_model_is_not_found(harness: Harness) -> None:
    with (
        pytest.raises(NotFound, match=r"Servable not found for request: Latest\(x\)"),
        harness.manager.use("x"),
    ):
        pass


def test_a_failed_load_is_tried_again(harness: Harness) -> None:
    harness.failures[1] = [DataLoss("half a file")]
    harness.aspire(1)
    harness.wait(1, State.AVAILABLE)
    assert harness.manager.statuses("m") == [VersionStatus(1, State.AVAILABLE)]


def test_a_load_that_keeps_failing_ends_with_its_error_and_the_old_version_stays(harness: Harness) -> None:
    harness.aspire(1)
    harness.wait(1, State.AVAILABLE)
    failures = [DataLoss("half a file"), DataLoss("still half a file")]
    harness.failures[2] = list(failures)
    harness.aspire(2)
    harness.wait(2, State.END)
    old, new = harness.manager.statuses("m")
    assert old == VersionStatus(1, State.AVAILABLE)
    assert (new.state, new.error) == (State.END, failures[1])
    # Wanting it again changes nothing while it was wanted all along.
    harness.aspire(2)
    assert harness.states()[2] is State.END
    # Wanting it anew does.
    harness.aspire(1)
    harness.aspire(1, 2)
    harness.wait(2, State.AVAILABLE)


def test_an_unforeseen_error_of_a_load_is_reported_as_internal(harness: Harness) -> None:
    harness.failures[1] = [ValueError("oops"), ValueError("oops again")]
    harness.aspire(1)
    harness.wait(1, State.END)
    failed = harness.manager.wait_available(["m"], TIMEOUT)
    assert "ValueError: oops again" in failed["m"]


def test_a_version_that_is_no_longer_wanted_is_not_tried_again() -> None:
    harness = Harness(ServerFlags(num_load_threads=1, load_retry_interval_micros=3_600_000_000))
    harness.failures[1] = [DataLoss("half a file")]
    harness.aspire(1)
    harness.wait(1, State.LOADING)
    harness.aspire()
    harness.wait(1, State.END)
    harness.manager.stop()
    assert not harness.models


def test_waiting_for_a_model_tells_why_it_is_not_there(harness: Harness) -> None:
    harness.aspire(1)
    assert harness.manager.wait_available(["m"], TIMEOUT) == {}
    assert harness.manager.wait_available(["other"], 0.01) == {"other": "it has no version to load"}


def test_closing_waits_for_requests_and_closes_everything() -> None:
    harness = Harness(ServerFlags(num_load_threads=1, num_unload_threads=1))
    harness.aspire(1)
    harness.wait(1, State.AVAILABLE)
    closer = threading.Thread(target=harness.manager.stop)
    with harness.manager.use("m") as model:
        closer.start()
        harness.wait(1, State.UNLOADING)
        assert not model.closed.is_set()
    closer.join(TIMEOUT)
    assert model.closed.is_set()
    assert not closer.is_alive()


def test_many_swaps_under_concurrent_use_never_lend_a_closed_model() -> None:
    harness = Harness(ServerFlags(num_load_threads=1, num_unload_threads=1))
    harness.aspire(1)
    harness.wait(1, State.AVAILABLE)
    stop = threading.Event()
    wrong: list[str] = []

    def work() -> None:
        while not stop.is_set():
            with harness.manager.use("m") as model:
                if model.closed.is_set():
                    wrong.append(f"version {model.version} was closed while lent")

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for version in range(2, 40):
        harness.aspire(version)
        harness.wait(version, State.AVAILABLE)
        harness.wait(version - 1, State.END)
    stop.set()
    for worker in workers:
        worker.join(TIMEOUT)
    harness.manager.stop()
    assert not wrong
    assert all(model.closed.is_set() for model in harness.models)
