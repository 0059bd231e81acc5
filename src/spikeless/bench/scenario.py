"""One run: load on a running server, and versions published meanwhile.

In: settings, the server's facts, and what publishes. Out: a `Run`. The load has its own
processes and session (`spikeless.bench.load.locustfile`); this process watches the
server and publishes.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from spikeless import launch
from spikeless.bench import events, run_file
from spikeless.bench.changes import ChangeSeries
from spikeless.bench.load import LINE_PREFIX
from spikeless.bench.recorded import planned
from spikeless.bench.run_file import Floor, Publish, Run, ServerFacts, Settings
from spikeless.bench.servers import from_here, portable
from spikeless.bench.watch import Watcher, label
from spikeless.disk import children
from spikeless.errors import FailedPrecondition, Internal

#: The generator tells its progress twice a second. Beyond the last deadline it has so
#: long to start Locust and to write the file.
_OVERHEAD_SECONDS = 60.0
_OUTPUT_TAIL_LINES = 30
#: The settings that are options of the locustfile, too.
_LOCUST_SETTINGS = (
    "requests",
    "rate",
    "seconds",
    "arrivals",
    "speed",
    "seed",
    "batch_sizes",
    "protocol",
    "url_path",
    "timeout",
)
#: How often the loop checks whether publishing has failed.
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Moment:
    """How far a run is."""

    #: Seconds since its start; negative before it.
    elapsed: float
    sent: int
    failed: int
    #: Requests that were answered in each of the last seconds, their p99 (of several
    #: workers the largest) and the slowest; all of the last half second.
    rate: float
    p99_ms: float
    slowest_ms: float
    #: Version, such as ``v3``, -> state.
    states: dict[str, str]
    #: Private memory (RssAnon) of the server in bytes; None: unknown.
    memory: int | None = None
    #: What happened to versions since the start, in order: seconds after it, and what.
    events: Sequence[tuple[float, str]] = ()


Progress = Callable[[Moment], None]


def result_path(directory: Path, result: Run) -> Path:
    """The file of a run's raw result, named after its scenario and start."""
    scenario = re.sub(r"[^A-Za-z0-9.-]+", "-", result.facts.scenario).strip("-.") or "run"
    started = datetime.datetime.fromisoformat(result.facts.started)
    return directory / f"{scenario}-{started:%Y%m%dT%H%M%SZ}.npz"


def check_requests(settings: Settings) -> None:
    """Raise what reading and choosing the requests of a run raises."""
    planned(settings)


def run(
    scenario: str,
    settings: Settings,
    server: ServerFacts,
    publish: Callable[[], object] | None = None,
    floor: Floor | None = None,
    progress: Progress | None = None,
    notes: Sequence[str] = (),
) -> Run:
    """Drive the load and return its record.

    Args:
        scenario: the name that the report groups runs by.
        settings: the load, and when to publish.
        server: see `server_facts` and `running_server`.
        publish: makes the next version visible, or unloads one; called at each of
            ``settings.publish_moments``, for `events.PUBLISH_ALL` once for each model.
            The record keeps what it returns, as text: the directory of a version.
        floor: the generator's own latency.
        progress: called a few times a second.
        notes: what the report should say about the run.

    Raises:
        FailedPrecondition: publishing failed; the load is stopped.
        Internal: the load generator failed; the end of its output is in the message.
        SpikelessError: the requests cannot be read.
    """
    if (publish is None) != (settings.publish_at is None):
        raise FailedPrecondition("publish and settings.publish_at belong together: give both or neither")
    check_requests(settings)  # Fails here rather than in the child.
    with tempfile.TemporaryDirectory(prefix="spikeless-bench-") as directory:
        command = _command(scenario, settings, server.address(settings.protocol), Path(directory))
        with Watcher(server.target, settings.model_name, server.pid, settings.published_models) as watcher:
            start, published = _drive(command, settings, publish, watcher, progress)
        parts = [run_file.read_run(path) for path in sorted(Path(directory).glob("*.npz"))]
    if len(parts) != settings.processes:
        raise Internal(f"{len(parts)} of {settings.processes} load generator processes wrote their record")
    merged = run_file.merge(parts)
    facts = dataclasses.replace(
        merged.facts,
        settings=dataclasses.replace(settings, requests=from_here(settings.requests)),
        server=server,
        generator=portable(command),
        publishes=published,
        states=tuple(watcher.state_changes(start)),
        floor=floor,
        notes=tuple(notes),
    )
    return Run(facts, merged.requests, watcher.samples(start))


def _command(scenario: str, settings: Settings, target: str, directory: Path) -> list[str]:
    command = [sys.executable, "-m", "locust", "-f", str(Path(__file__).parent / "load" / "locustfile.py")]
    command += ["--headless", "--only-summary", "--exit-code-on-error", "0", "--host", target]
    command += ["--scenario", scenario, "--record", str(directory / "load.npz")]
    command += ["--name", settings.model_name]
    for name in _LOCUST_SETTINGS:
        command += ["--" + name.replace("_", "-"), str(getattr(settings, name))]
    if settings.processes > 1:
        port = str(launch.free_port())
        command += ["--processes", str(settings.processes), "--master-bind-host", launch.LOOPBACK]
        command += ["--master-bind-port", port, "--master-port", port]
    return command


def _drive(
    command: Sequence[str],
    settings: Settings,
    publish: Callable[[], object] | None,
    watcher: Watcher,
    progress: Progress | None,
) -> tuple[float, Sequence[Publish]]:
    """Run the load generator to its end; returns its start and what was published.

    The start is on the clock of ``time.monotonic``.
    """
    lines: queue.Queue[str | None] = queue.Queue()
    tail: list[str] = []
    process = subprocess.Popen(
        children.tied(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    threading.Thread(target=_drain, args=(process.stdout, lines), daemon=True).start()
    start: float | None = None
    series = ChangeSeries(settings, publish)
    workers: dict[int, dict[str, Any]] = {}
    # Of our own running time: a machine that was suspended is no generator that hangs.
    silent = 0.0
    try:
        while True:
            if silent > settings.timeout + _OVERHEAD_SECONDS:
                raise Internal("the load generator hangs; its output ends:\n" + "\n".join(tail))
            series.check()
            try:
                line = lines.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                silent += _POLL_SECONDS
                continue
            silent = 0.0
            if line is None:
                break
            if not line.startswith(LINE_PREFIX):
                tail = [*tail, line][-_OUTPUT_TAIL_LINES:]
                continue
            facts = json.loads(line[len(LINE_PREFIX) :])
            if "start" in facts:
                start = time.monotonic() + facts["start"] - time.time()
                series.begin(start)
                continue
            workers[facts["worker"]] = facts
            if progress is not None and start is not None:
                progress(_moment(start, workers, watcher, settings.event, series.published))
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        series.end()
    series.check()
    if code or start is None:
        raise Internal(f"the load generator exited with {code}; its output ends:\n" + "\n".join(tail))
    return start, series.published


def _moment(
    start: float,
    workers: dict[int, dict[str, Any]],
    watcher: Watcher,
    event: str,
    published: Sequence[Publish],
) -> Moment:
    reports = workers.values()
    verb = events.EVENTS[event].verb
    happened = [(publish.begin, _published(verb, publish)) for publish in published]
    happened += [
        (change.t, f"{label(change.model, change.version)} {change.state}")
        for change in watcher.state_changes(start)
        if change.t >= 0
    ]
    return Moment(
        elapsed=time.monotonic() - start,
        sent=sum(report["sent"] for report in reports),
        failed=sum(report["failed"] for report in reports),
        rate=sum(report["rate"] for report in reports),
        p99_ms=max(report["p99_ms"] for report in reports),
        slowest_ms=max(report["slowest_ms"] for report in reports),
        states=watcher.states,
        memory=watcher.private_memory,
        events=sorted(happened),
    )


def _published(verb: str, publish: Publish) -> str:
    return verb if publish.version is None else f"{verb} {label(publish.model, publish.version)}"


def _drain(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line.rstrip("\n"))
    lines.put(None)
