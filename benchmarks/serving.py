"""What the embedded engine adds to a bare call, and what it saves over Flask.

    python benchmarks/serving.py --saved-model runs/<id>/saved_model
    python benchmarks/serving.py --show benchmarks/results/serving.npz

In: a SavedModel with one input. Out: one file with the latency of every call, the
machine, the versions and the commit; and tables of p50, p99 and throughput. Several
ways lead to the same model with the same row: the bare ``TF_SessionRun`` in a loop, the
embedded engine over gRPC, with one worker and with two, and over REST, TensorFlow
Serving where one is given, and Flask with ``tf.saved_model.load``. They take turns,
round after round, so that what the machine does meanwhile meets all of them.

The load is first a closed loop: each client sends its next call when the last one is
answered, so throughput is what can be had, and latency is that of a busy server. Then
it is the open loop of ``spikeless bench``: calls leave at random at a given rate,
whether or not others are answered, and latency counts from when each was to leave. The
same load on a server that answers at once shows how much of it is the generator's at
most.
(How requests fare during a swap is another question: ``spikeless bench``.) Run it on a
quiet machine.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
from rich.console import Console
from rich.progress import track

from spikeless import launch, runtime
from spikeless.bench.load.generator_floor import instant_server
from spikeless.bench.machine import describe_machine, source_commit
from spikeless.client import model_spec
from spikeless.errors import Code
from spikeless.formats import savedmodel
from spikeless.formats.protos import predict_pb2
from spikeless.formats.tensors import numpy_dtype, to_proto
from spikeless.openloop.connection import Connection
from spikeless.openloop.link import Ended, select
from spikeless.openloop.loop import Call, OpenLoop
from spikeless.openloop.schedule import Schedule
from spikeless.repository import publishing

SCHEMA = 1
HERE = Path(__file__).parent
RESULTS = HERE / "results"
MODEL = "boston"
BARE, GRPC, GRPCIO, REST, FLASK = "C API", "gRPC", "gRPC, grpcio client", "REST", "Flask"
#: The embedded engine over gRPC with several processes.
WORKERS = "gRPC, 2 workers"
#: TensorFlow Serving over gRPC, where one is given.
SERVING, SERVING_GRPCIO = "TensorFlow Serving", "TensorFlow Serving, grpcio client"
#: The same where the client waits in the thread that calls. Else it hands each call
#: over between three threads of its own.
POLLING, SERVING_POLLING = "gRPC, grpcio client that polls", "TensorFlow Serving, grpcio client that polls"
POLLS = {"GRPC_EXPERIMENTS": "-event_engine_client"}
#: A server that answers at once.
INSTANT = "the load generator alone"
#: Connections of the open loop: each worker of a server gets some.
CONNECTIONS = 8
#: The deadline of a call in the open loop, in seconds.
TIMEOUT = 10.0
#: Below this rate one worker is enough, and several are not measured.
LEAST_RATE_OF_WORKERS = 4000.0
METHOD = "/tensorflow.serving.PredictionService/Predict"
# Kinds and flags of HTTP/2 frames.
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
#: What the engine is held to: milliseconds over the bare call, and times the throughput
#: of Flask.
MOST_MILLISECONDS, LEAST_TIMES = 0.6, 2.0
#: The same beside TensorFlow Serving: times its p50 with one client, and times its
#: throughput.
MOST_OF_P50, LEAST_OF_RATE = 1.5, 0.5

Ask = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saved-model", type=Path, help="the model, for example runs/<id>/saved_model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="calls at once")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way has its turn")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one turn")
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[200, 1000, 2000, 4000], help="calls/s of the open loop"
    )
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")
    parser.add_argument(
        "--server", type=Path, help="a tensorflow_model_server that takes turns with the embedded engine"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "serving.npz")
    parser.add_argument("--show", type=Path, help="only show this file")
    parser.add_argument("--bare", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    parser.add_argument("--grpcio", metavar="TARGET", help=argparse.SUPPRESS)
    parser.add_argument("--open", nargs=3, metavar=("TARGET", "RATE", "SEED"), help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.quick:
        settings.clients, settings.rates, settings.rounds, settings.seconds = [1, 2], [50, 4000], 1, 0.2
    if settings.show:
        show(settings.show)
    elif settings.saved_model is None:
        parser.error("--saved-model is needed: train one with training/train_factorization_machine.py")
    elif settings.bare:
        json.dump(bare(settings.saved_model, settings.bare), sys.stdout)
    elif settings.grpcio:
        client = functools.partial(grpcio_client, settings.grpcio, settings.saved_model)
        json.dump(turn(client, 1, settings.seconds), sys.stdout)
    elif settings.open:
        target, rate, seed = settings.open
        schedule = Schedule(float(rate), settings.seconds, seed=int(seed))
        json.dump(open_loop(settings.saved_model, target, schedule), sys.stdout)
    else:
        measure(settings)
        show(settings.output)


# The ways.


def signature(path: Path) -> savedmodel.Signature:
    return savedmodel.read(path).signatures()[savedmodel.DEFAULT_SIGNATURE]


def row(path: Path) -> tuple[str, np.ndarray[Any, Any]]:
    """The input's alias, and one row for it: the same numbers in every run."""
    (spec,) = signature(path).inputs.values()
    shape = tuple(1 if dim is None else dim for dim in spec.shape or ())
    return spec.alias, np.random.default_rng(1).random(shape).astype(numpy_dtype(spec.dtype))


def bare(path: Path, seconds: float) -> list[int]:
    """Nanoseconds of each ``TF_SessionRun``, with nothing else in the loop."""
    alias, value = row(path)
    definition = signature(path)
    feeds = {definition.inputs[alias].tensor_name: value}
    fetches = [spec.tensor_name for spec in definition.outputs.values()]
    with runtime.Session.load(path) as session, session.bare_call(feeds, fetches) as ask:
        for _ in range(1000):
            ask()
        return closed_loop(ask, time.monotonic() + seconds)


def apart(path: Path, *arguments: object, environment: Mapping[str, str] | None = None) -> list[int]:
    """What this script prints in a process of its own, with these variables added."""
    command = [sys.executable, __file__, "--saved-model", str(path), *map(str, arguments)]
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=variables)
    taken: list[int] = json.loads(done.stdout)
    return taken


def grpc_request(path: Path) -> bytes:
    alias, value = row(path)
    request = predict_pb2.PredictRequest(model_spec=model_spec(MODEL))
    request.inputs[alias].CopyFrom(to_proto(value))
    content: bytes = request.SerializeToString()
    return content


def grpcio_client(target: str, path: Path) -> Ask:
    """What most Python callers use; it takes as much processor time as the server."""
    content = grpc_request(path)
    # A connection of its own for each client.
    channel = grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])
    call = channel.unary_unary(METHOD, lambda message: message, lambda answer: answer)

    def ask() -> None:
        call(content)

    return ask


def grpc_client(target: str, path: Path) -> Ask:
    """A minimal gRPC client: one socket, one call at a time.

    The frames are those of RFC 9113. Headers go out as literals that are not indexed
    (RFC 7541, 6.2.2), so that they are the same bytes in each call.
    """
    content = grpc_request(path)
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": METHOD,
        ":authority": target,
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b"".join(
        b"\0" + b"".join(bytes([len(word)]) + word.encode() for word in header) for header in headers.items()
    )
    message = struct.pack(">BI", 0, len(content)) + content
    assert len(message) <= 16384, "one frame holds no more"

    def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
        return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload

    host, port = target.rsplit(":", 1)
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    windows = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 2**31 - 1))
    windows += frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 65536))
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + windows)
    stream, received = -1, b""

    def ask() -> None:
        nonlocal stream, received
        stream += 2
        connection.sendall(
            frame(HEADERS, END_HEADERS, stream, block) + frame(DATA, END_STREAM, stream, message)
        )
        answered = False
        while True:
            while len(received) < 9 or len(received) < 9 + int.from_bytes(received[:3], "big"):
                more = connection.recv(65536)
                assert more, "the server hung up"
                received += more
            size, kind, flags = int.from_bytes(received[:3], "big"), received[3], received[4]
            payload, received = received[9 : 9 + size], received[9 + size :]
            if kind == DATA:
                answered = True
            elif kind == HEADERS and flags & END_STREAM:
                assert answered, "the call failed"  # an error has trailers only
                return
            elif kind in (SETTINGS, PING) and not flags & ACK:
                connection.sendall(frame(kind, ACK, 0, payload if kind == PING else b""))
            assert kind not in (RST_STREAM, GOAWAY), "the call was refused"

    return ask


def http_client(port: int, url: str, path: Path) -> Ask:
    """A minimal HTTP client; it keeps the connection if the server does."""
    _, value = row(path)
    body = json.dumps({"instances": value.tolist()}).encode()
    head = f"POST {url} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    content = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    connection: socket.socket | None = None

    def ask() -> None:
        nonlocal connection
        if connection is None:
            connection = socket.create_connection((launch.LOOPBACK, port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(content)
        received = b""
        while b"\r\n\r\n" not in received:
            received += connection.recv(65536)
        headers, _, rest = received.partition(b"\r\n\r\n")
        lower = headers.lower()
        assert b" 200 " in headers.splitlines()[0], headers
        length = int(lower.split(b"content-length:")[1].split()[0])
        while len(rest) < length:
            rest += connection.recv(65536)
        if b"connection: close" in lower:
            connection.close()
            connection = None

    return ask


@contextmanager
def flask_server(path: Path) -> Iterator[int]:
    port = launch.free_port()
    command = [sys.executable, str(HERE / "flask_server.py"), str(path), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the Flask server did not start")
            try:
                socket.create_connection((launch.LOOPBACK, port)).close()
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


# Measuring.


def closed_loop(ask: Ask, end: float) -> list[int]:
    """Ask again and again until ``end``; nanoseconds of each call."""
    taken = []
    clock = time.perf_counter_ns
    while time.monotonic() < end:
        started = clock()
        ask()
        taken.append(clock() - started)
    return taken


def turn(client: Callable[[], Ask], clients: int, seconds: float) -> list[int]:
    """``clients`` closed loops at once."""
    asks = [client() for _ in range(clients)]
    for ask in asks:
        for _ in range(20):
            ask()
    taken: list[list[int]] = [[] for _ in asks]
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        taken[number] = closed_loop(asks[number], end)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [nanoseconds for each in taken for nanoseconds in each]


class SpreadLink:
    """Calls of gRPC in turn over `CONNECTIONS`, none of which may break."""

    kind = "gRPC"
    grace = 1.0

    def __init__(self, target: str, timeout: float, tls: object = None) -> None:
        self._connections = [Connection(target) for _ in range(CONNECTIONS)]
        for connection in self._connections:
            connection.open(timeout)

    def send(self, tag: int, path: str, message: bytes) -> list[Ended]:
        connection = self._connections[tag % CONNECTIONS]
        connection.send(tag, path, message)
        connection.flush()
        return []

    def exchange(self, wait: float) -> list[Ended]:
        writing = [connection for connection in self._connections if connection.wants_write]
        readable, writable, _ = select(self._connections, writing, [], wait)
        ended = []
        for connection in readable:
            content = connection.read()
            arrival = time.monotonic()
            assert content, "the server hung up"
            ended += [Ended(reply, arrival) for reply in connection.parse(content)]
        for connection in {*readable, *writable}:
            connection.flush()
        return ended

    def abandon(self, tag: int) -> None:
        """Its answer is ignored, should it come."""

    def close(self) -> None:
        for connection in self._connections:
            connection.close()


def open_loop(path: Path, target: str, schedule: Schedule) -> list[int]:
    """Nanoseconds of each call from when it was to leave; 0 where it failed."""
    call = Call(METHOD, grpc_request(path))
    loop = OpenLoop(schedule.offsets(), [call], target, TIMEOUT, link=SpreadLink)
    gc.collect()
    gc.freeze()
    loop.run(time.monotonic() + 0.1)
    columns = loop.columns
    taken: list[int] = np.where(columns.code == Code.OK, columns.latency * 1e9, 0).astype(int).tolist()
    return taken


def measure(settings: argparse.Namespace) -> None:
    path = settings.saved_model.resolve()
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    with ExitStack() as stack:
        models = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        publishing.publish(path, models, MODEL)
        server = stack.enter_context(
            launch.start(
                launch.LaunchSettings(
                    MODEL,
                    models / MODEL,
                    rest=True,
                    engine="embedded",
                    flags=("--grpc_max_threads=64", "--rest_api_num_threads=64"),
                )
            )
        )
        servers = {GRPC: server}
        servers[WORKERS] = stack.enter_context(
            launch.start(
                launch.LaunchSettings(
                    MODEL,
                    models / MODEL,
                    engine="embedded",
                    flags=("--grpc_max_threads=64", "--workers=2"),
                )
            )
        )
        if settings.server:
            servers[SERVING] = stack.enter_context(
                launch.start(
                    launch.LaunchSettings(
                        MODEL, models / MODEL, engine=str(settings.server), flags=("--grpc_max_threads=64",)
                    )
                )
            )
        assert server.rest_port is not None
        flask_port = stack.enter_context(flask_server(path))
        rest_port = server.rest_port
        ways: dict[str, Callable[[], Ask]] = {}
        for way, with_grpcio in ((GRPC, GRPCIO), (SERVING, SERVING_GRPCIO)):
            if way in servers:
                target = servers[way].target
                ways[way] = functools.partial(grpc_client, target, path)
                ways[with_grpcio] = functools.partial(grpcio_client, target, path)
        ways |= {
            WORKERS: functools.partial(grpc_client, servers[WORKERS].target, path),
            REST: lambda: http_client(rest_port, f"/v1/models/{MODEL}:predict", path),
            FLASK: lambda: http_client(flask_port, "/predict", path),
        }
        targets = {way: servers[way].target for way in (GRPC, WORKERS, SERVING) if way in servers}
        targets[INSTANT] = stack.enter_context(instant_server())
        console = Console(stderr=True)
        rounds = range(settings.rounds)
        turns = [(number, clients) for number in rounds for clients in settings.clients]
        for number, clients in track(turns, "closed loop", console=console):
            if clients == 1:
                taken = apart(path, "--bare", settings.seconds)
                arrays[f"{number}|{BARE}|1"] = np.array(taken, np.uint64)
                for way, polling in ((GRPC, POLLING), (SERVING, SERVING_POLLING)):
                    if way in targets:
                        load = ("--seconds", settings.seconds, "--grpcio", targets[way])
                        taken = apart(path, *load, environment=POLLS)
                        arrays[f"{number}|{polling}|1"] = np.array(taken, np.uint64)
            for way, client in ways.items():
                if way != WORKERS or clients > 1:
                    taken = turn(client, clients, settings.seconds)
                    arrays[f"{number}|{way}|{clients}"] = np.array(taken, np.uint64)
        open_turns = [(number, rate) for number in rounds for rate in settings.rates]
        for number, rate in track(open_turns, "open loop", console=console):
            for way, target in targets.items():
                if way != WORKERS or rate >= LEAST_RATE_OF_WORKERS:
                    # The same moments for all ways, others in each round.
                    taken = apart(path, "--seconds", settings.seconds, "--open", target, rate, number)
                    arrays[f"{number}|{way}|{rate:g}/s"] = np.array(taken, np.uint64)
    facts = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": source_commit(),
        "machine": asdict(describe_machine()),
        "versions": {name: version(name) for name in ("tensorflow", "grpcio", "waitress", "flask")},
        "server": servers[SERVING].engine_version if settings.server else None,
        "model": [str(spec) for spec in signature(path).inputs.values()],
        "seconds": settings.seconds,
        "rounds": settings.rounds,
        "unit": "nanoseconds of each call; keys are round|way|clients, of the open loop round|way|rate/s: "
        "there from when it was to leave, and 0 where it failed",
    }
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(settings.output, facts=json.dumps(facts), **arrays)  # type: ignore[arg-type]


# Showing.


class Result(NamedTuple):
    """What was measured: the nanoseconds of each call, for each round."""

    facts: dict[str, Any]
    #: Way and number of clients -> rounds of the closed loop.
    closed: dict[tuple[str, int], list[np.ndarray[Any, Any]]]
    #: Way and calls a second -> rounds of the open loop. A call that failed is 0.
    open: dict[tuple[str, float], list[np.ndarray[Any, Any]]]


def read(file: Path) -> Result:
    """The content of a result's file."""
    with np.load(file) as content:
        result = Result(json.loads(str(content["facts"])), {}, {})
        for key in content.files:
            if key == "facts":
                continue
            _, way, load = key.split("|")
            if load.endswith("/s"):
                result.open.setdefault((way, float(load.removesuffix("/s"))), []).append(content[key])
            else:
                result.closed.setdefault((way, int(load)), []).append(content[key])
    return result


def milliseconds(values: np.ndarray[Any, Any], percent: float) -> float:
    """A percentile of the latencies of one round; a call that failed took for ever."""
    taken = np.where(values == 0, np.inf, values / 1e6)
    return float(np.percentile(taken, percent, method="higher"))


def show(file: Path) -> None:
    result = read(file)
    facts = result.facts
    seconds = facts["seconds"]
    machine = facts["machine"]
    print(f"{facts['date']}, commit {facts['commit']}, {machine['cpu']}, {machine['cpus']} CPUs")
    if facts.get("server"):
        print(f"beside TensorFlow Serving {facts['server']}")
    print(f"{facts['rounds']} rounds of {seconds:g} s; medians of the rounds, in brackets the extremes\n")
    print("| Way | Clients | p50 ms | p99 ms | calls/s |\n|---|---|---|---|---|")
    medians: dict[tuple[str, int], tuple[float, float]] = {}
    for way in (BARE, GRPC, WORKERS, SERVING, GRPCIO, SERVING_GRPCIO, POLLING, SERVING_POLLING, REST, FLASK):
        for clients in sorted({clients for each, clients in result.closed if each == way}):
            rounds = result.closed[way, clients]
            p50 = [milliseconds(values, 50) for values in rounds]
            p99 = [milliseconds(values, 99) for values in rounds]
            rate = [len(values) / seconds for values in rounds]
            medians[way, clients] = float(np.median(p50)), float(np.median(rate))
            cells = (spread(p50, "{:.3f}"), spread(p99, "{:.2f}"), spread(rate, "{:.0f}"))
            print(f"| {way} | {clients} | " + " | ".join(cells) + " |")
    added = medians[GRPC, 1][0] - medians[BARE, 1][0]
    print(f"\ngRPC adds {added:.2f} ms to the bare call at p50 (bar: {MOST_MILLISECONDS} ms)")
    show_beside_serving(medians)
    for clients in sorted({clients for way, clients in medians if way == FLASK}):
        flask = medians[FLASK, clients][1]
        times = {way: medians[way, clients][1] / flask for way in (GRPC, GRPCIO, REST)}
        words = ", ".join(f"{way} {value:.1f} times" for way, value in times.items())
        print(f"{clients} clients: {words} the throughput of Flask (bar: {LEAST_TIMES:g} times)")
    if result.open:
        show_open_loop(result)


def show_open_loop(result: Result) -> None:
    """How each way fares when calls do not wait for each other."""
    print(f"\nOpen loop over {CONNECTIONS} connections; latency from when a call was to leave\n")
    print("| Calls/s | Way | p50 ms | p99 ms | Calls | Failed |\n|---|---|---|---|---|---|")
    for rate in sorted({rate for _, rate in result.open}):
        for way in (GRPC, WORKERS, SERVING, INSTANT):
            if rounds := result.open.get((way, rate)):
                p50 = [milliseconds(values, 50) for values in rounds]
                p99 = [milliseconds(values, 99) for values in rounds]
                failed = sum(int(np.sum(values == 0)) for values in rounds)
                cells = (
                    spread(p50, "{:.3f}"),
                    spread(p99, "{:.2f}"),
                    str(sum(map(len, rounds))),
                    str(failed),
                )
                print(f"| {rate:g} | {way} | " + " | ".join(cells) + " |")


def show_beside_serving(medians: dict[tuple[str, int], tuple[float, float]]) -> None:
    """Whether the engine holds its bars beside TensorFlow Serving."""
    pairs = ((GRPC, SERVING), (WORKERS, SERVING), (GRPCIO, SERVING_GRPCIO), (POLLING, SERVING_POLLING))
    for way, other in pairs:
        for clients in sorted({clients for each, clients in medians if each == other}):
            if (way, clients) not in medians:
                continue
            (p50, rate), (other_p50, other_rate) = medians[way, clients], medians[other, clients]
            text = f"{way}, {clients} clients: {rate / other_rate:.2f} times the throughput of {SERVING}"
            text += f" (bar: {LEAST_OF_RATE:g}: {verdict(rate >= LEAST_OF_RATE * other_rate)})"
            if clients == 1:
                text += f", {p50 / other_p50:.2f} times its p50"
                text += f" (bar: {MOST_OF_P50:g}: {verdict(p50 <= MOST_OF_P50 * other_p50)})"
            print(text)


def verdict(held: bool) -> str:
    return "met" if held else "not met"


def spread(values: list[float], form: str) -> str:
    low, middle, high = (form.format(value) for value in (min(values), np.median(values), max(values)))
    return f"{middle} ({low}-{high})"


if __name__ == "__main__":
    main()
