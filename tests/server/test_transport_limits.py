"""What one client of the gRPC server can take from others: little."""

from __future__ import annotations

import itertools
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
import hpack
import pytest

from spikeless.engine.transport import http2 as http2_module
from spikeless.engine.transport.http2 import Http2
from spikeless.engine.transport.limits import Allowance
from spikeless.http2.frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    MAX_WINDOW,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    BrokenProtocol,
    ErrorCode,
    frame,
)

PING_FRAME = frame(PING, 0, 0, bytes(8))
FIELDS = ((b":method", b"POST"), (b":path", b"/a.B/Echo"), (b"te", b"trailers"))
BLOCK = hpack.Encoder().encode(FIELDS)
REQUEST = struct.pack(">BI", 0, 1) + b"x"
#: Many more frames than a client may send for nothing.
MANY = 30_000


def connection(now: Callable[[], float] = lambda: 0.0) -> Http2:
    """One that has begun, with a clock of its own."""
    http2 = Http2(Allowance(now))
    http2.receive(PREFACE + frame(SETTINGS, 0, 0))
    return http2


def call(number: int, flags: int = END_STREAM) -> bytes:
    return frame(HEADERS, END_HEADERS, number, BLOCK) + frame(DATA, flags, number, REQUEST)


def receive_all(http2: Http2, parts: Iterable[bytes], answer: bytes = b"") -> None:
    """Receive them; with ``answer``, each is a call that gets this answer."""
    for part in parts:
        streams = http2.receive(part)
        if answer:
            http2.answer(streams[0], answer)


def numbers() -> Iterator[int]:
    return itertools.count(3, 2)


def repeated(part: bytes) -> Iterator[bytes]:
    return itertools.repeat(part, MANY)


FLOODS: dict[str, Callable[[], Iterator[bytes]]] = {
    "pings": lambda: repeated(PING_FRAME),
    "answers to pings": lambda: repeated(frame(PING, 1, 0, bytes(8))),
    "settings": lambda: repeated(frame(SETTINGS, 0, 0)),
    "windows": lambda: repeated(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1))),
    "priorities": lambda: repeated(frame(PRIORITY, 0, 1, bytes(5))),
    "unknown frames": lambda: repeated(frame(11, 0, 0)),
    "empty data": lambda: repeated(frame(DATA, 0, 1)),
    "trailers": lambda: repeated(frame(HEADERS, END_HEADERS | END_STREAM, 1, BLOCK)),
    "resets": lambda: (
        call(number) + frame(RST_STREAM, 0, number, bytes(4))
        for number in itertools.islice(numbers(), MANY)
    ),
    "no requests": lambda: (
        frame(HEADERS, END_HEADERS, number, b"\x82") for number in itertools.islice(numbers(), MANY)
    ),
    "continuations": lambda: itertools.chain(
        [frame(HEADERS, 0, 3, BLOCK)], repeated(frame(CONTINUATION, 0, 3))
    ),
}  # fmt: skip


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_ends_the_connection(flood: str) -> None:
    http2 = connection()
    http2.receive(call(1, flags=0))
    with pytest.raises(BrokenProtocol) as broken:
        receive_all(http2, FLOODS[flood]())
    assert broken.value.code is ErrorCode.ENHANCE_YOUR_CALM
    http2.output.clear()
    http2.refuse(broken.value.code)
    assert http2.output[0][3] == GOAWAY
    assert http2.output[0][-1] == ErrorCode.ENHANCE_YOUR_CALM


def test_a_client_that_gets_on_may_go_on() -> None:
    """By calls that are answered, or by time."""
    http2 = connection()
    http2.receive(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", MAX_WINDOW >> 1)))
    for number in itertools.islice(numbers(), MANY):
        (stream,) = http2.receive(call(number))
        http2.receive(3 * PING_FRAME)
        http2.answer(stream, b"x")
        http2.output.clear()
    seconds = itertools.count()
    http2 = connection(lambda: float(next(seconds)))
    for _ in range(MANY):
        http2.receive(PING_FRAME)
        http2.output.clear()


def test_what_a_connection_makes_the_server_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2_module, "MAX_HELD", 1 << 20)
    monkeypatch.setattr(http2_module, "_LOOK_AFTER", 1 << 16)
    parts = [
        frame(HEADERS, END_HEADERS, number, BLOCK) + frame(DATA, 0, number, bytes(16_000))
        for number in itertools.islice(numbers(), 100)
    ]
    http2 = connection()
    receive_all(http2, parts[: (1 << 20) // 16_100])
    with pytest.raises(BrokenProtocol, match="held") as broken:
        receive_all(http2, parts[(1 << 20) // 16_100 :])
    assert broken.value.code is ErrorCode.ENHANCE_YOUR_CALM
    # Answers that the client does not let go.
    http2 = connection()
    http2.receive(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0)))
    with pytest.raises(BrokenProtocol, match="held"):
        receive_all(http2, map(call, itertools.islice(numbers(), 1000)), answer=bytes(16_000))


def test_small_parts_take_no_more_than_their_bytes() -> None:
    http2 = connection()
    (stream,) = http2.receive(frame(HEADERS, END_HEADERS, 1, BLOCK))
    content = bytes(range(256)) * 256
    for at in range(len(content)):
        http2.receive(frame(DATA, 0, 1, content[at : at + 1]))
    assert b"".join(stream.received) == content
    assert len(stream.received) == len(content) // 4096


def test_windows_that_open_again() -> None:
    """Of a connection, of a stream, and of all streams by the last setting."""
    for opening in (
        frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 5000)),
        frame(SETTINGS, 0, 0, struct.pack(">HIHI", 4, 1, 4, 5000)),
    ):
        http2 = connection()
        http2.receive(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0)))
        (stream,) = http2.receive(call(1))
        http2.answer(stream, bytes(4000))
        assert not stream.closed
        http2.receive(opening)
        assert stream.closed
    http2 = connection()
    http2.receive(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, MAX_WINDOW)))
    streams = http2.receive(call(1) + call(3))
    for stream in streams:
        http2.answer(stream, bytes(50_000))
    assert [stream.closed for stream in streams] == [True, False]
    http2.receive(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)))
    assert not streams[1].closed
    http2.receive(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 50_000)))
    assert streams[1].closed


SERVER = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
import grpc
from spikeless.engine.transport import FastServer

def limit(most):
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

if sys.argv[1] == "before":
    limit(64)
server = FastServer(ThreadPoolExecutor(1), 1, {}, failed=print)
echo = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", {"Echo": echo}),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
if sys.argv[1] == "after":
    limit(32)
print(port, flush=True)
sys.stdin.read()
server.stop(0).wait()
"""


@pytest.fixture(params=["before", "after"])
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of a server that knew how few descriptors it has, or runs out of them."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, request.param],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_more_connections_than_there_are_descriptors(port: int) -> None:
    def greeted(sock: socket.socket) -> bool:
        try:
            return bool(sock.recv(9))
        except ConnectionResetError:
            return False

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        echo: Any = channel.unary_unary("/a.B/Echo", None, None)
        assert echo(b"x", timeout=60) == b"x"
        others = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(64)]
        found = [greeted(sock) for sock in others]
        assert found.count(True) in range(8, 60)
        assert found == sorted(found, reverse=True)
        assert echo(b"x", timeout=60) == b"x"
        for sock in others:
            sock.close()
    while True:  # until the server has noticed
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            if greeted(sock):
                return
