"""The client's end of HTTP/2, against the h2 library as a server, and against a server
that breaks the protocol."""

import random
import struct
from collections.abc import Iterable

import h2.config
import h2.connection
import h2.events
import h2.settings
import hpack
import pytest

from spikeless.http2.client import Answer, Http2Client
from spikeless.http2.frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HAS_PRIORITY,
    HEADERS,
    PADDED,
    PING,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    BrokenProtocol,
    ErrorCode,
    frame,
)

_CALL = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/s/m"), (b":authority", b"a"))
_OK = [(b":status", b"200"), (b"content-type", b"application/grpc")]
_SUCCESS = [(b"grpc-status", b"0")]
_Settings = h2.settings.SettingCodes


class Server:
    """h2's end of a connection, which answers each call with its own body."""

    def __init__(self, settings: dict[h2.settings.SettingCodes | int, int] | None = None) -> None:
        self.http2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding=None)
        )
        self.http2.initiate_connection()
        self.http2.update_settings(settings or {})
        self.bodies: dict[int, bytearray] = {}
        self.headers: dict[int, list[tuple[bytes, bytes]]] = {}
        self.most = 0

    def hear(self, content: bytes) -> list[int]:
        """The streams whose calls are whole."""
        whole = []
        for event in self.http2.receive_data(content):
            if isinstance(event, h2.events.RequestReceived):
                self.headers[event.stream_id] = [(bytes(n), bytes(v)) for n, v in event.headers]
                self.bodies[event.stream_id] = bytearray()
                self.most = max(self.most, self.http2.open_inbound_streams)
            elif isinstance(event, h2.events.DataReceived):
                self.bodies[event.stream_id] += event.data
                self.http2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                whole.append(event.stream_id)
        return whole

    def answer(self, number: int, pad: int | None = None) -> None:
        self.http2.send_headers(number, _OK)
        body = bytes(self.bodies[number])
        for at in range(0, len(body), 10_000):
            self.http2.send_data(number, body[at : at + 10_000], pad_length=pad)
        self.http2.send_headers(number, _SUCCESS, end_stream=True)


def said(client: Http2Client) -> bytes:
    content = b"".join(client.output)
    client.output.clear()
    return content


def exchange(client: Http2Client, server: Server, pieces: random.Random | None = None) -> list[Answer]:
    """Until neither has anything to say; what the server says may come in pieces."""
    answers = []
    while content := said(client):
        for number in server.hear(content):
            server.answer(number)
        reply = server.http2.data_to_send()
        while reply:
            size = pieces.randint(1, 30_000) if pieces else len(reply)
            answers += client.receive(reply[:size])
            reply = reply[size:]
    return answers


def joined(answers: Iterable[Answer]) -> dict[int, bytes]:
    return {answer.tag: b"".join(answer.parts) for answer in answers}


@pytest.mark.parametrize("seed", range(10))
def test_calls_of_any_size_in_any_windows(seed: int) -> None:
    draw = random.Random(seed)
    settings: dict[h2.settings.SettingCodes | int, int] = {
        _Settings.INITIAL_WINDOW_SIZE: draw.choice([1, 1000, 65_535, 1 << 24]),
        _Settings.MAX_FRAME_SIZE: draw.choice([16_384, 1 << 20]),
        _Settings.MAX_CONCURRENT_STREAMS: draw.choice([1, 3, 100]),
        _Settings.HEADER_TABLE_SIZE: draw.choice([0, 200, 4096, 65_536]),
    }
    client, server = Http2Client(), Server(settings)
    exchange(client, server)
    small = settings[_Settings.INITIAL_WINDOW_SIZE] == 1
    sent = {tag: draw.randbytes(draw.choice([5, 5, 300 if small else 200_000])) for tag in range(30)}
    paths = [f"/s/{draw.choice('abc')}".encode() for _ in sent]
    for (tag, body), path in zip(sent.items(), paths, strict=True):
        client.call(tag, (*_CALL[:2], (b":path", path), *_CALL[3:]), body)
    answers = exchange(client, server, draw)
    assert joined(answers) == sent
    assert {answer.headers[b"grpc-status"] for answer in answers} == {b"0"}
    assert [dict(headers)[b":path"] for headers in server.headers.values()] == paths
    assert server.most <= settings[_Settings.MAX_CONCURRENT_STREAMS]
    assert client.waiting() == []


def test_settings_that_change_while_calls_run() -> None:
    client, server = Http2Client(), Server()
    exchange(client, server)
    client.call(0, _CALL, bytes(100_000))
    assert server.hear(said(client)) == []
    server.http2.update_settings({_Settings.INITIAL_WINDOW_SIZE: 10, _Settings.HEADER_TABLE_SIZE: 0})
    client.receive(server.http2.data_to_send())
    server.hear(said(client))
    # The window is below zero now, and h2 opens it again only when it is told to.
    server.http2.increment_flow_control_window(100_000, 1)
    client.receive(server.http2.data_to_send())
    client.call(1, _CALL, bytes(50))
    assert joined(exchange(client, server)) == {0: bytes(100_000), 1: bytes(50)}
    assert server.headers[1] == server.headers[3] == list(_CALL)


def test_a_ping_is_answered_and_padding_is_no_content() -> None:
    client, server = Http2Client(), Server()
    exchange(client, server)
    client.call(0, _CALL, b"body!")
    (number,) = server.hear(said(client))
    server.http2.ping(b"12345678")
    server.answer(number, pad=7)
    assert joined(client.receive(server.http2.data_to_send())) == {0: b"body!"}
    (event,) = server.http2.receive_data(said(client))
    assert isinstance(event, h2.events.PingAckReceived)


def test_headers_in_parts() -> None:
    client = Http2Client()
    client.call(0, _CALL, b"")
    block = hpack.Encoder().encode([*_OK, *_SUCCESS])
    content = frame(HEADERS, END_STREAM | PADDED | HAS_PRIORITY, 1, b"\x02\0\0\0\0\0" + block[:3] + b"\0\0")
    content += frame(CONTINUATION, 0, 1, block[3:9]) + frame(CONTINUATION, END_HEADERS, 1, block[9:])
    assert [client.receive(content[at : at + 1]) for at in range(len(content))].count([]) == len(content) - 1
    assert client.waiting() == []


def test_the_end_of_a_call_and_of_the_connection() -> None:
    client = Http2Client()
    for tag in (7, 8):
        client.call(tag, _CALL, b"")
    (answer,) = client.receive(frame(RST_STREAM, 0, 1, struct.pack(">I", ErrorCode.REFUSED_STREAM)))
    assert (answer.tag, answer.reset) == (7, ErrorCode.REFUSED_STREAM)
    assert client.receive(frame(RST_STREAM, 0, 1, bytes(4))) == [], "it is over"
    assert client.receive(frame(DATA, END_STREAM, 1, b"late")) == []
    assert client.receive(frame(GOAWAY, 0, 0, bytes(8))) == []
    assert client.ended
    assert client.waiting() == [8]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "too large"),
        (frame(DATA, 0, 3, b"x"), "not begun"),
        (frame(HEADERS, END_HEADERS, 2, b"\x88"), "not begun"),
        (frame(RST_STREAM, 0, 5, bytes(4)), "not begun"),
        (frame(RST_STREAM, 0, 1, bytes(3)), "wrong size"),
        (frame(SETTINGS, 0, 0, bytes(5)), "wrong size"),
        (frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), "window"),
        (frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4)), "push"),
        (frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff"), "header block"),
        (frame(HEADERS, 0, 1, b"\x88") + frame(PING, 0, 0, bytes(8)), "does not end"),
        (frame(HEADERS, 0, 1, b"") + frame(CONTINUATION, 0, 1, b"") * 64, "too large"),
        (frame(CONTINUATION, END_HEADERS, 1, b"\x88"), "of nothing"),
        (frame(DATA, PADDED, 1, b"\x05x"), "padding"),
        (frame(HEADERS, END_HEADERS | HAS_PRIORITY, 1, b"\x88"), "priority"),
    ],
)
def test_a_server_that_breaks_the_protocol(content: bytes, message: str) -> None:
    client = Http2Client()
    client.call(0, _CALL, b"")
    with pytest.raises(BrokenProtocol, match=message):
        client.receive(content)
