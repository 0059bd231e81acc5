"""The HTTP server alone: slow clients, limits, draining."""

from __future__ import annotations

import http.client
import os
import queue
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

from spikeless.engine.flags import ServerFlags
from spikeless.engine.rest_server import RestLimits, RestServer
from spikeless.errors import Unavailable

LARGE = b"x" * (64 << 20)


class Application:
    """``/large`` is 64 MB, ``/gate`` waits for the gate, anything else is ``ok``."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        environ["wsgi.input"].read()
        self.entered.release()
        if environ["PATH_INFO"] == "/gate":
            assert self.gate.wait(60)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [LARGE if environ["PATH_INFO"] == "/large" else b"ok"]


@contextmanager
def running(application: Application, **limits: Any) -> Iterator[tuple[RestServer, int]]:
    server = RestServer(application, ServerFlags(rest_api_num_threads=1), RestLimits(**limits))
    try:
        yield server, server.start()
    finally:
        application.gate.set()
        server.stop(5.0)


def get(port: int, path: str = "/") -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    assert response.status == 200
    return response.read()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def test_a_reader_that_does_not_read_holds_no_worker() -> None:
    application = Application()
    with running(application) as (_, port), connect(port) as lazy:
        lazy.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        assert application.entered.acquire(timeout=60)
        # The only worker is free again although the answer is still on this side.
        assert get(port) == b"ok"


def test_a_small_answer_comes_in_one_piece() -> None:
    with running(Application()) as (_, port), connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        received = connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert received.endswith(b"\r\n\r\nok")


def test_a_large_answer_arrives() -> None:
    with running(Application()) as (_, port):
        assert get(port, "/large") == LARGE


def test_a_request_that_drips_is_given_up() -> None:
    with running(Application(), receive_timeout=0.5) as (_, port), connect(port) as drip:
        drip.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        drip.settimeout(0.05)
        closed = False
        while not closed:
            try:
                drip.sendall(b"x")
                closed = drip.recv(1) == b""
            except TimeoutError:
                pass
            except OSError:
                closed = True
        assert get(port) == b"ok"


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nHost:"])
def test_a_connection_on_which_nothing_happens_is_closed(start: bytes) -> None:
    with (
        running(Application(), idle_timeout=1) as (_, port),
        connect(port) as idle,
        suppress(ConnectionError),  # where it was closed before anything was sent
    ):
        idle.sendall(start)
        assert idle.recv(1) == b""


def test_a_body_over_the_limit_is_refused() -> None:
    application = Application()
    with running(application, max_request_bytes=1000) as (_, port):
        for header in (b"Content-Length: 5000", b"Transfer-Encoding: chunked"):
            with connect(port) as connection:
                body = b"1388\r\n" + b"x" * 5000 + b"\r\n0\r\n\r\n" if b"chunked" in header else b"x" * 5000
                connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n\r\n" + body)
                assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
        assert not application.entered.acquire(blocking=False), "it never got as far as the application"


@pytest.mark.parametrize("address", [b"//[", b"http://[x/"])
def test_half_an_address_is_refused(address: bytes) -> None:
    application = Application()
    with running(application) as (_, port), connect(port) as connection:
        connection.sendall(b"GET " + address + b" HTTP/1.1\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")
    assert not application.entered.acquire(blocking=False), "it never got as far as the application"


def test_too_many_headers_are_refused() -> None:
    with running(Application()) as (_, port), connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * (1 << 19) + b"\r\n\r\n")
        assert b" 431 " in connection.recv(1000)


def test_urgent_data_is_worth_no_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with running(Application()) as (_, port), connect(port) as urgent:
        urgent.send(b"!", socket.MSG_OOB)
        assert [get(port) for _ in range(10)] == [b"ok"] * 10
        urgent.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert urgent.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
    assert not caplog.messages


def test_without_a_descriptor_connections_wait_and_nothing_spins(caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with running(Application()) as (_, port), ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in range(3)]
        probe = os.dup(0)
        os.close(probe)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(probe, *(one.fileno() for one in clients)) + 1, hard))
        try:
            with suppress(OSError):
                while True:
                    stack.callback(os.close, os.dup(0))
            for client in clients:
                client.settimeout(60)
                client.connect(("127.0.0.1", port))
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            # Nobody answers: that is a wait of two looks at the full process.
            clients[0].settimeout(2.5)
            began, used = time.monotonic(), time.process_time()
            with pytest.raises(TimeoutError):
                clients[0].recv(1)
            assert time.process_time() - used < (time.monotonic() - began) / 2
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for client in clients:
            client.settimeout(60)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert [record.message for record in caplog.records if "connections wait" in record.message] == [
        "REST connections wait: Too many open files; raise the limit of open files (ulimit -n)"
    ]


def test_stopping_lets_a_request_end_and_takes_no_other() -> None:
    application = Application()
    with running(application) as (server, port), connect(port) as kept:
        kept.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert application.entered.acquire(timeout=60)
        received = b""
        while not received.endswith(b"ok"):
            received += kept.recv(1000)
        answers: list[bytes] = []
        client = threading.Thread(target=lambda: answers.append(get(port, "/gate")))
        client.start()
        assert application.entered.acquire(timeout=60)
        stopping = threading.Thread(target=server.stop, args=(60.0,))
        stopping.start()

        def refused() -> bool:
            try:
                connect(port).close()
            except OSError:
                return True
            return False

        while not refused():
            assert stopping.is_alive()
        # A connection from before gets no further request in.
        kept.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        application.gate.set()
        client.join(60)
        stopping.join(60)
        assert answers == [b"ok"]
        assert not application.entered.acquire(blocking=False)


def test_stopping_does_not_wait_longer_than_the_grace() -> None:
    application = Application()
    server = RestServer(application, ServerFlags(rest_api_num_threads=1))
    port = server.start()
    with connect(port) as connection:
        connection.sendall(b"GET /gate HTTP/1.1\r\nHost: x\r\n\r\n")
        assert application.entered.acquire(timeout=60)
        server.stop(0.1)
        assert connection.recv(1) == b""
    application.gate.set()


def test_a_loop_that_fails_closes_everything_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: queue.SimpleQueue[Exception] = queue.SimpleQueue()
    server = RestServer(Application(), ServerFlags(), failed=failures.put)
    port = server.start()
    with connect(port) as connection:
        error = OSError(9, "Bad file descriptor")
        monkeypatch.setattr(RestServer, "_poll", lambda self: (_ for _ in ()).throw(error))
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert failures.get(timeout=60) is error
        with suppress(ConnectionResetError):
            while connection.recv(65536):
                pass
    with pytest.raises(ConnectionRefusedError):
        connect(port)
    server.stop(60.0)


def test_a_port_that_is_taken() -> None:
    with (
        running(Application()) as (_, port),
        pytest.raises(Unavailable, match=f"cannot listen on 127.0.0.1:{port}"),
    ):
        RestServer(Application(), ServerFlags(rest_api_port=port)).start()
