"""However a server is stopped, its process ends, also under requests."""

from __future__ import annotations

import functools
import http.client
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import in_progress, put_version
from machines import wait_for
from preloaded_server import serve, serve_and_break, serve_and_fail, serve_and_hang, serve_unread

from spikeless import launch
from spikeless.client import Client
from spikeless.errors import SpikelessError, Unavailable

X = {"x": np.array([1.0], np.float32)}
BODY = b'{"instances": [1.0]}'
SPIN = b'{"signature_name": "spin", "inputs": 1000000000}'


class Served:
    """A server that is starting, until its ports are asked for."""

    def __init__(self, process: BaseProcess, output: Connection, log: Path) -> None:
        self.process = process
        self._output = output
        self.log = log

    @functools.cached_property
    def ports(self) -> tuple[int, int]:
        """Those of gRPC and of REST, once it is ready for requests."""
        with os.fdopen(os.dup(self._output.fileno())) as output:
            lines = output.readline(), output.readline()
        assert all(lines), self.log_ends()
        grpc_port, rest_port = (int(line.rpartition(":")[2]) for line in lines)
        return grpc_port, rest_port

    def log_ends(self) -> str:
        """The beginning of its log and the end, where all of it is long."""
        with self.log.open("rb") as log:
            ends, size = log.read(20_000), log.seek(0, os.SEEK_END)
            if size > 20_000:
                log.seek(-10_000, os.SEEK_END)
                ends = ends[:10_000] + b"\n...\n" + log.read(10_000)
        return ends.decode(errors="replace")

    def client(self, timeout: float = 60) -> Client:
        return Client(f"127.0.0.1:{self.ports[0]}", timeout)

    def post(self, body: bytes) -> int:
        """The status of a ``:predict`` call over REST."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[1], timeout=60)
        try:
            connection.request("POST", "/v1/models/times:predict", body)
            return connection.getresponse().status
        finally:
            connection.close()

    def send(self, number: signal.Signals) -> None:
        """Signal it once it is ready."""
        assert self.process.pid is not None
        assert self.ports
        os.kill(self.process.pid, number)

    def exit_code(self, seconds: float) -> int | None:
        """The code that the process ends with; None when it has not by then."""
        self.process.join(seconds)
        return self.process.exitcode


Start = Callable[..., AbstractContextManager[Served]]


@pytest.fixture
def start(embedded: None, saved_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Servers forked from a process that has the libraries loaded: cheap to start."""
    put_version(saved_models / "times_one", tmp_path / "times", 1)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # of the fork server
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded_server"])

    @contextmanager
    def run(name: str, *flags: str, target: Callable[..., None] = serve) -> Iterator[Served]:
        log = tmp_path / f"{name}.log"
        reader, writer = context.Pipe(duplex=False)
        flags = (*flags, "--model_name=times", f"--model_base_path={tmp_path / 'times'}", "--port=0")
        process = context.Process(
            target=target, args=([*flags, f"--rest_api_port={launch.free_port()}"], writer, log)
        )
        process.start()
        writer.close()
        try:
            yield Served(process, reader, log)
        finally:
            process.kill()
            process.join()
            reader.close()

    return run


def ask_and_terminate(served: Served, over: threading.Event) -> None:
    """Send requests, then SIGTERM, and go on sending until the port is closed."""

    def ask(call: Callable[[], object]) -> None:
        with suppress(OSError, http.client.HTTPException, Unavailable):
            while not over.is_set():
                call()

    # Clients learn that the server goes: none tries until its deadline.
    with served.client(timeout=30) as client, ThreadPoolExecutor(2) as pool:
        assert [served.post(BODY) for _ in range(3)] == [200] * 3
        calls = (lambda: served.post(BODY), lambda: client.predict("times", X))
        asking = [pool.submit(ask, call) for call in calls]
        served.send(signal.SIGTERM)
        for asked in asking:
            asked.result()


@pytest.mark.timeout(1200)
def test_it_stops_under_requests_every_time(start: Start) -> None:
    """A hundred times, five servers at once; ``SPIKELESS_STOPS`` is another number."""
    # Processes are started and joined on one thread: multiprocessing wants it so.
    for batch in range(int(os.environ.get("SPIKELESS_STOPS", "100")) // 5):
        over = threading.Event()
        with ExitStack() as stack, ThreadPoolExecutor(5) as pool:
            servers = [stack.enter_context(start(f"{batch}-{number}", "--grace=60")) for number in range(5)]
            asking = [pool.submit(ask_and_terminate, served, over) for served in servers]
            codes = [served.exit_code(120) for served in servers]
            over.set()
            for asked in asking:
                asked.result()
            logs = [served.log_ends() for served, code in zip(servers, codes, strict=True) if code != 0]
            assert not logs, "\n\n".join(logs)


def test_a_part_that_fails_keeps_none_from_stopping(start: Start) -> None:
    with start("server", "--grace=60", target=serve_and_fail) as served:
        served.send(signal.SIGTERM)
        assert served.exit_code(120) == 1
        log = served.log.read_text()
        assert "{name: times version: 1}: END" in log, "what comes after it has stopped too"
        assert log.endswith("spikeless: error: while stopping: OSError: [Errno 9] Bad file descriptor\n")


def test_it_ends_when_it_cannot_answer_any_more(start: Start) -> None:
    with start("server", "--grace=60", target=serve_and_break) as served:
        with pytest.raises((OSError, http.client.HTTPException)):
            served.post(BODY)
        assert served.exit_code(120) == 1
        log = served.log.read_text()
        assert log.endswith("spikeless: error: OSError: [Errno 9] Bad file descriptor\n")
        assert log.count("Traceback") == 1


def test_a_part_that_hangs_is_cut_off_when_the_grace_is_over(start: Start) -> None:
    with start("server", "--grace=2", target=serve_and_hang) as served:
        served.send(signal.SIGTERM)
        assert served.exit_code(120) == 1
        assert "Timeout" in served.log.read_text(), "with what each thread was doing"


def test_a_log_that_nobody_reads_does_not_hold_it(start: Start) -> None:
    with start("server", "--grace=2", target=serve_unread) as served:
        served.send(signal.SIGTERM)
        assert served.exit_code(120) == -signal.SIGALRM


def test_calls_that_outlast_the_grace_are_cut_off(start: Start, tmp_path: Path) -> None:
    monitoring = tmp_path / "monitoring.config"
    monitoring.write_text("prometheus_config { enable: true }")
    flags = ("--grace=2", f"--monitoring_config_file={monitoring}")
    with start("server", *flags) as served, ThreadPoolExecutor() as pool, served.client() as client:
        steps = {"steps": np.array(10**9, np.int32)}
        calls: list[Future[Any]] = [
            pool.submit(client.predict, "times", steps, signature="spin"),
            pool.submit(served.post, SPIN),
        ]
        # A call that comes later is refused, and keeps nobody from stopping.
        address = f"127.0.0.1:{served.ports[1]}"
        wait_for(lambda: in_progress(address) == {"GRPC": 1, "REST": 1}, "both calls")
        served.send(signal.SIGTERM)
        assert served.exit_code(120) == 1
        assert all(isinstance(call.exception(60), SpikelessError | OSError) for call in calls)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(start: Start, second: signal.Signals) -> None:
    with start("server", "--grace=3600", target=serve_and_hang) as served:
        served.send(signal.SIGTERM)
        wait_for(lambda: "SIGTERM: calls in progress" in served.log.read_text(), "it to begin to stop")
        assert served.exit_code(0) is None
        served.send(second)
        assert served.exit_code(120) == 128 + second
