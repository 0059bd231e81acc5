"""A server that answers every gRPC call at once with the same PredictResponse.

``python -m spikeless.bench.load.instant_server`` prints its port and serves until it is
terminated. The latency measured against it is the load generator's floor.
"""

from __future__ import annotations

import select
import socket

import h2.connection
import h2.events

from spikeless.formats.protos import predict_pb2
from spikeless.openloop.http2 import PREFIX, configuration


def serve(listener: socket.socket) -> None:
    """Answer calls on any number of connections, one at a time, for ever."""
    answer = predict_pb2.PredictResponse()
    answer.model_spec.name = "floor"
    answer.model_spec.version.value = 1
    message = answer.SerializeToString()
    body = PREFIX.pack(0, len(message)) + message
    connections: dict[socket.socket, h2.connection.H2Connection] = {}
    while True:
        readable, _, _ = select.select([listener, *connections], [], [])
        for sock in readable:
            if sock is listener:
                accepted, _ = listener.accept()
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = h2.connection.H2Connection(configuration(client_side=False))
                connection.initiate_connection()
                accepted.sendall(connection.data_to_send())
                connections[accepted] = connection
                continue
            connection = connections[sock]
            try:
                content = sock.recv(1 << 18)
            except OSError:
                content = b""
            if not content:
                sock.close()
                del connections[sock]
                continue
            for event in connection.receive_data(content):
                if isinstance(event, h2.events.DataReceived):
                    connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    headers = [(b":status", b"200"), (b"content-type", b"application/grpc")]
                    connection.send_headers(event.stream_id, headers)
                    connection.send_data(event.stream_id, body)
                    connection.send_headers(event.stream_id, [(b"grpc-status", b"0")], end_stream=True)
            sock.sendall(connection.data_to_send())


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        serve(listener)


if __name__ == "__main__":
    main()
