"""A server that answers every call at once with the same small answer.

``python -m spikeless.bench.load.instant_server PROTOCOL`` prints its port and serves
until it is terminated. The latency measured against it is the load generator's floor.
"""

from __future__ import annotations

import select
import socket
import sys
from collections.abc import Callable
from typing import Protocol

import h2.events
import h11

from spikeless.bench.protocols import PROTOCOLS
from spikeless.formats.protos import predict_pb2
from spikeless.openloop.http2 import PREFIX, server_side


class _Speaker(Protocol):
    """One connection, without its socket."""

    def begin(self) -> bytes:
        """What is sent first."""

    def answer(self, content: bytes) -> bytes:
        """What is sent when these bytes have arrived."""


class _Grpc:
    def __init__(self) -> None:
        self._connection = server_side()
        answer = predict_pb2.PredictResponse()
        answer.model_spec.name = "floor"
        answer.model_spec.version.value = 1
        message = answer.SerializeToString()
        self._body = PREFIX.pack(0, len(message)) + message

    def begin(self) -> bytes:
        self._connection.initiate_connection()
        return self._connection.data_to_send()

    def answer(self, content: bytes) -> bytes:
        connection = self._connection
        for event in connection.receive_data(content):
            if isinstance(event, h2.events.DataReceived):
                connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                headers = [(b":status", b"200"), (b"content-type", b"application/grpc")]
                connection.send_headers(event.stream_id, headers)
                connection.send_data(event.stream_id, self._body)
                connection.send_headers(event.stream_id, [(b"grpc-status", b"0")], end_stream=True)
        return connection.data_to_send()


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
