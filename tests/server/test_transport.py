"""The server of small latency answers as grpcio's own does, whatever a client sends."""

from __future__ import annotations

import collections
import contextlib
import gzip
import math
import random
import select
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import hpack
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeless.engine.transport import Context, FastServer
from spikeless.engine.transport import peer as peer_module
from spikeless.engine.transport import server as server_module
from spikeless.engine.transport.http2 import Http2
from spikeless.http2.frames import (
    DATA,
    GOAWAY,
    PING,
    PREFACE,
    SETTINGS,
    BrokenProtocol,
    ErrorCode,
    frame,
)
from spikeless.http2.frames import HEADERS as HEADERS_FRAME

PATH = "/a.B/Echo"
HEADERS = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", PATH.encode()),
    (b":authority", b"x"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
)
LIMIT = 100_000
PLACES = 3


class Methods:
    """What the servers under test can be asked."""

    def __init__(self) -> None:
        self.held = threading.Event()
        self.threads: set[str] = set()
        self.metadata: list[Any] = []

    def echo(self, request: bytes, context: Any) -> bytes:
        if isinstance(context, Context):
            context.may_be_inline = True
        self.threads.add(threading.current_thread().name)
        self.metadata = sorted(context.invocation_metadata())
        if request == b"fail":
            raise ValueError("no")
        if request == b"abort":
            context.abort(grpc.StatusCode.NOT_FOUND, "ä, 100 %\n")
        if request == b"set":
            context.set_code(grpc.StatusCode.ABORTED)
            context.set_details("set")
        if request.endswith(b"hold"):
            self.held.wait(60)
        return request

    def count(self, request: bytes, context: Any) -> Iterator[bytes]:
        for number in range(int(request)):
            yield str(number).encode()

    def double(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for request in requests:
            yield 2 * request

    def join(self, requests: Iterator[bytes], context: Any) -> bytes:
        return b"".join(requests)


def read(content: bytes) -> bytes:
    if content == b"bad":
        raise ValueError(content)
    return content


def write(content: bytes) -> bytes:
    if content == b"mute":
        raise ValueError(content)
    return content


LOOPS = {"grpc-loop", "grpc-standby"}
Start = Callable[..., tuple[int, Methods]]


@pytest.fixture(params=["grpcio", "fast"])
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Servers of either kind, to hold one against the other."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: _start(stack, request.param, options)


@pytest.fixture
def fast() -> Iterator[Start]:
    with contextlib.ExitStack() as stack:
        yield lambda **options: _start(stack, "fast", options)


def _start(
    stack: contextlib.ExitStack, kind: str, options: Mapping[str, int], address: str = "127.0.0.1:0"
) -> tuple[int, Methods]:
    methods = Methods()
    given = {
        "grpc.max_receive_message_length": LIMIT,
        **{f"grpc.{key}": value for key, value in options.items()},
    }
    pool = stack.enter_context(ThreadPoolExecutor(PLACES))
    server: grpc.Server
    if kind == "fast":
        server = FastServer(pool, PLACES, given, failed=lambda error: pytest.fail(str(error)))
    else:
        server = grpc.server(pool, maximum_concurrent_rpcs=PLACES, options=list(given.items()))
    handlers = {
        "Echo": grpc.unary_unary_rpc_method_handler(methods.echo, read, write),
        "Count": grpc.unary_stream_rpc_method_handler(methods.count),
        "Double": grpc.stream_stream_rpc_method_handler(methods.double),
        "Join": grpc.stream_unary_rpc_method_handler(methods.join),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.B", handlers),))
    servicer = health.HealthServicer()
    servicer.set("x", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    methods.health = servicer  # type: ignore[attr-defined]
    methods.server = server  # type: ignore[attr-defined]
    port = server.add_insecure_port(address)
    server.start()
    stack.callback(lambda: server.stop(0).wait())
    stack.callback(methods.held.set)
    return port, methods


def message(content: bytes, flag: int = 0) -> bytes:
    return struct.pack(">BI", flag, len(content)) + content


def frames(sock: socket.socket) -> Iterator[bytes]:
    """Those that arrive until the connection is closed; nothing is read ahead."""
    while head := _read(sock, 9):
        yield head + _read(sock, int.from_bytes(head[:3], "big"))


def _read(sock: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size and (part := sock.recv(size - len(content))):
        content += part
    return content


def raw(port: int, headers: tuple[tuple[bytes, bytes], ...], body: bytes) -> list[Any]:
    """What comes back for one stream, or how it is refused."""
    configuration = h2.config.H2Configuration(
        header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False
    )
    connection = h2.connection.H2Connection(configuration)
    connection.initiate_connection()
    connection.send_headers(1, headers)
    connection.send_data(1, body, end_stream=True)
    found: list[Any] = []
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        while True:
            sock.sendall(connection.data_to_send())
            content = sock.recv(65536)
            if not content:
                return [*found, "end"]
            for event in connection.receive_data(content):
                if isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
                    kept = (b":status", b"grpc-status", b"grpc-message")
                    found += [(name, value) for name, value in event.headers if name in kept and value]
                elif isinstance(event, h2.events.DataReceived):
                    found.append(event.data)
                elif isinstance(event, h2.events.StreamReset):
                    return [*found, event.error_code]
                elif isinstance(event, h2.events.StreamEnded):
                    return found


def without(name: bytes) -> tuple[tuple[bytes, bytes], ...]:
    return tuple(header for header in HEADERS if header[0] != name)


def status(code: int, text: str) -> list[Any]:
    return [(b":status", b"200"), (b"grpc-status", str(code).encode()), (b"grpc-message", text.encode())]


def unary(channel: grpc.Channel, path: str = PATH) -> grpc.UnaryUnaryMultiCallable[bytes, bytes]:
    return channel.unary_unary(path, None, None)


# Without a time: both are in names of tests, which must not change.
GZIPPED = message(gzip.compress(bytes(200_000), mtime=0), 1)
TOO_LARGE = "SERVER: Received message larger than max ({} vs. 100000)"
OK = [(b":status", b"200"), message(b"x"), (b"grpc-status", b"0")]
BROTLI, GZIP, DEFLATE = (b"grpc-encoding", b"br"), (b"grpc-encoding", b"gzip"), (b"grpc-encoding", b"deflate")
NO_REQUEST = status(12, "\"b'/a.B/Echo'\" requires exactly one request message.")


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        (HEADERS, message(b"x"), OK),
        (without(b"content-type"), message(b"x"), OK),
        (((b":method", b"GET"), *HEADERS[1:]), message(b"x"), [2]),
        (without(b"te"), message(b"x"), [2]),
        (without(b":path"), message(b"x"), [2]),
        (HEADERS, message(b"x", 1), status(13, "Compression bit set but no encoding configured")),
        ((*HEADERS, GZIP), message(gzip.compress(b"x", mtime=0), 1), OK),
        ((*HEADERS, DEFLATE), message(zlib.compress(b"x"), 1), OK),
        ((*HEADERS, GZIP), message(b"x"), OK),
        ((*HEADERS, GZIP), message(b"x", 1), status(13, "Decompression failed due to data error")),
        ((*HEADERS, GZIP), GZIPPED, status(8, "Decompressed message larger than max")),
        ((*HEADERS, BROTLI), message(b"x"), status(13, "Error parsing 'grpc-encoding' metadata")),
        ((*HEADERS, (b"grpc-timeout", b"5x")), b"", status(13, "Error parsing 'grpc-timeout' metadata")),
        ((*HEADERS, (b"grpc-timeout", b"60S")), message(b"x"), OK),
        ((*HEADERS, (b"grpc-timeout", b"0n")), message(b"x"), status(4, "Deadline Exceeded")),
        (HEADERS, b"", NO_REQUEST),
        (HEADERS, b"\0\0\0", NO_REQUEST),
        (HEADERS, b"\0\0\0\0\5ab", NO_REQUEST),
        (HEADERS, struct.pack(">BI", 0, 200_000), status(8, TOO_LARGE.format(200_000))),
    ],
)  # fmt: skip
def test_what_a_client_may_send(
    start: Start, headers: tuple[tuple[bytes, bytes], ...], body: bytes, expected: list[Any]
) -> None:
    port, _ = start()
    assert raw(port, headers, body) == expected


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except grpc.RpcError as error:
        return error.code().name, error.details()


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"x", b"x"),
        (b"", b""),
        (b"bad", ("INTERNAL", "Exception deserializing request!")),
        (b"mute", ("INTERNAL", "Failed to serialize response!")),
        (b"fail", ("UNKNOWN", "Exception calling application: no")),
        (b"abort", ("NOT_FOUND", "ä, 100 %\n")),
        (b"set", ("ABORTED", "set")),
        (bytes(LIMIT), bytes(LIMIT)),
        (bytes(LIMIT + 1), ("RESOURCE_EXHAUSTED", TOO_LARGE.format(100_001))),
    ],
)  # fmt: skip
def test_what_a_method_may_do(start: Start, request_: bytes, expected: Any) -> None:
    port, _ = start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for _ in range(3):  # the first may run on another thread than the others
            assert outcome(lambda: unary(channel)(request_, timeout=60)) == expected


def test_methods_that_there_are_not(start: Start) -> None:
    port, _ = start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for path in ("/a.B/None", "/c.D/Echo"):
            found = outcome(lambda path=path: unary(channel, path)(b"x", timeout=60))  # type: ignore[misc]
            assert found == ("UNIMPLEMENTED", "Method not found!")


def test_streams(start: Start) -> None:
    port, _ = start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert list(channel.unary_stream("/a.B/Count", None, None)(b"1000", timeout=60)) == [
            b"%d" % n for n in range(1000)
        ]
        parts = [b"%d" % number for number in range(3)]
        assert list(channel.stream_stream("/a.B/Double", None, None)(iter(parts), timeout=60)) == [
            2 * part for part in parts
        ]
        assert channel.stream_unary("/a.B/Join", None, None)(iter(parts), timeout=60) == b"012"


def test_what_is_watched_and_left(fast: Start) -> None:
    port, methods = fast()
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="x")
        watching = [stub.Watch(request, timeout=60) for _ in range(2)]
        assert [next(each).status for each in watching] == 2 * [serving]
        for each in watching[1:]:
            each.cancel()
        methods.health.set("x", not_serving)  # type: ignore[attr-defined]
        assert next(watching[0]).status == not_serving
        callbacks = methods.health._send_response_callbacks  # type: ignore[attr-defined]
        wait_for(lambda: len(callbacks["x"]) == 1, "those who left to be forgotten")
        watching[0].cancel()


def wait_for(state: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not state():
        assert time.monotonic() < deadline, f"waited for {what}"
        threading.Event().wait(0.01)


def test_metadata_reaches_the_method(start: Start) -> None:
    port, methods = start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        sent: tuple[tuple[str, str | bytes], ...] = (("key", "value"), ("key-bin", b"\0\1\xff"))
        for _ in range(2):
            unary(channel)(b"x", metadata=sent, timeout=60)
            assert [pair for pair in methods.metadata if pair[0].startswith("key")] == [*sent]


def test_places_are_limited(start: Start) -> None:
    port, methods = start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        calls = [unary(channel).future(b"hold", timeout=60) for _ in range(PLACES + 1)]
        wait_for(lambda: any(call.done() for call in calls), "a call to be refused")
        methods.held.set()
        codes = sorted(call.code().name for call in calls)
        assert codes == [*PLACES * ["OK"], "RESOURCE_EXHAUSTED"]
        (refused,) = [call for call in calls if call.code() is not grpc.StatusCode.OK]
        assert refused.details() == "Concurrent RPC limit exceeded!"


def test_a_deadline_ends_a_call_that_runs(start: Start) -> None:
    port, _ = start()
    headers = (*HEADERS, (b"grpc-timeout", b"100m"))
    assert raw(port, headers, message(b"hold")) == status(4, "Deadline Exceeded")


@pytest.mark.parametrize("window", [10, 65535])
def test_the_clients_window_is_respected(fast: Start, window: int) -> None:
    """A message comes in pieces that a slow reader lets through."""
    port, _ = fast()
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
    connection.initiate_connection()
    connection.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
    content = random.Random(1).randbytes(70_000)
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        connection.send_headers(1, HEADERS)
        body, sent, done = message(content), 0, False
        while not done:
            while sent < len(body) and (
                size := min(connection.local_flow_control_window(1), 16384, len(body) - sent)
            ):
                connection.send_data(1, body[sent : sent + size], end_stream=sent + size == len(body))
                sent += size
            sock.sendall(connection.data_to_send())
            for event in connection.receive_data(sock.recv(65536)):
                if isinstance(event, h2.events.DataReceived):  # h2 refuses more than it has allowed
                    received += event.data
                    connection.increment_flow_control_window(len(event.data))
                    with contextlib.suppress(h2.exceptions.StreamClosedError):  # that was the last
                        connection.increment_flow_control_window(len(event.data), 1)
                done = done or isinstance(event, h2.events.StreamEnded)
    assert received == body


def test_quick_calls_stay_on_the_loop(fast: Start) -> None:
    port, methods = fast()
    request = b"\x0a\x01x"
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = unary(channel)
        wait_for(lambda: bool(call(request, timeout=60)) and "grpc-loop" in methods.threads, "the loop")


def test_a_call_that_takes_long_after_all_holds_nobody(fast: Start) -> None:
    port, methods = fast()
    request = b"\x0a\x01x"
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = unary(channel)
        for _ in range(3):
            methods.held.clear()
            methods.threads.clear()
            wait_for(
                lambda: (
                    bool(call(request, timeout=60)) and bool(methods.threads & {"grpc-loop", "grpc-standby"})
                ),
                "the loop to answer",
            )
            slow = call.future(request + b"hold", timeout=60)
            assert call(request, timeout=60) == request
            assert not slow.done()
            methods.held.set()
            assert slow.result() == request + b"hold"


def test_connections_have_an_age(fast: Start) -> None:
    port, methods = fast(max_connection_age_ms=200, max_connection_age_grace_ms=60_000)
    block = hpack.Encoder().encode(HEADERS)
    kinds = []
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        call = frame(HEADERS_FRAME, 4, 1, block) + frame(DATA, 1, 1, message(b"hold"))
        sock.sendall(PREFACE + frame(SETTINGS, 0, 0) + call)
        for content in frames(sock):
            kinds.append(content[3])
            if content[3] == PING:
                sock.sendall(frame(PING, 1, 0, content[9:]))
                methods.held.set()
    # It goes when the call has its answer, and says before that it will.
    assert [kind for kind in kinds if kind in (PING, GOAWAY)] == [GOAWAY, PING, GOAWAY]
    assert kinds.index(DATA) > kinds.index(GOAWAY)


@pytest.mark.parametrize("beginning", [b"", PREFACE[:5], PREFACE, PREFACE + frame(PING, 0, 0, bytes(8))])
def test_a_client_that_does_not_begin_is_not_kept(start: Start, beginning: bytes) -> None:
    port, _ = start(server_handshake_timeout_ms=200)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=60) as sock,
        contextlib.suppress(ConnectionError),
    ):
        sock.sendall(beginning)
        while sock.recv(4096):
            pass  # what the server says until it closes


def test_a_client_has_two_minutes_to_begin(fast: Start) -> None:
    port, methods = fast()
    handshakes = methods.server._handshakes  # type: ignore[attr-defined]
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock, sock.makefile("rb") as file:
        wait_for(lambda: bool(handshakes._ends), "the connection")
        assert 0 < handshakes.next - time.monotonic() <= 120
        sock.sendall(PREFACE + frame(SETTINGS, 0, 0) + frame(PING, 0, 0, b"is there"))
        received = b""
        while b"is there" not in received:
            received += file.read(1)
        wait_for(lambda: not handshakes._ends, "the handshake to count")
        assert handshakes.next == math.inf


def last_frame(sock: socket.socket) -> bytes:
    """What the server said before it closed."""
    return collections.deque(frames(sock), maxlen=1).pop()


@pytest.mark.parametrize(
    ("broken", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", ErrorCode.PROTOCOL_ERROR),
        (PREFACE + frame(SETTINGS, 0, 0) + b"\xff" * 9, ErrorCode.FRAME_SIZE_ERROR),
    ],
    ids=["HTTP/1", "frame"],
)
def test_a_client_reads_what_it_did_wrong(
    fast: Start, monkeypatch: pytest.MonkeyPatch, broken: bytes, code: ErrorCode
) -> None:
    """Whatever it goes on to send: a reset would take the answer away."""
    monkeypatch.setattr(server_module, "_LINGER_SECONDS", 60.0)
    port, methods = fast()
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            sock.sendall(broken + bytes(2 << 20))
            goaway = last_frame(sock)
        assert (goaway[3], goaway[-1]) == (GOAWAY, code)
    wait_for(lambda: not methods.server._clients, "the connections to end")  # type: ignore[attr-defined]


def test_calls_end_with_a_client_that_broke_the_protocol(fast: Start) -> None:
    port, methods = fast()
    call = frame(HEADERS_FRAME, 4, 1, hpack.Encoder().encode(HEADERS)) + frame(DATA, 1, 1, message(b"hold"))
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(PREFACE + frame(SETTINGS, 0, 0) + call)
        wait_for(lambda: bool(methods.threads), "the call to begin")
        sock.sendall(b"\xff" * 9)
        assert last_frame(sock)[3] == GOAWAY
        (client,) = methods.server._clients.values()  # type: ignore[attr-defined]
        wait_for(lambda: not client.calls, "the call to be forgotten")
        methods.held.set()  # its answer goes nowhere
    wait_for(lambda: not methods.server._clients, "the connection to end")  # type: ignore[attr-defined]


def test_a_client_that_broke_the_protocol_is_not_kept(fast: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_LINGER_SECONDS", 0.2)
    port, methods = fast()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(bytes(24))
        assert last_frame(sock)[3] == GOAWAY
        wait_for(lambda: not methods.server._clients, "the connection to end")  # type: ignore[attr-defined]


def test_a_client_that_broke_the_protocol_is_not_heard_for_ever(
    fast: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_LINGER_SECONDS", 600.0)
    monkeypatch.setattr(peer_module, "_MOST_DROPPED", 1 << 20)
    port, _ = fast()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock, pytest.raises(ConnectionError):
        sock.sendall(bytes(256 << 20))


def test_stopping_lets_calls_end(fast: Start) -> None:
    port, methods = fast()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = unary(channel).future(b"hold", timeout=60)
        wait_for(lambda: bool(methods.threads), "the call to begin")
        stopping = methods.server.stop(60)  # type: ignore[attr-defined]
        methods.held.set()
        assert call.result() == b"hold"
        assert stopping.wait(60)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def skip_to(sock: socket.socket, kind: int) -> None:
    assert kind in (content[3] for content in frames(sock))


@pytest.mark.parametrize("is_young", [True, False])
def test_a_client_that_has_just_connected_is_not_told_to_go_before_its_first_call(
    fast: Start, monkeypatch: pytest.MonkeyPatch, is_young: bool
) -> None:
    """One of gRPC's that reads it while it connects would not hear, but spin."""
    monkeypatch.setattr(peer_module, "_CONNECT_SECONDS", math.inf if is_young else 0.0)
    port, methods = fast()
    call = frame(HEADERS_FRAME, 4, 1, hpack.Encoder().encode(HEADERS)) + frame(DATA, 1, 1, message(b"x"))
    address = "127.0.0.1", port
    with (
        socket.create_connection(address, timeout=60) as first,
        socket.create_connection(address, timeout=60) as second,
    ):
        for sock in (first, second):
            sock.sendall(PREFACE + frame(SETTINGS, 0, 0))
            for _ in ("its own", "that it has those of the client"):
                skip_to(sock, SETTINGS)
        second.sendall(call)
        skip_to(second, DATA)
        methods.server.stop(60)  # type: ignore[attr-defined]
        # Whoever came before this one has been looked at.
        skip_to(second, GOAWAY)
        has_heard = bool(select.select([first], [], [], 0)[0])
        assert has_heard != is_young
        first.sendall(call)
        left = {GOAWAY, DATA}
        for content in frames(first):
            left.discard(content[3])
            if not left:
                break
        assert not left, "the connection is closed"


def test_a_socket_that_was_left_behind(tmp_path: Any) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with contextlib.ExitStack() as stack:
        _start(stack, "fast", {}, f"unix:{path}")
        with grpc.insecure_channel(f"unix:{path}") as channel:
            assert unary(channel)(b"x", timeout=60) == b"x"


FRAMES = st.builds(
    frame,
    st.integers(0, 11),
    st.sampled_from([0, 1, 4, 5, 8, 0x20, 0x2D, 0xFF]),
    st.integers(0, 7),
    st.one_of(
        st.binary(max_size=40),
        st.just(b"\x83\x86\x44\x01/\x40\x02te\x08trailers"),
        st.just(message(b"abc")),
        st.integers(0, (1 << 32) - 1).map(lambda number: struct.pack(">I", number)),
    ),
)


@settings(max_examples=500, deadline=None)
@given(frames=st.lists(FRAMES, max_size=20), cut=st.integers(1, 50))
def test_any_frames(frames: list[bytes], cut: int) -> None:
    """They are understood or refused, and it does not matter how they are cut."""

    def outcome_of(parts: list[bytes]) -> tuple[Any, ...]:
        http2 = Http2()
        try:
            for part in parts:
                http2.receive(part)
        except BrokenProtocol as broken:
            return broken.code, str(broken)
        streams = {
            number: (b"".join(stream.received), stream.ended) for number, stream in http2.streams.items()
        }
        return streams, b"".join(http2.output)

    content = PREFACE + b"".join(frames)
    whole = outcome_of([content])
    assert outcome_of([content[at : at + cut] for at in range(0, len(content), cut)]) == whole
