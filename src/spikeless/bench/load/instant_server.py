"""A server that answers every call at once with the same small answer.

``python -m spikeless.bench.load.instant_server PROTOCOL`` prints its port and serves
until it is terminated. The latency measured against it is the load generator's floor.
"""

from __future__ import annotations

import select
import socket
import sys
from collections.abc import Callable
from typing import Any, Protocol

import h11

from spikeless.bench.protocols import PROTOCOLS
from spikeless.formats.protos import predict_pb2
from spikeless.http2.end import Http2End
from spikeless.http2.frames import DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, frame
from spikeless.http2.headers import HeaderEncoder
from spikeless.openloop.connection import PREFIX


class _Speaker(Protocol):
    """One connection, without its socket."""

    def begin(self) -> bytes:
        """What is sent first."""

    def answer(self, content: bytes) -> bytes:
        """What is sent when these bytes have arrived."""


class _Grpc(Http2End[Any]):
    """It reads neither headers nor windows: the generator takes any answer."""

    def __init__(self) -> None:
        super().__init__({})
        answer = predict_pb2.PredictResponse()
        answer.model_spec.name = "floor"
        answer.model_spec.version.value = 1
        message = answer.SerializeToString()
        self._body = PREFIX.pack(0, len(message)) + message
        self._encoder = HeaderEncoder()
        self._preface = len(PREFACE)

    def begin(self) -> bytes:
        return self._said()

    def answer(self, content: bytes) -> bytes:
        content = self._rest + content
        if len(content) < self._preface:
            self._rest = content
            return b""
        self._read(content, self._preface)
        self._preface = 0
        return self._said()

    def _said(self) -> bytes:
        content = b"".join(self.output)
        self.output.clear()
        return content

    def _data(self, number: int, ends: bool, content: bytes, start: int, end: int) -> None:
        if ends:
            self.output += (
                frame(HEADERS, END_HEADERS, number, self._encoder.write(_HEAD)),
                frame(DATA, 0, number, self._body),
                frame(HEADERS, END_HEADERS | END_STREAM, number, self._encoder.write(_SUCCESS)),
            )

    def _headers(self, number: int, ends: bool, block: bytes) -> None: ...

    def _other(self, kind: int, number: int, flags: int, payload: bytes) -> None: ...

    def _setting(self, name: int, value: int) -> None: ...

    def _require_known(self, number: int) -> None: ...

    def _grown(self, stream: Any, is_valid: bool) -> None: ...


_HEAD = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_SUCCESS = ((b"grpc-status", b"0"),)


class _Http:
    _BODY = b'{"model_version": "1", "outputs": {"version": [1]}}'

    def __init__(self) -> None:
        self._connection = h11.Connection(h11.SERVER)

    def begin(self) -> bytes:
        return b""

    def answer(self, content: bytes) -> bytes:
        connection, sent = self._connection, b""
        connection.receive_data(content)
        while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.EndOfMessage):
                headers = [("Content-Type", "application/json"), ("Content-Length", str(len(self._BODY)))]
                for part in (
                    h11.Response(status_code=200, headers=headers),
                    h11.Data(self._BODY),
                    h11.EndOfMessage(),
                ):
                    sent += connection.send(part) or b""
                connection.start_next_cycle()
        return sent


def serve(listener: socket.socket, speaker: Callable[[], _Speaker]) -> None:
    """Answer calls on any number of connections, one at a time, for ever."""
    connections: dict[socket.socket, _Speaker] = {}
    while True:
        readable, _, _ = select.select([listener, *connections], [], [])
        for sock in readable:
            if sock is listener:
                accepted, _ = listener.accept()
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections[accepted] = speaker()
                accepted.sendall(connections[accepted].begin())
                continue
            try:
                content = sock.recv(1 << 18)
            except OSError:
                content = b""
            if not content:
                sock.close()
                del connections[sock]
                continue
            sock.sendall(connections[sock].answer(content))


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        serve(listener, _Http if PROTOCOLS[sys.argv[1]].is_http else _Grpc)


if __name__ == "__main__":
    main()
