"""The open loop over HTTP/1.1, on servers whose stalls and faults are known exactly.

What is known is the server's own log, on the same clock, so that a slow machine changes
what happens but not whether it is reported.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_runs import publish_boston, write_requests
from click.testing import CliRunner
from harness import IS_EMBEDDED

from spikeless import bench, launch
from spikeless.cli import cli
from spikeless.errors import Code, InvalidArgument
from spikeless.openloop import http1
from spikeless.openloop.connection import Reply
from spikeless.openloop.http1 import HttpLink
from spikeless.openloop.loop import Call, OpenLoop
from spikeless.openloop.schedule import Schedule

Answer = Callable[["Handler", int], None]


class Handler(BaseHTTPRequestHandler):
    """Answers a body ``{"id": N}`` as the server was told to, and logs when."""

    protocol_version = "HTTP/1.1"
    server: Server
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self.arrived = time.monotonic()
        self.number = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["id"]
        try:
            self.server.how(self, self.number)
        except OSError:
            self.close_connection = True  # The client has hung up.

    def reply(self, status: int = 200, *headers: tuple[str, str]) -> None:
        body = b'{"outputs": {"version": [7]}}'
        self.server.log.append((self.number, self.arrived, time.monotonic()))
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, how: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.how = how
        #: The number of each request, when it arrived, and when its answer began.
        self.log: list[tuple[int, float, float]] = []
        self.accepted = 0
        #: Set when the test is over, so that nothing is held longer.
        self.over = threading.Event()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def get_request(self) -> Any:
        self.accepted += 1
        return super().get_request()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of these tests."""


@contextmanager
def serving(how: Answer) -> Iterator[Server]:
    with Server(how) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()


class Numbered(Call):
    def served_version(self, response: bytes) -> int:
        return int(json.loads(response)["outputs"]["version"][0])


def drive(target: str, rate: float, seconds: float, timeout: float = 60.0) -> dict[str, Any]:
    """The columns of a run whose requests have their own numbers."""
    offsets = Schedule(rate, seconds, "constant").offsets()
    calls = [Numbered("/ask", json.dumps({"id": number}).encode()) for number in range(len(offsets))]
    load = OpenLoop(offsets, calls, target, timeout, link=HttpLink)
    load.run(time.monotonic())
    columns = load.columns.ended()
    assert columns["request"].tolist() == list(range(len(offsets))), "each is sent once"
    return columns


def test_every_request_is_answered_over_few_connections() -> None:
    with serving(lambda handler, number: handler.reply()) as server:
        columns = drive(server.target, 200, 1)
    assert set(columns["code"]) == {Code.OK}
    assert set(columns["version"]) == {7}
    assert (columns["lag"] >= 0).all()
    assert (columns["latency"] >= columns["lag"]).all()
    assert sorted(number for number, _, _ in server.log) == list(range(200))
    assert http1.FIRST_CONNECTIONS <= server.accepted <= 200


def test_stalls_are_reported_for_every_request_that_was_due() -> None:
    """Everything is held until 30 requests wait, and one request alone for 0.3 s."""
    waiting = iter(range(30))
    released = threading.Event()

    def how(handler: Handler, number: int) -> None:
        if number == 20:
            handler.server.over.wait(0.3)
        if number >= 50 and next(waiting, 29) < 29:
            assert released.wait(60), "the loop goes on sending what is due"
        elif number >= 50:
            handler.server.over.wait(0.1)
            released.set()
        handler.reply()

    with serving(how) as server:
        columns = drive(server.target, 100, 1.2)
    assert set(columns["code"]) == {Code.OK}
    # The client counts from before the request leaves until after it is answered.
    held = {number: answered - arrived for number, arrived, answered in server.log}
    latency = columns["latency"]
    assert (latency >= [held[number] for number in range(len(latency))]).all()
    assert latency[20] >= 0.3
    assert sum(seconds >= 0.1 for seconds in held.values()) > 30
    assert server.accepted > http1.FIRST_CONNECTIONS


def test_calls_wait_here_when_all_connections_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "FIRST_CONNECTIONS", 1)
    monkeypatch.setattr(http1, "MOST_CONNECTIONS", 3)

    def how(handler: Handler, number: int) -> None:
        if number < 3:
            handler.server.over.wait(0.4)
        handler.reply()

    with serving(how) as server:
        columns = drive(server.target, 100, 0.5)
    assert set(columns["code"]) == {Code.OK}
    assert server.accepted <= 3
    # Number 3 was due at 0.03 s and had to wait until one of the first was answered.
    assert columns["latency"][3] >= 0.35


def test_servers_that_close_each_connection() -> None:
    with serving(lambda handler, number: handler.reply(200, ("Connection", "close"))) as server:
        columns = drive(server.target, 100, 0.5)
    assert set(columns["code"]) == {Code.OK}
    assert server.accepted == 50


def test_a_connection_that_was_closed_while_idle_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http1, "FIRST_CONNECTIONS", 1)
    closed = threading.Event()

    def how(handler: Handler, number: int) -> None:
        handler.reply()
        handler.close_connection = True  # Without a word of it in the answer.

    with serving(how) as server:
        shut = server.shutdown_request

        def shutdown_request(request: Any) -> None:
            shut(request)
            closed.set()

        server.shutdown_request = shutdown_request  # type: ignore[method-assign]
        link = HttpLink(server.target, 60.0)
        for tag in range(3):
            closed.clear()
            assert link.send(tag, "/ask", b'{"id": 1}') == []
            assert ended(link) == [Reply(tag, Code.OK, b'{"outputs": {"version": [7]}}')]
            assert closed.wait(60)
        link.close()
    assert server.accepted == 3


def ended(link: HttpLink) -> list[Reply]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := [reply for reply, _ in link.exchange(0.1)]:
            return found
    raise AssertionError("nothing was answered")


@pytest.mark.parametrize(("status", "code"), [*http1.STATUS_CODES.items(), (418, Code.UNKNOWN)])
def test_statuses_are_those_of_the_server(status: int, code: Code) -> None:
    with serving(lambda handler, number: handler.reply(status if number % 2 else 201)) as server:
        columns = drive(server.target, 100, 0.1)
    assert set(columns["code"][::2]) == {Code.OK}
    assert set(columns["code"][1::2]) == {code}
    assert set(columns["version"][1::2]) == {0}


def test_answers_in_chunks_until_the_end_of_the_connection_and_broken_ones() -> None:
    body = b'{"outputs": {"version": [9]}}'
    answers = [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n" + body[:5] + b"\r\n"
        b"18\r\n" + body[5:] + b"\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n" + body,
        b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n" + body,
        b"SSH-2.0-OpenSSH_9\r\n\r\n",
        b"",
    ]

    def how(handler: Handler, number: int) -> None:
        handler.wfile.write(answers[number % len(answers)])
        handler.close_connection = True

    with serving(how) as server:
        columns = drive(server.target, 100, 0.2)
    codes = columns["code"].reshape(-1, len(answers))
    assert set(codes[:, :2].flat) == {Code.OK}
    assert set(codes[:, 2:].flat) == {Code.UNAVAILABLE}
    assert set(columns["version"].reshape(-1, len(answers))[:, :2].flat) == {9}


def test_nobody_listens() -> None:
    target = f"127.0.0.1:{launch.free_port()}"
    assert set(drive(target, 200, 0.2)["code"]) == {Code.UNAVAILABLE}
    with pytest.raises(InvalidArgument, match="is no address"):
        HttpLink("http://127.0.0.1", 1.0)


def test_a_call_is_given_up_at_its_deadline() -> None:
    def how(handler: Handler, number: int) -> None:
        if number == 5:
            handler.server.over.wait()
        handler.reply()

    with serving(how) as server:
        offsets = np.arange(20) / 100
        calls = [Numbered("/ask", json.dumps({"id": number}).encode()) for number in range(20)]
        load = OpenLoop(offsets, calls, server.target, 1.0, link=HttpLink)
        load.run(time.monotonic())
        columns = load.columns.ended()
    assert columns["code"][5] == Code.DEADLINE_EXCEEDED
    assert columns["latency"][5] >= 1.0
    assert Code.OK in columns["code"]


# On model servers ---------------------------------------------------------------------

PROTOCOLS = ("rest", "open-inference") if IS_EMBEDDED else ("rest",)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_swaps_measured_over_http(protocol: str, saved_models: Path, tmp_path: Path) -> None:
    models, source = publish_boston(saved_models / "signatures", tmp_path), tmp_path / "source"
    options = ["--models", models, "--out", tmp_path / "raw", "--publish", source, "--protocol", protocol]
    options += ["--rate", 50, "--duration", "13s", "--settle", "1s", "--timeout", "60s", "--publish-at", "3s"]
    arguments = ["bench", "run", "boston", *options, "--json"]
    done = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["codes"] == {"OK": len(Schedule(50, 13).offsets())}
    assert [reload["new_version"] for reload in answer["reloads"]] == [2]
    # Only Open Inference says which version answered.
    assert set(answer["served"]) == ({"1", "2"} if protocol == "open-inference" else set())
    run = bench.read_run(answer["result"])
    assert run.facts.settings.protocol == protocol
    assert run.facts.server.rest_target
    assert run.facts.floor is not None


def test_a_server_that_does_not_speak_the_protocol_is_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launch.ENGINE_VARIABLE, "/nowhere/tensorflow_model_server")
    places = ["--models", str(tmp_path / "models"), "--out", str(tmp_path / "raw")]
    done = CliRunner().invoke(cli, ["bench", "run", "boston", *places, "--protocol", "open-inference"])
    assert done.exit_code == 2
    assert "TensorFlow Serving, which SPIKELESS_SERVER names, does not speak it" in done.output
    assert "--server with one that does" in done.output
    assert not [*tmp_path.iterdir()]


def test_the_address_of_a_running_server(saved_models: Path, tmp_path: Path) -> None:
    models = publish_boston(saved_models / "signatures", tmp_path)
    settings = launch.LaunchSettings("boston", models / "boston", rest=True)
    with launch.start(settings) as server:
        load = ["--rate", "50", "--duration", "1s", "--settle", "0s", "--timeout", "60s", "--no-floor"]
        common = ["bench", "run", "boston", "--models", models, "--server", server.target, *load]
        common += ["--out", tmp_path / "raw", "--protocol", "rest", "--json"]
        asked = ["--rest-server", f"127.0.0.1:{server.rest_port}"]
        done = CliRunner().invoke(cli, list(map(str, [*common, *asked])), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert set(json.loads(done.stdout)["codes"]) == {"OK"}
        elsewhere = [*common, *asked, "--url-path", "/v1/models/nobody:predict"]
        done = CliRunner().invoke(cli, list(map(str, elsewhere)), catch_exceptions=False)
        assert set(json.loads(done.stdout)["codes"]) == {"NOT_FOUND"}
        done = CliRunner().invoke(cli, list(map(str, common)))
        assert done.exit_code == 2
        assert "--rest-server is for --server with a protocol over HTTP" in done.output


def test_the_same_requests_as_columns(tmp_path: Path) -> None:
    requests = bench.read_requests(write_requests(tmp_path / "w", 1, 8), "a model", "rest")
    assert {request.path for request in requests} == {"/v1/models/a%20model:predict"}
    assert [request.rows for request in requests] == [1, 8]
