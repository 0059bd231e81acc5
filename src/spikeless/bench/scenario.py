"""One run: load on a running server, and versions published meanwhile.

In: settings, the server's facts, and what publishes. Out: a `Run`. The load has its own
processes and session (`spikeless.bench.load.locustfile`); this process watches the
server and publishes.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from spikeless import __version__, launch
from spikeless.bench import run_file
from spikeless.bench.load import LINE_PREFIX
from spikeless.bench.machine import UNKNOWN
from spikeless.bench.replayed import choose, read_requests
from spikeless.bench.run_file import Floor, Publish, Run, ServerFacts, Settings
from spikeless.bench.watch import Watcher, label
from spikeless.client import Client
from spikeless.disk import children, proc
from spikeless.errors import FailedPrecondition, Internal, NotFound
from spikeless.repository import publishing
from spikeless.repository.candidate import Candidate
from spikeless.repository.gates import GATES, Gate
from spikeless.rollout import local_servers

#: Of every server that is measured: enough threads that no call is refused, even when
#: nothing is answered for 4 s at 1000 requests/s.
SERVER_FLAGS = ("--grpc_max_threads=4096",)
#: What servers of either engine have without that flag.
_DEFAULT_THREADS = 4 * len(os.sched_getaffinity(0))

#: Which allocator our entrypoint gave the server, for those who cannot read its memory.
ALLOCATOR_VARIABLE = "SPIKELESS_ALLOCATOR"

#: Beyond the schedule and the last deadline: to start Locust and to write the file.
_OVERHEAD_SECONDS = 60.0
_OUTPUT_TAIL_LINES = 30
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


def server_facts(server: launch.ServerProcess, note: str = "") -> ServerFacts:
    """What the record says about a server that `spikeless.launch` started.

    Args:
        note: what else is to be said of the engine, such as how it was built.
    """
    allocator = server.allocator()
    return ServerFacts(
        target=server.target,
        engine=server.engine,
        engine_version=server.engine_version,
        engine_note=note,
        allocator=allocator.name,
        allocator_proof=allocator.proof,
        command=_portable(server.command),
        pid=server.pid,
    )


def running_server(target: str, model_name: str, pid: int | None = None) -> ServerFacts:
    """What is known of a server that somebody else started.

    `pid` may be its container's first process. Without `pid` it is looked for among the
    processes of this machine. Of one that is not there, only the address is known. The
    memory of another user's process cannot be read: there `SPIKELESS_ALLOCATOR` may say
    which allocator it has, as our entrypoint makes sure of.

    Raises:
        SpikelessError: nothing answers at ``target``, or it does not serve the model
            (see `Client.statuses`).
        NotFound: there is no process ``pid``.
    """
    with Client(target) as client:
        client.statuses(model_name)
    server = local_servers.find(target)
    if pid is None and server is not None:
        pid = server.pid
    if pid is None:
        return ServerFacts(target)
    try:
        pid = proc.server_of(pid)
        command = psutil.Process(pid).cmdline()
    except psutil.NoSuchProcess:
        raise NotFound(f"there is no process {pid}") from None
    allocator = launch.allocator_of(pid)
    if allocator.name == UNKNOWN and (told := os.environ.get(ALLOCATOR_VARIABLE)):
        allocator = launch.Allocator(told, f"{ALLOCATOR_VARIABLE}, which its entrypoint checks")
    embedded = local_servers.is_embedded(command)
    return ServerFacts(
        target,
        engine=launch.EMBEDDED if embedded else Path(command[0]).name,
        engine_version=__version__ if embedded else launch.version_of(pid),
        allocator=allocator.name,
        allocator_proof=allocator.proof,
        command=_portable(command),
        pid=pid,
    )


def refusal(server: ServerFacts, rate: float) -> str | None:
    """What to say of a server that refuses part of such a load, or may do so; or None.

    A server refuses calls beyond its ``--grpc_max_threads``.
    """
    remedy = f"servers that `spikeless bench` starts have {SERVER_FLAGS[0]}, which this one needs, too"
    if not server.command:
        return (
            f"the flags of {server.target} cannot be seen: one with few threads for calls, as by default, "
            f"refuses part of this load; {remedy}"
        )
    given = re.findall(r"(?<= )--?grpc_max_threads[= ](\d+)", " " + " ".join(server.command))
    threads = int(given[-1]) if given else _DEFAULT_THREADS
    if threads >= rate:
        return None
    return (
        f"{server.target} takes {threads} calls at once and refuses more: at {rate:g} requests/s, a stall of "
        f"{threads / rate * 1e3:.0f} ms fills them; {remedy}"
    )


def result_path(directory: Path, result: Run) -> Path:
    """The file of a run's raw result, named after its scenario and start."""
    scenario = re.sub(r"[^A-Za-z0-9.-]+", "-", result.facts.scenario).strip("-.") or "run"
    started = datetime.datetime.fromisoformat(result.facts.started)
    return directory / f"{scenario}-{started:%Y%m%dT%H%M%SZ}.npz"


def _portable(command: Sequence[str]) -> tuple[str, ...]:
    """A command line without the paths of its program and the working directory."""
    program = "python" if command[0] == sys.executable else Path(command[0]).name
    return (program, *map(_from_here, command[1:]))


def _from_here(text: str) -> str:
    """Paths in it as seen from the working directory."""
    return text.replace(f"{Path.cwd()}/", "")


def check_requests(settings: Settings) -> None:
    """Raise what reading and choosing the requests of a run raises."""
    requests = read_requests(settings.requests, settings.model_name)
    choose(requests, 0, settings.batch_sizes, settings.seed)


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
        publish: makes the next version visible; called at each of
            ``settings.publish_moments``. The record keeps what it returns, as text.
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
        command = _command(scenario, settings, server.target, Path(directory))
        with Watcher(server.target, settings.model_name, server.pid, settings.published_models) as watcher:
            start, published = _drive(command, settings, publish, watcher, progress)
        parts = [run_file.read_run(path) for path in sorted(Path(directory).glob("*.npz"))]
    if len(parts) != settings.processes:
        raise Internal(f"{len(parts)} of {settings.processes} load generator processes wrote their record")
    merged = run_file.merge(parts)
    facts = dataclasses.replace(
        merged.facts,
        settings=dataclasses.replace(settings, requests=_from_here(settings.requests)),
        server=server,
        generator=_portable(command),
        publishes=published,
        states=tuple(watcher.state_changes(start)),
        floor=floor,
        notes=tuple(notes),
    )
    return Run(facts, merged.requests, watcher.samples(start))


@contextmanager
def staged(
    saved_models: Sequence[Path],
    models: Path,
    name: str,
    count: int,
    *,
    gates: Sequence[Gate] = GATES,
    link: bool = False,
) -> Iterator[Callable[[], Path]]:
    """Stage the next `count` versions; gives a callable that publishes the next one.

    Publishing is a rename and a line in the journal, so it takes no time from the load.
    The SavedModels take turns. Give two (or one twice), so that the old and the new
    version share no file; else the new one would find its files in the processor's
    caches. The `gates` check the first version of each SavedModel, and later ones are
    hard links to it. With `link` the first ones are hard links to the SavedModels,
    which then must not be changed. Versions that were not published are deleted at the
    end of the block.

    Raises:
        SpikelessError: what `spikeless.repository.publishing.stage` raises.
    """
    with ExitStack() as stack:
        candidates: list[Candidate] = []
        for number in range(count):
            twin = number - len(saved_models)
            candidate = (
                publishing.stage(saved_models[number], models, name, gates=gates, link=link)
                if twin < 0
                else publishing.stage(candidates[twin].path, models, name, gates=(), link=True)
            )
            candidates.append(stack.enter_context(candidate))
        waiting = iter(candidates)
        yield lambda: next(waiting).publish()


@contextmanager
def staged_in_turn(
    saved_models: Sequence[Path], models: Path, names: Sequence[str], count: int
) -> Iterator[Callable[[], Path]]:
    """As `staged`, for several models that take turns."""
    with ExitStack() as stack:
        series = [
            stack.enter_context(staged(saved_models, models, name, len(range(number, count, len(names)))))
            for number, name in enumerate(names)
        ]
        turns = itertools.cycle(series)
        yield lambda: next(turns)()


def publisher(command: str) -> Callable[[], object]:
    """A callable that runs `command`, split as by a shell, and fails when it fails.

    Raises:
        FailedPrecondition: there is no such program.
    """
    arguments = shlex.split(command)
    if not arguments or shutil.which(arguments[0]) is None:
        raise FailedPrecondition(f"`{command}` cannot be run: there is no such program")

    def call() -> str:
        try:
            done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        except OSError as error:
            raise FailedPrecondition(f"`{command}` cannot be run: {error.strerror}") from None
        if done.returncode:
            raise FailedPrecondition(f"`{command}` exited with {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    return call


def _command(scenario: str, settings: Settings, target: str, directory: Path) -> list[str]:
    command = [sys.executable, "-m", "locust", "-f", str(Path(__file__).parent / "load" / "locustfile.py")]
    command += ["--headless", "--only-summary", "--exit-code-on-error", "0", "--host", target]
    command += ["--scenario", scenario, "--record", str(directory / "load.npz")]
    command += ["--name", settings.model_name]
    for name in ("requests", "rate", "seconds", "arrivals", "seed", "batch_sizes", "timeout"):
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
    series = _PublishingSeries(settings, publish)
    workers: dict[int, dict[str, Any]] = {}
    give_up = time.monotonic() + settings.seconds + settings.timeout + _OVERHEAD_SECONDS
    try:
        while True:
            now = time.monotonic()
            if now > give_up:
                raise Internal("the load generator hangs; its output ends:\n" + "\n".join(tail))
            series.check()
            try:
                line = lines.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
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
                progress(_moment(start, workers, watcher, series.published))
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
    start: float, workers: dict[int, dict[str, Any]], watcher: Watcher, published: Sequence[Publish]
) -> Moment:
    reports = workers.values()
    events = [(publish.begin, _published(publish)) for publish in published]
    events += [
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
        events=sorted(events),
    )


def _published(publish: Publish) -> str:
    """What was published, where the result is the directory of a version."""
    name = Path(publish.result).name
    return f"publish {label(publish.model, int(name))}" if name.isdecimal() else "publish"


def _drain(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line.rstrip("\n"))
    lines.put(None)


class _PublishingSeries:
    """Calls `publish` in a thread, at each of ``settings.publish_moments``."""

    def __init__(self, settings: Settings, publish: Callable[[], object] | None) -> None:
        self.published: list[Publish] = []
        self._moments = settings.publish_moments
        self._models = settings.published_models or ("",)
        self._publish = publish
        self._error: Exception | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, start: float) -> None:
        self._thread = threading.Thread(target=self._call, args=(start,), daemon=True)
        self._thread.start()

    def _call(self, start: float) -> None:
        try:
            for moment, model in zip(self._moments, itertools.cycle(self._models), strict=False):
                if self._ended.wait(max(0.0, start + moment - time.monotonic())):
                    return
                assert self._publish is not None
                begin = time.monotonic()
                result = self._publish()
                end = time.monotonic()
                text = "" if result is None else _from_here(str(result))
                self.published.append(Publish(begin - start, end - start, text, model))
        except Exception as error:
            self._error = error

    def check(self) -> None:
        """Raises FailedPrecondition when publishing has failed."""
        if self._error is not None:
            raise FailedPrecondition(f"publishing failed: {self._error}") from self._error

    def end(self) -> None:
        """Make no more calls, and wait for one in progress."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
