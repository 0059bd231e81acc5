"""Several workers behind the same ports: one server, as its callers see it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import IS_EMBEDDED, Running, model_config, put_version, refused, run_server
from promotion_models import NAME, Load, flawless, served

from spikeless import channels, client
from spikeless.bench.servers import running_server
from spikeless.client import Client
from spikeless.disk import proc
from spikeless.engine.flags import ServerFlags
from spikeless.engine.workers import pool as pools
from spikeless.engine.workers.pages import Pages
from spikeless.engine.workers.pool import WorkerPool
from spikeless.engine.workers.view import View
from spikeless.errors import Code, InvalidArgument, SpikelessError, Unavailable
from spikeless.formats.states import State
from spikeless.rollout import local_servers

pytestmark = pytest.mark.skipif(not IS_EMBEDDED, reason="TensorFlow Serving has no workers")
WORKERS = 2
#: As many connections reach every worker, but for one in a million times.
CONNECTIONS = 20


@pytest.fixture(autouse=True)
def own_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each client gets a connection of its own, which chance gives to a worker."""
    options = [*channels.CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    monkeypatch.setattr(client, "channel", partial(channels.channel, options=options))


@pytest.fixture
def models(scales: Path, tmp_path: Path) -> Path:
    models = tmp_path / "models"
    put_version(scales / "1", models / NAME, 1)
    return models


@pytest.fixture
def running(models: Path, tmp_path: Path) -> Iterator[Running]:
    monitoring = tmp_path / "monitoring.config"
    monitoring.write_text("prometheus_config { enable: true }")
    flags = (
        f"--workers={WORKERS}",
        f"--monitoring_config_file={monitoring}",
        "--file_system_poll_wait_seconds=0.1",
        "--max_num_load_retries=0",
        "--grpc_max_threads=32",
        "--grace=60",
    )
    settings: dict[str, Any] = {"model_name": NAME, "model_base_path": models / NAME, "rest": True}
    with run_server(tmp_path / "log", *flags, **settings) as running:
        yield running


def workers(running: Running) -> list[psutil.Process]:
    return psutil.Process(running.server.pid).children()


def answers_of(running: Running, ask: Callable[[Client], Any]) -> list[Any]:
    """What all workers answer."""
    answers = []
    for _ in range(CONNECTIONS):
        with Client(running.server.target, timeout=60.0) as client:
            answers.append(ask(client))
    return answers


def everywhere(running: Running, ask: Callable[[Client], Any]) -> Any:
    """The answer that all workers give."""
    answers = answers_of(running, ask)
    assert all(answer == answers[0] for answer in answers), answers
    return answers[0]


def told_everywhere(running: Running, ask: Callable[[Client], Any], answer: Any) -> None:
    """Wait until all workers say so: they hear of new states one after another."""
    running.server.wait_for(
        lambda: all(one == answer for one in answers_of(running, ask)), f"all to say {answer}", timeout=60.0
    )


def states_of(client: Client) -> dict[int, State]:
    return {status.version: status.state for status in client.statuses(NAME)}


def metrics(running: Running) -> dict[str, float]:
    page = urllib.request.urlopen(f"{running.rest_url}/monitoring/prometheus/metrics", timeout=60).read()
    samples = [line.rpartition(" ") for line in page.decode().splitlines() if not line.startswith("#")]
    assert len({series for series, _, _ in samples}) == len(samples), "each series is there once"
    return {series: float(value) for series, _, value in samples}


def test_workers_change_versions_together_under_load(running: Running, scales: Path, models: Path) -> None:
    """Promotion by label and rollback, at any worker; no call fails."""
    target = running.server.target

    def configure(versions: list[int], stable: int) -> None:
        policy = {"specific": {"versions": versions}}
        config = model_config(
            (NAME, models / NAME), model_version_policy=policy, version_labels={"stable": stable}
        )
        with Client(target, timeout=60.0) as client:
            client.reload_config(config)

    configure([1], 1)
    put_version(scales / "2", models / NAME, 2)
    with Load(target, threads=8) as load:
        for versions, stable in (([1, 2], 1), ([1, 2], 2), ([2], 2), ([1, 2], 2), ([1, 2], 1), ([1], 1)):
            configure(versions, stable)
            running.wait(NAME, dict.fromkeys(versions, State.AVAILABLE))
            assert everywhere(running, lambda client: served(client, label="stable")) == stable
            assert everywhere(running, served) == max(versions)
            service = f"{NAME}/{versions[0]}"
            told_everywhere(running, partial(Client.is_serving, service=service), True)
            load.sees(max(versions))
    assert not load.failures, load.failures[:5]
    assert load.factors == {1.0, 2.0}
    with refused(Code.INVALID_ARGUMENT, "has no name"):
        running.client.reload_config(model_config(("", models)))
    assert everywhere(running, served) == 1


def test_a_broken_version_is_served_by_no_worker(running: Running, models: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "saved_model.pb").write_bytes(b"no model")
    with flawless(running.server.target, labels=("",)) as load:
        put_version(broken, models / NAME, 2)
        running.wait(NAME, {1: State.AVAILABLE, 2: State.END})
        told_everywhere(running, states_of, {1: State.AVAILABLE, 2: State.END})
        assert everywhere(running, served) == 1
    assert load.factors <= {1.0}
    (error,) = {status.error.code for status in running.client.statuses(NAME) if status.error}
    assert (
        metrics(running)[f'spikeless_load_failures_total{{model_name="{NAME}",status="{error.name}"}}'] == 1
    )


def test_a_killed_worker_is_replaced_and_nobody_else_notices(
    running: Running, scales: Path, models: Path
) -> None:
    """It serves what the others do, and what was counted stays."""
    target = running.server.target
    put_version(scales / "2", models / NAME, 2)
    running.wait(NAME, {2: State.AVAILABLE})
    with Load(target, threads=8, labels=("",)) as load:
        while len(load.answers) < 1:
            assert not load.failures
        before = metrics(running)
        killed, *_ = workers(running)
        killed.kill()

        def replaced() -> bool:
            log = running.server.log_path.read_text(errors="replace")
            return log.count("Running gRPC ModelServer") == WORKERS + 1

        running.server.wait_for(replaced, "the worker to come back", timeout=60.0)
        assert everywhere(running, served) == 2
        after = metrics(running)
        failures = list(load.failures)
        put_version(scales / "3", models / NAME, 3)
        running.wait(NAME, {3: State.AVAILABLE})
        assert everywhere(running, served) == 3
    # What was in progress there, at most one call of each caller, and what that caller
    # called until gRPC connected again: who tries before the kernel has closed the
    # killed worker's port is to wait for a second.
    assert len(load.outages) <= 8, load.outages
    assert load.failures == failures, "none once there are as many workers again"
    assert all("StatusCode" not in failure for failure in load.failures)
    count = f':tensorflow:serving:request_count{{model_name="{NAME}",status="OK"}}'
    assert before[count] < after[count]
    assert len(workers(running)) == WORKERS
    assert killed.pid not in {worker.pid for worker in workers(running)}


def test_metrics_and_memory_are_those_of_all_workers(running: Running) -> None:
    calls = CONNECTIONS
    everywhere(running, served)
    count = f':tensorflow:serving:request_count{{model_name="{NAME}",status="OK"}}'
    for _ in range(4):
        page = metrics(running)
        assert page[count] == calls
        assert page[f'spikeless_version_state{{model_name="{NAME}",state="AVAILABLE",version="1"}}'] == 1
    pid = running.server.pid
    each = [proc.private_memory(member) for member in proc.family(pid)]
    assert len(each) == WORKERS + 1
    assert proc.server_memory(pid)["RssAnon"] > 1.5 * max(each)
    assert page["spikeless_memory_private_bytes"] > 1.5 * max(each)
    assert proc.server_of(pid) == pid, "which leads the workers, and is small"
    assert not any("libtensorflow" in file.path for file in proc.mapped_files(pid))
    found = local_servers.find(running.server.target)
    assert found is not None
    assert found.pid == pid
    facts = running_server(running.server.target, NAME)
    assert (facts.pid, facts.engine) == (pid, "embedded")


def test_all_workers_drain(running: Running) -> None:
    processes = [psutil.Process(running.server.pid), *workers(running)]
    assert running.server.stop(grace=60.0) == 0
    assert not psutil.wait_procs(processes, timeout=60)[1]


@pytest.mark.parametrize("signals", [(signal.SIGKILL,), (signal.SIGTERM, signal.SIGTERM)])
def test_workers_end_with_the_process_that_leads_them(
    models: Path, tmp_path: Path, signals: tuple[signal.Signals, ...]
) -> None:
    settings: dict[str, Any] = {"model_name": NAME, "model_base_path": models / NAME}
    flags = (f"--workers={WORKERS}", "--grace=300", "--drain=300")
    with run_server(tmp_path / "log", *flags, **settings) as running:
        processes = workers(running)
        assert len(processes) == WORKERS
        for count, number in enumerate(signals, 1):
            os.kill(running.server.pid, number)
            if count < len(signals):  # Two at once would be one.
                running.server.wait_for(
                    lambda: "answering for 300 s" in running.server.log_tail(), "it to drain", timeout=60.0
                )
        assert not psutil.wait_procs(processes, timeout=60)[1]


def test_a_taken_port_and_a_shared_socket_are_refused(models: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "spikeless",
        "serve",
        f"--workers={WORKERS}",
        f"--model_base_path={models}",
    ]
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run([*command, f"--port={port}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    done = subprocess.run([*command, "--grpc_socket_path=x"], capture_output=True, text=True, timeout=120)
    assert "--grpc_socket_path cannot be shared" in done.stderr


# --- workers that fail as they are told, without TensorFlow ---------------------------


class Scripted:
    """A pool of `scripted_worker`s, and what they have seen."""

    def __init__(self, seen: Path, monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
        self._seen = seen
        self.failures: list[SpikelessError] = []
        self.failed = threading.Event()
        for name, value in {"SEEN": str(seen), "WHO": "", **environment}.items():
            monkeypatch.setenv(name, value)
        script = Path(__file__).parents[1] / "support" / "scripted_worker.py"
        self.pool = WorkerPool(ServerFlags(workers=WORKERS), {}, View, self._fail)
        self.pool._command = [sys.executable, str(script)]
        self.pool.start()

    def _fail(self, error: SpikelessError) -> None:
        self.failures.append(error)
        self.failed.set()

    def seen(self) -> Counter[str]:
        return Counter(self._seen.read_text().splitlines() if self._seen.exists() else [])

    def wait(self, line: str, times: int = 1) -> None:
        deadline = time.monotonic() + 60
        while self.seen()[line] < times:
            assert time.monotonic() < deadline, self.seen()
            time.sleep(0.01)

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.terminate()
        assert self.pool.wait(60)


def test_a_version_that_one_worker_cannot_load_is_served_by_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Scripted(tmp_path / "seen", monkeypatch, WHO="1", FAILS="bad") as scripted:
        scripted.pool.load("good", 1, tmp_path)
        scripted.pool.listen()
        with pytest.raises(SpikelessError, match="worker 1 cannot load bad") as caught:
            scripted.pool.load("bad", 1, tmp_path)
        assert caught.value.code is Code.INVALID_ARGUMENT
        seen = scripted.seen()
        assert seen["1 load bad 1"] == 1
        assert not [line for line in seen if "serve bad" in line]
        if seen["0 load bad 1"]:
            assert seen["0 unload bad 1"] == 1
        scripted.pool.load("good", 2, tmp_path)
        assert (scripted.seen()["0 serve good 2"], scripted.seen()["1 serve good 2"]) == (1, 1)


def test_a_version_that_kills_takes_down_one_worker_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried once more; the worker comes back with the others' versions."""
    with Scripted(tmp_path / "seen", monkeypatch, WHO="0,1", DIES="deadly") as scripted:
        served = scripted.pool.load("good", 1, tmp_path)
        scripted.pool.listen()
        with pytest.raises(Unavailable, match="workers that loaded version 1 of deadly ended"):
            scripted.pool.load("deadly", 1, tmp_path)
        deaths = scripted.seen()
        assert sum(deaths[f"{number} load deadly 1"] for number in range(WORKERS)) == 2
        for number in range(WORKERS):
            ended = deaths[f"{number} load deadly 1"]
            scripted.wait(f"{number} serve good 1", 1 + ended)
            scripted.wait(f"{number} listen", 1 + min(1, ended))
        served.close()
        assert all(scripted.seen()[f"{number} unload good 1"] == 1 for number in range(WORKERS))
        assert not scripted.failures


def test_workers_that_always_end_end_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Scripted(tmp_path / "seen", monkeypatch) as scripted:
        scripted.pool._command = [sys.executable, "-c", "raise SystemExit(3)"]
        scripted.pool.listen()
        for worker in list(scripted.pool._running.values()):
            worker.process.kill()
        assert scripted.failed.wait(60)
        assert f"ended {pools.MAX_ENDS} times, the last with code 3" in str(scripted.failures[0])


def test_pages_are_added_up() -> None:
    head = "# HELP calls Calls.\n# TYPE calls counter\n"
    gauges = "# HELP state It.\n# TYPE state gauge\n"
    one = f'{head}calls{{model="a"}} 3.0\n{gauges}state{{model="a"}} 1.0\n'
    two = f'{head}calls{{model="a"}} 4.0\ncalls{{model="b"}} 1.0\n{gauges}state{{model="a"}} 1.0\n'
    pages = Pages()
    total = f'{head}calls{{model="a"}} 7.0\ncalls{{model="b"}} 1.0\n{gauges}state{{model="a"}} 1.0\n'
    assert pages.total([one, two]) == total
    pages.end(two)
    assert pages.total([one]) == total, "what an ended worker has counted stays"
    pages.forget('model="b"')
    assert pages.total([one]) == total.replace('calls{model="b"} 1.0\n', "")


def test_what_ends_a_line_too_early_or_too_late(tmp_path: Path) -> None:
    """Who sends no messages is given up; who sends wrong ones is told."""
    from spikeless.engine.workers.connection import Disconnected, PeerConnection

    def fail() -> None:
        raise InvalidArgument("no")

    ours, theirs = socket.socketpair()
    closed = threading.Event()
    here = PeerConnection(ours, {"fail": fail}, closed=closed.set)
    there = PeerConnection(theirs, {"fail": fail, "wait": closed.wait})
    here.start()
    there.start()
    with pytest.raises(SpikelessError, match="no"):
        here.call("fail").result(60)
    with pytest.raises(SpikelessError, match="KeyError"):
        here.call("nothing").result(60)
    waiting = here.call("wait")
    theirs.sendall(b"no message\n")
    assert closed.wait(60)
    with pytest.raises(Disconnected):
        waiting.result(60)
    with pytest.raises(Disconnected):
        here.call("fail").result(60)
