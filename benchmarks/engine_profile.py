"""Where the processor time of one small Predict call goes in the embedded engine.

    python benchmarks/engine_profile.py --saved-model runs/<id>/saved_model
    python benchmarks/engine_profile.py --show benchmarks/results/engine_profile.json

In: a SavedModel with one input, and the minimal clients of `serving`. Out: a file, and
a table of microseconds a call, by part. The engine runs twice. First it is left alone:
what the kernel counted for its process, divided by the calls, is what a call costs.
Then clocks run in each part. What they cost themselves is measured beforehand and
subtracted, but they also push other things out of the processor's caches: the shares
are what to read, and the sum beside the first total says how far to trust them.
Waiting is time in which a part did not have the processor: idle in the loop, for
Python's lock or the machine elsewhere. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import serving

from spikeless import launch
from spikeless.bench.machine import describe_machine, source_commit
from spikeless.client import Client
from spikeless.errors import SpikelessError
from spikeless.repository import publishing

_TRANSPORT, _ENGINE = "spikeless.engine.transport", "spikeless.engine"
#: Part -> its functions. A part within another one counts for itself only.
PARTS = {
    "loop, and waiting for calls": (f"{_TRANSPORT}.server:FastServer._turn",),
    "socket": (f"{_TRANSPORT}.peer:Peer.read", f"{_TRANSPORT}.peer:Peer._flush"),
    "HTTP/2 frames": (f"{_TRANSPORT}.http2:Http2.receive", f"{_TRANSPORT}.http2:Http2.answer"),
    "headers": (
        "spikeless.http2.headers:HeaderReader.read",
        f"{_TRANSPORT}.headers:HeaderWriter.head",
        f"{_TRANSPORT}.headers:HeaderWriter.success",
    ),
    "context, method and pace": (f"{_TRANSPORT}.server:FastServer._advance",),
    "look-up of the model": (
        f"{_ENGINE}.handlers:CountedCall.model",
        f"{_ENGINE}.handlers:CountedCall.__exit__",
    ),
    "tensors by name": ("spikeless.runtime.model:Model.predict_large",),
    "messages and tensors": (
        "spikeless.formats.large_tensors:read_request",
        "spikeless.formats.large_tensors:array_of",
        "spikeless.formats.large_tensors:Response.serialized",
    ),
    "session, without TensorFlow": ("spikeless.runtime.session:Session.run",),
    "TensorFlow": ("spikeless.runtime.session:_session_run",),
    "metrics": (
        f"{_ENGINE}.metrics:Metrics.started",
        f"{_ENGINE}.metrics:Metrics.ended",
        f"{_ENGINE}.metrics:Metrics.ran",
    ),
}
#: Entered once in each call.
_EACH_CALL = "TensorFlow"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saved-model", type=Path, help="the model, for example runs/<id>/saved_model")
    parser.add_argument("--clients", type=int, default=8, help="calls at once")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the load, of each of two")
    parser.add_argument("--metrics", action="store_true", help="count the calls for Prometheus, too")
    parser.add_argument("--output", type=Path, default=serving.RESULTS / "engine_profile.json")
    parser.add_argument("--show", type=Path, help="only show this file")
    parser.add_argument("--timed", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.timed:
        serve_timed(Path(settings.timed[0]), settings.timed[1:])
    elif settings.show:
        print(table(json.loads(settings.show.read_text())))
    elif settings.saved_model is None:
        parser.error("--saved-model is needed: train one with training/train_factorization_machine.py")
    else:
        result = profile(settings.saved_model.resolve(), settings.clients, settings.seconds, settings.metrics)
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_text(json.dumps(result, indent=1) + "\n")
        print(table(result))


# The clocks, in the server's process.


@dataclass
class Spent:
    """Nanoseconds in one part, without those of parts within it."""

    entered: int = 0
    #: How often parts within it were entered.
    left: int = 0
    processor: int = 0
    wall: int = 0


class Clocks:
    """Times functions, each thread for itself."""

    def __init__(self) -> None:
        self._threads: list[dict[str, Spent]] = []
        self._local = threading.local()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts as this part's."""
        local = self._local

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            if not hasattr(local, "spent"):
                local.spent, local.within = {}, Spent()
                self._threads.append(local.spent)
            outer, within = local.within, Spent()
            local.within = within
            wall, processor = time.perf_counter_ns(), time.thread_time_ns()
            try:
                return function(*arguments, **named)
            finally:
                processor, wall = time.thread_time_ns() - processor, time.perf_counter_ns() - wall
                local.within = outer
                outer.left += 1
                outer.processor += processor
                outer.wall += wall
                spent = local.spent.setdefault(part, Spent())
                spent.entered += 1
                spent.left += within.left
                spent.processor += processor - within.processor
                spent.wall += wall - within.wall

        return call

    def total(self, part: str) -> Spent:
        """What all threads spent in a part."""
        each = [spent[part] for spent in self._threads if part in spent]
        return Spent(*(sum(column) for column in zip(*(asdict(one).values() for one in each), strict=True)))


def clock_cost(repeats: int = 20_000) -> tuple[float, float]:
    """Nanoseconds that a clock adds: to its part, and to the part around it."""
    inside, outside = [], []
    for _ in range(5):
        clocks = Clocks()
        empty = clocks.timed("empty", lambda: None)
        clocks.timed("around", lambda empty=empty: [empty() for _ in range(repeats)])()
        inside.append(clocks.total("empty").processor / repeats)
        outside.append(clocks.total("around").processor / repeats)
    return min(inside), min(outside)


def serve_timed(output: Path, command: list[str]) -> None:
    """Be ``spikeless`` with these arguments; write what its parts took at the end."""
    from spikeless.cli import main as spikeless

    inside, outside = clock_cost()
    clocks = Clocks()
    for part, functions in PARTS.items():
        for name in functions:
            module, _, path = name.partition(":")
            *holders, attribute = path.split(".")
            holder = functools.reduce(getattr, holders, importlib.import_module(module))
            setattr(holder, attribute, clocks.timed(part, getattr(holder, attribute)))
    sys.argv = ["spikeless", *command]
    try:
        spikeless()
    finally:
        parts = {part: clocks.total(part) for part in PARTS}
        calls = max(parts[_EACH_CALL].entered, 1)
        rows = {}
        for part, spent in parts.items():
            own = max(spent.processor - spent.entered * inside - spent.left * outside, 0.0)
            rows[part] = {
                "entered": spent.entered / calls,
                "processor": own / calls / 1e3,
                "waiting": max(spent.wall - spent.processor, 0) / calls / 1e3,
            }
        output.write_text(json.dumps(rows))


# Around it.


def profile(model: Path, clients: int, seconds: float, metrics: bool = False) -> dict[str, Any]:
    """Run the engine without and with clocks; see `table` for what comes out."""
    with tempfile.TemporaryDirectory() as directory:
        models, times = Path(directory, "models"), Path(directory, "times.json")
        publishing.publish(model, models, serving.MODEL)
        flags = [f"--model_name={serving.MODEL}", f"--model_base_path={models / serving.MODEL}"]
        if metrics:
            monitoring = Path(directory, "monitoring.config")
            monitoring.write_text("prometheus_config { enable: true }")
            flags += [f"--monitoring_config_file={monitoring}", f"--rest_api_port={launch.free_port()}"]
        with _engine([sys.executable, "-m", "spikeless", "serve", *flags]) as (process, target):
            alone = _load(process, target, model, clients, seconds)
        with _engine([sys.executable, __file__, "--timed", str(times), "serve", *flags]) as (process, target):
            timed = _load(process, target, model, clients, seconds)
        return {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": source_commit(),
            "machine": asdict(describe_machine()),
            "clients": clients,
            "seconds": seconds,
            "unit": "microseconds a call",
            "alone": alone,
            "timed": timed,
            "parts": json.loads(times.read_text()),
        }


@contextmanager
def _engine(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = launch.free_port()
    target = f"{launch.LOOPBACK}:{port}"
    process = subprocess.Popen([*command, f"--port={port}"], stdout=subprocess.DEVNULL)
    try:
        _wait_until_it_serves(process, target)
        yield process, target
    finally:
        process.terminate()
        process.wait()


def _wait_until_it_serves(process: subprocess.Popen[bytes], target: str) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(SpikelessError), Client(target) as client:
            client.statuses(serving.MODEL)
            return
        time.sleep(0.1)
    raise SystemExit("the engine did not start")


def _load(
    process: subprocess.Popen[bytes], target: str, model: Path, clients: int, seconds: float
) -> dict[str, float]:
    """What a call took of the processor, in the program and in the kernel."""
    client = functools.partial(serving.grpc_client, target, model)
    serving.turn(client, clients, min(1.0, seconds))  # until its pace is known
    server = psutil.Process(process.pid)
    before = server.cpu_times()
    taken = serving.turn(client, clients, seconds)
    after = server.cpu_times()
    return {
        "calls": len(taken),
        "user": (after.user - before.user) / len(taken) * 1e6,
        "system": (after.system - before.system) / len(taken) * 1e6,
        "p50": statistics.median(taken) / 1e3,
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    alone, timed, parts = result["alone"], result["timed"], result["parts"]
    machine = result["machine"]
    lines = [
        f"{result['date']}, commit {result['commit']}, {machine['cpu']}, {machine['cpus']} CPUs; "
        f"{result['clients']} clients, {result['seconds']:g} s",
        "",
        "| Microseconds a call | Processor | Share | Waiting |",
        "|---|---:|---:|---:|",
    ]
    total = sum(row["processor"] for row in parts.values())
    for part, row in parts.items():
        share = row["processor"] / total
        lines.append(f"| {part} | {row['processor']:.1f} | {share:.0%} | {row['waiting']:.1f} |")
    rates = [run["calls"] / result["seconds"] for run in (alone, timed)]
    lines += [
        f"| sum of the parts | {total:.1f} | | |",
        f"| the process without clocks | {alone['user'] + alone['system']:.1f} | | |",
        f"| of it the kernel | {alone['system']:.1f} | | |",
        "",
        f"{rates[0]:.0f} calls/s, with clocks {rates[1]:.0f}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
