"""A gRPC server with stalls of known height, width and time, which logs what it holds.

    python benchmarks/stalling_server.py TIMETABLE LOG

TIMETABLE is a JSON file of `Timetable`. The server prints its port and serves until
SIGTERM; then LOG has what happened to every request, by the server's own clock. SIGUSR1
begins the next swap of versions. Everything is answered by one thread that never
sleeps, and a request that is held is read when it arrives.

A request is a Predict whose input ``id`` is its number. Numbers from `BYSTANDERS` on
begin no stall, and are never held alone.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings

from spikeless.disk import children
from spikeless.formats import tfrecord
from spikeless.formats.protos import get_model_status_pb2, predict_pb2, prediction_log_pb2
from spikeless.openloop.connection import PREFIX

MODEL = "stalls"
BYSTANDERS = 1 << 32
_STATUS = "/tensorflow.serving.ModelService/GetModelStatus"
_State = get_model_status_pb2.ModelVersionStatus.State


def server_side() -> h2.connection.H2Connection:
    """A server's end of HTTP/2, of another make than the generator's.

    A client may have any number of calls open: a generator that got no processor for a
    moment sends all that is due at once.
    """
    settings = h2.config.H2Configuration(
        client_side=False,
        header_encoding=None,
        # Both ends are ours, and checking takes time.
        validate_inbound_headers=False,
        normalize_inbound_headers=False,
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
    )
    connection = h2.connection.H2Connection(settings)
    most = {h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: (1 << 31) - 1}
    connection.local_settings = h2.settings.Settings(client=False, initial_values=most)
    return connection


@dataclass(frozen=True)
class Stall:
    """Requests are held from `at` on."""

    #: Seconds after the first request, or after the beginning of a swap.
    at: float
    seconds: float
    #: Whether every request that arrives meanwhile is held until the end, or only the
    #: next one, for so long. Either begins when the next request arrives, so that its
    #: height is exactly known.
    everyone: bool
    #: The swap that it belongs to, from 0; None: none.
    swap: int | None = None


@dataclass(frozen=True)
class Timetable:
    """What the server does when."""

    stalls: Sequence[Stall]
    #: From the beginning of a swap until the new version is AVAILABLE; the old one ends
    #: as much later.
    swap_seconds: float = 0.3


@dataclass(frozen=True)
class Held:
    """What happened to a request. Times are those of ``time.monotonic``."""

    id: int
    arrived: float
    answered: float
    #: The number of the stall that held it; None: none did.
    stall: int | None

    @property
    def seconds(self) -> float:
        return self.answered - self.arrived


@contextmanager
def started(timetable: Timetable, log: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run the server; gives its address and process. `log` is whole after the block."""
    plan = log.with_suffix(".timetable.json")
    plan.write_text(json.dumps(dataclasses.asdict(timetable)))
    with children.serving([sys.executable, __file__, str(plan), str(log)]) as (port, process):
        yield f"127.0.0.1:{port}", process


def read_log(log: Path) -> dict[int, Held]:
    """What happened to each request, by its number."""
    return {held["id"]: Held(**held) for held in map(json.loads, log.read_text().splitlines())}


def write_requests(path: Path, count: int) -> Path:
    """`count` different requests to replay, each with its own number."""
    records = []
    for number in range(count):
        log = prediction_log_pb2.PredictionLog()
        log.predict_log.request.CopyFrom(request(number))
        records.append(log.SerializeToString())
    tfrecord.write(path, records)
    return path


def request(number: int) -> predict_pb2.PredictRequest:
    message = predict_pb2.PredictRequest()
    message.model_spec.name = MODEL
    message.inputs["id"].int64_val.append(number)
    return message


class _Call:
    """One call on its way in or out."""

    def __init__(self, sock: socket.socket, stream: int, path: str) -> None:
        self.sock, self.stream, self.path = sock, stream, path
        self.body = bytearray()


class _Server:
    def __init__(self, timetable: Timetable, listener: socket.socket) -> None:
        self._timetable = timetable
        self._listener = listener
        self._connections: dict[socket.socket, h2.connection.H2Connection] = {}
        self._calls: dict[tuple[socket.socket, int], _Call] = {}
        #: Held calls by the time of their answer; the number keeps equal times apart.
        self._due: list[tuple[float, int, _Call, dict[str, Any]]] = []
        self._log: list[dict[str, Any]] = []
        self._first: float | None = None
        self._swaps: list[float] = []
        #: The stalls that have begun, and when.
        self._begun: dict[int, float] = {}
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self.stopping = False

    def stop(self, *_: object) -> None:
        self.stopping = True
        self._waker.send(b"x")

    def swap(self, signum: int, frame: FrameType | None) -> None:
        self._swaps.append(time.monotonic())

    def serve(self) -> list[dict[str, Any]]:
        while not self.stopping:
            wait = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            readable, _, _ = select.select([self._wake, self._listener, *self._connections], [], [], wait)
            for sock in readable:
                if sock is self._listener:
                    self._accept()
                elif sock is not self._wake:
                    self._read(sock)
            self._answer_due()
        return self._log

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = server_side()
        connection.initiate_connection()
        sock.sendall(connection.data_to_send())
        self._connections[sock] = connection

    def _read(self, sock: socket.socket) -> None:
        connection = self._connections[sock]
        try:
            content = sock.recv(1 << 18)
        except OSError:
            content = b""
        arrived = time.monotonic()
        if not content:
            sock.close()
            del self._connections[sock]
            return
        for event in connection.receive_data(content):
            if isinstance(event, h2.events.RequestReceived):
                path = dict(event.headers)[b":path"].decode()
                self._calls[sock, event.stream_id] = _Call(sock, event.stream_id, path)
            elif isinstance(event, h2.events.DataReceived):
                connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                self._calls[sock, event.stream_id].body += event.data
            elif isinstance(event, h2.events.StreamEnded):
                self._called(self._calls.pop((sock, event.stream_id)), arrived)
        sock.sendall(connection.data_to_send())

    def _called(self, call: _Call, arrived: float) -> None:
        message = bytes(call.body[PREFIX.size :])
        if call.path == _STATUS:
            self._answer(call, self._status(arrived))
            return
        number = predict_pb2.PredictRequest.FromString(message).inputs["id"].int64_val[0]
        if self._first is None:
            self._first = arrived
        stall, until = self._holding(number, arrived)
        entry = {"id": number, "arrived": arrived, "stall": stall}
        heapq.heappush(self._due, (until, len(self._log) + len(self._due), call, entry))

    def _holding(self, number: int, now: float) -> tuple[int | None, float]:
        """The stall that holds a request that arrives now, and until when."""
        for index, stall in enumerate(self._timetable.stalls):
            if stall.swap is None:
                begin = self._first
            else:
                begin = self._swaps[stall.swap] if stall.swap < len(self._swaps) else None
            if begin is None or now < begin + stall.at:
                continue
            if index not in self._begun:
                if number >= BYSTANDERS:
                    continue
                self._begun[index] = now
            elif not stall.everyone:
                continue
            if now < self._begun[index] + stall.seconds:
                return index, self._begun[index] + stall.seconds
        return None, now

    def _answer_due(self) -> None:
        while self._due and self._due[0][0] <= time.monotonic():
            _, _, call, entry = heapq.heappop(self._due)
            answer = predict_pb2.PredictResponse()
            answer.model_spec.name = MODEL
            now = time.monotonic()
            answer.model_spec.version.value = self._version(now)
            self._log.append({**entry, "answered": now})
            self._answer(call, answer)

    def _version(self, now: float) -> int:
        """The version that answers."""
        return 1 + sum(now >= begin + self._timetable.swap_seconds for begin in self._swaps)

    def _status(self, now: float) -> get_model_status_pb2.GetModelStatusResponse:
        answer = get_model_status_pb2.GetModelStatusResponse()
        swap = self._timetable.swap_seconds
        for number in range(1, len(self._swaps) + 2):
            # The first one was there from the beginning; each ends with the next.
            loaded = number == 1 or now >= self._swaps[number - 2] + swap
            ended = number <= len(self._swaps) and now >= self._swaps[number - 1] + 2 * swap
            state = _State.END if ended else _State.AVAILABLE if loaded else _State.LOADING
            answer.model_version_status.add(version=number, state=state)
        return answer

    def _answer(self, call: _Call, message: Any) -> None:
        connection = self._connections.get(call.sock)
        if connection is None:
            return
        body = message.SerializeToString()
        headers = [(b":status", b"200"), (b"content-type", b"application/grpc")]
        connection.send_headers(call.stream, headers)
        connection.send_data(call.stream, PREFIX.pack(0, len(body)) + body)
        connection.send_headers(call.stream, [(b"grpc-status", b"0")], end_stream=True)
        call.sock.sendall(connection.data_to_send())


def main() -> None:
    plan, log = map(Path, sys.argv[1:])
    content = json.loads(plan.read_text())
    timetable = Timetable([Stall(**stall) for stall in content["stalls"]], content["swap_seconds"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = _Server(timetable, listener)
        signal.signal(signal.SIGTERM, server.stop)
        signal.signal(signal.SIGUSR1, server.swap)
        print(listener.getsockname()[1], flush=True)
        entries = server.serve()
    log.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))


if __name__ == "__main__":
    main()
