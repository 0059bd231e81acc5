"""What mapping changes, on real servers: memory, loads, swaps, throughput.

    python benchmarks/mapping.py --size 512MiB                # about fifteen minutes
    python benchmarks/mapping.py --size 8GiB --part load      # 24 GiB of memory

In: sizes, and ``SPIKELESS_SERVER`` for the engine. Out: a raw result in ``--out`` for
each run: ``.npz`` where there is open-loop load (`spikeless.bench.run_file`;
`spikeless report` draws them), else ``.json``. Both name machine, engine and commit.
``--show DIRECTORY`` prints the tables of a directory, and whether they meet the goals.

Nothing else may run on the machine. Every part runs kinds of model in turn, A B A B.
They are rungs of the ladder (`spikeless.bench.rungs`), all with glibc's allocator:

stock       the model as exported
mapped      its parameters mapped (``spikeless map``)
yielding    mapped, and loads yield to requests (``--load_threads_yield``, a flag of the
            embedded engine; left out with another)
tuned       yielding, and the graph optimised beforehand (``spikeless map --optimize``)
bare        a model of a few rows: the memory of a server without parameters

load        on an idle server: time from publish to AVAILABLE, its processor time, page
            faults and private memory, the first requests without warmup; also bare
swap        open-loop load, versions published one after the other: latency and private
            memory, all reloads folded into one; the only part with yielding
steady      all servers at once, one client that asks them in turns of half a second
throughput  the same with as many requests as four connections can make
soak        minutes of load, several requests at once, on a model that looks rows up
            sparsely (``ResourceGather``): is a copy made? Not of tuned.
squeeze     open-loop load with random rows in a memory cgroup with room for half of
            the parameters (needs root). The stock model, whose parameters are heap,
            does not fit: the result says so, and its cgroup gets room. Not of tuned.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import grpc
import mapping_summary
import numpy as np
from mapping_summary import BARE, STOCK

from spikeless import bench, launch, warmup
from spikeless.bench.machine import describe_machine, source_commit
from spikeless.bench.replayed import ReplayedRequest, read_requests
from spikeless.bench.rungs import Rung, kinds
from spikeless.bench.servers import server_facts
from spikeless.cli.options import Size
from spikeless.client import Client
from spikeless.disk import proc
from spikeless.disk.atomic import write_atomically
from spikeless.errors import SpikelessError
from spikeless.formats.states import State
from spikeless.mapping import map_saved_model, repin

SCHEMA = 1
NAME = "model"
BARE_BYTES = 256 << 10
#: Larger models are not loaded a second time to compare their outputs.
VERIFIED_BYTES = 2 << 30
#: Parts that depend on the model and not on how the server loads it: each form of the
#: model is run once.
MODEL_PARTS = ("load", "steady", "throughput", "soak", "squeeze")
#: Of these, the parts that optimising cannot change.
MEMORY_PARTS = ("soak", "squeeze")
PARTS = ("load", "swap", *MODEL_PARTS[1:])
_MAKE = str(Path(__file__).with_name("make_embedding_model.py"))
READY_SECONDS = 600
CONNECTIONS = 4
#: Between two versions: a reload has to be over in less than half of it.
SWAP_SECONDS, SWAP_SECONDS_PER_GIB = 5.5, 5.0
#: The resolution of how long a load takes: mapped, that is some 10 ms.
POLL_SECONDS = 0.001
TURNS, TURN_SECONDS = 40, 0.5
#: The rate of the soak by that of the other parts, so that requests overlap.
SOAK_FACTOR = 3
#: How much longer squeezing takes, so that pages come back that were pushed out.
SQUEEZE_FACTOR = 2
#: What a squeezed server has beside half of its parameters.
SQUEEZE_BYTES = 128 << 20

Call = Callable[[bytes], Any]


@dataclasses.dataclass(frozen=True)
class Options:
    size: int
    repeats: int
    rate: float
    seconds: float
    soak_seconds: float
    swaps: int
    out: Path
    work: Path

    @property
    def label(self) -> str:
        return f"{self.size >> 20}MiB"


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured."""

    #: Its name in results.
    kind: str
    rung: Rung
    model: Path

    @property
    def requests(self) -> Path:
        return _requests(self.model)


@click.command()
@click.option(
    "--size", "sizes", type=Size(), multiple=True, default=["512MiB"], help="Of the embedding; repeatable."
)
@click.option(
    "--part", "parts", type=click.Choice(PARTS), multiple=True, default=PARTS, help="What to run; repeatable."
)
@click.option("--repeats", default=3, show_default=True)
@click.option("--rate", default=200.0, show_default=True, help="Requests per second.")
@click.option("--seconds", default=30.0, show_default=True, help="Of load in each run.")
@click.option("--swaps", default=5, show_default=True, help="Versions published in each run of that part.")
@click.option("--soak-seconds", default=180.0, show_default=True, help="Of load in the soak.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("reports/mapping"), show_default=True)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("runs/mapping"),
    show_default=True,
    help="For models.",
)
@click.option("--show", type=click.Path(path_type=Path, exists=True), help="Only show these results.")
def main(sizes: tuple[int, ...], parts: tuple[str, ...], show: Path | None, **settings: Any) -> None:
    """Measure what mapping changes."""
    if show is not None:
        click.echo(mapping_summary.render(show))
        return
    for size in sizes:
        options = Options(size=size, **settings)
        options.out.mkdir(parents=True, exist_ok=True)
        for part in (part for part in PARTS if part in parts):
            subjects = [
                Subject(kind, rung, _model(options, kind, rung, sparse=part == "soak"))
                for kind, rung in rungs_of(part).items()
            ]
            for repeat in range(options.repeats):
                if part in _IN_TURNS:
                    click.echo(f"{part} {options.label} {repeat + 1}/{options.repeats}", err=True)
                    click.echo(_IN_TURNS[part](options, f"mapping-{part}-{options.label}-all", subjects))
                    continue
                for subject in subjects:
                    name = f"{part} {options.label} {subject.kind}"
                    click.echo(f"{name} {repeat + 1}/{options.repeats}", err=True)
                    click.echo(_PARTS[part](options, f"mapping-{name.replace(' ', '-')}", subject))
    out = settings["out"]
    write_atomically(out / "summary.md", mapping_summary.render(out).encode())
    click.echo(out / "summary.md")


# Models.


def rungs_of(part: str) -> dict[str, Rung]:
    """The kinds that a part compares, and how each is served."""
    if part not in MODEL_PARTS:
        return kinds()
    found: dict[str, Rung] = {}
    for kind, rung in kinds().items():
        known = [other.mapping for other in found.values()]
        if rung.mapping not in known and not (rung.optimized and part in MEMORY_PARTS):
            found[kind] = rung
    return {**found, BARE: found[STOCK]} if part == "load" else found


def _model(options: Options, kind: str, rung: Rung, sparse: bool) -> Path:
    """The SavedModel of a kind, made once; requests to replay are beside it."""
    if kind == BARE:
        return _exported(options, BARE, BARE_BYTES, sparse)
    label = f"{options.label}{'-sparse' if sparse else ''}"
    stock = _exported(options, f"{label}-{STOCK}", options.size, sparse)
    if rung.mapping is None:
        return stock
    first = next(name for name, other in kinds().items() if other.mapping == rung.mapping)
    mapped = stock.with_name(f"{label}-{first}")
    if not mapped.exists():
        map_saved_model(
            stock, mapped, dataclasses.replace(rung.mapping, verify=options.size <= VERIFIED_BYTES)
        )
    return mapped


def _exported(options: Options, name: str, size: int, sparse: bool) -> Path:
    model = options.work.absolute() / name
    if not model.exists():
        made = model.with_name(f"{name}.unfinished")
        shutil.rmtree(made, ignore_errors=True)
        kind = "sparse" if sparse else "module"
        command = [
            sys.executable,
            str(_MAKE),
            str(made),
            "--size",
            str(size),
            "--kind",
            kind,
            "--versions",
            "1",
        ]
        subprocess.run(command, check=True, capture_output=True)
        (made / "requests").rename(_requests(model))
        (made / "1").rename(model)
        made.rmdir()
    return model


def _requests(model: Path) -> Path:
    """The requests to replay to a model, beside it."""
    label, _, kind = model.name.rpartition("-")
    return model.with_name(f"{label}-{STOCK}-requests" if label else f"{kind}-requests")


@contextmanager
def _served(
    options: Options,
    subject: Subject,
    warm: bool = True,
    confine: Callable[[int], Any] | None = None,
    swaps: int = 1,
) -> Iterator[tuple[launch.ServerProcess, Client, Callable[[], Path]]]:
    """A server with version 1 available, and a callable that publishes the next one.

    ``confine`` is given the process as soon as there is one.
    """
    with ExitStack() as stack:
        model = subject.model
        models = options.work.absolute() / f"served-{model.name}"
        shutil.rmtree(models, ignore_errors=True)
        stack.callback(shutil.rmtree, models, ignore_errors=True)
        source = model if warm else _cold(options, subject)
        # Named twice, so that two versions that follow each other have no file in
        # common.
        staged = bench.staged([source, source], models, NAME, 1 + swaps, gates=())
        publish = stack.enter_context(staged)
        first = publish()
        if confine is not None:
            _evict(first)  # pages are charged to the cgroup that brings them in
        settings = launch.LaunchSettings(
            NAME, models / NAME, flags=bench.SERVER_FLAGS, ready_timeout=READY_SECONDS
        )
        settings = subject.rung.serving(settings, models)
        server = stack.enter_context(launch.ServerProcess(settings))
        server.start()
        if confine is not None:
            confine(server.pid)
        server.wait_ready()
        client = Client(server.target, timeout=60.0)
        stack.callback(client.close)
        yield server, client, publish


def _cold(options: Options, subject: Subject) -> Path:
    """The same model without warmup records."""
    model = subject.model
    cold = options.work.absolute() / f"{model.name}-cold"
    if not cold.exists():
        # Links suffice: `repin` and publishing write new files.
        without = shutil.ignore_patterns(warmup.warmup_file(model).name)
        shutil.copytree(model, cold, ignore=without, copy_function=os.link)
        if subject.rung.mapping is not None:
            repin(cold)
    return cold


# Parts. Each runs one server and writes one file.


def load(options: Options, scenario: str, subject: Subject) -> Path:
    with _served(options, subject, warm=False) as (server, client, publish):
        first = read_requests(subject.requests, NAME)[0]
        with grpc.insecure_channel(server.target) as channel:
            call = _call(channel, first)
            call(first.message)  # version 1, so that only what is version 2's own is cold
            before = _process(server.pid)
            peak = [before["rss_anon"]]
            with _sampling(server.pid, peak):
                published = time.monotonic()
                publish()
                _wait(client, 2, *State)  # until the server has looked
                seen = time.monotonic()
                _wait(client, 2, State.AVAILABLE)
                available = time.monotonic()
                _wait(client, 1, State.END)
            after = _process(server.pid)
            latencies = []
            for _ in range(20):
                began = time.perf_counter()
                call(first.message)
                latencies.append(time.perf_counter() - began)
        return _save(
            options,
            scenario,
            server,
            {
                "available_seconds": available - published,
                "load_seconds": available - seen,
                "before": before,
                "after": after,
                "peak_rss_anon": max(peak),
                "request_seconds": latencies,
            },
        )


def swap(options: Options, scenario: str, subject: Subject) -> Path:
    every = SWAP_SECONDS + SWAP_SECONDS_PER_GIB * options.size / 2**30
    settings = dataclasses.replace(
        _settings(options, subject, options.swaps * every),
        publish_at=0.6 * every,
        publishes=options.swaps,
        publish_every=every,
    )
    with _served(options, subject, swaps=options.swaps) as (server, _, publish):
        return _save_run(options, bench.run(scenario, settings, server_facts(server), publish))


def steady(options: Options, scenario: str, subjects: Sequence[Subject]) -> Path:
    """One client: the median of each turn, in milliseconds."""

    def median(calls: Sequence[Call], messages: Sequence[bytes]) -> float:
        return float(np.median(_ask(calls[0], messages, 0, 1)) * 1e3)

    return _turns(options, scenario, subjects, "p50_ms", median)


def throughput(options: Options, scenario: str, subjects: Sequence[Subject]) -> Path:
    """Several connections: requests per second in each turn."""

    def rate(calls: Sequence[Call], messages: Sequence[bytes]) -> float:
        with ThreadPoolExecutor(len(calls)) as pool:
            taken = pool.map(lambda at: _ask(calls[at], messages, at, len(calls)), range(len(calls)))
            return sum(map(len, taken)) / TURN_SECONDS

    return _turns(options, scenario, subjects, "requests_per_second", rate)


def _turns(
    options: Options,
    scenario: str,
    subjects: Sequence[Subject],
    name: str,
    measure: Callable[[Sequence[Call], Sequence[bytes]], float],
) -> Path:
    """The servers of all kinds take turns, so that drift affects all alike."""
    with ExitStack() as stack:
        calls: dict[str, list[Call]] = {}
        for subject in subjects:
            server, _, _ = stack.enter_context(_served(options, subject))
            requests = read_requests(subject.requests, NAME)
            channels = [
                grpc.insecure_channel(server.target, options=[("grpc.use_local_subchannel_pool", 1)])
                for _ in range(CONNECTIONS)
            ]
            calls[subject.kind] = [_call(stack.enter_context(channel), requests[0]) for channel in channels]
        messages = [request.message for request in requests]
        values: dict[str, list[float]] = {kind: [] for kind in calls}
        for turn in range(-2, TURNS):  # the first two are for warming
            for kind, of_kind in calls.items():
                value = measure(of_kind, messages)
                if turn >= 0:
                    values[kind].append(value)
        measured = {"turn_seconds": TURN_SECONDS, "connections": CONNECTIONS, name: values}
        return _save(options, scenario, server, measured)


def _call(channel: grpc.Channel, request: ReplayedRequest) -> Call:
    return channel.unary_unary(request.kind.path, lambda message: message, lambda answer: answer)


def _ask(call: Call, messages: Sequence[bytes], first: int, step: int) -> list[float]:
    """Seconds of each request of one connection in one turn."""
    taken: list[float] = []
    end = time.monotonic() + TURN_SECONDS
    while (began := time.monotonic()) < end:
        call(messages[(first + len(taken) * step) % len(messages)])
        taken.append(time.monotonic() - began)
    return taken


_IN_TURNS = {"steady": steady, "throughput": throughput}


def soak(options: Options, scenario: str, subject: Subject) -> Path:
    with _served(options, subject) as (server, _, _):
        settings = _settings(options, subject, options.soak_seconds)
        settings = dataclasses.replace(settings, rate=SOAK_FACTOR * settings.rate)
        return _save_run(options, bench.run(scenario, settings, server_facts(server)))


def squeeze(options: Options, scenario: str, subject: Subject) -> Path:
    limit = options.size // 2 + SQUEEZE_BYTES
    notes: list[str] = []
    if subject.kind == STOCK:
        try:
            return _squeezed(options, scenario, subject, limit, notes)
        except SpikelessError as error:
            problem = str(error).partition(";")[0]
            notes.append(f"does not fit into a memory cgroup of {limit} bytes ({problem})")
            click.echo(notes[-1], err=True)
            limit += options.size  # its parameters are heap, which cannot be dropped
    return _squeezed(options, scenario, subject, limit, notes)


def _squeezed(options: Options, scenario: str, subject: Subject, limit: int, notes: Sequence[str]) -> Path:
    settings = _settings(options, subject, SQUEEZE_FACTOR * options.seconds)
    with (
        _memory_limit(limit) as confine,
        _served(options, subject, confine=confine) as (server, _, _),
    ):
        before = _process(server.pid)["major_faults"]
        result = bench.run(scenario, settings, server_facts(server))
        faults = _process(server.pid)["major_faults"] - before
        notes = (*notes, f"memory cgroup of {limit} bytes", f"{faults} {mapping_summary.DISK_FAULTS}")
        facts = dataclasses.replace(result.facts, notes=notes)
        return _save_run(options, dataclasses.replace(result, facts=facts))


_PARTS: dict[str, Callable[[Options, str, Subject], Path]] = {
    "load": load,
    "swap": swap,
    "soak": soak,
    "squeeze": squeeze,
}


def _settings(options: Options, subject: Subject, seconds: float) -> bench.Settings:
    return bench.Settings(NAME, str(subject.requests), rate=options.rate, seconds=seconds)


def _wait(client: Client, version: int, *wanted: State) -> None:
    """Return when the version has one of these states."""
    while (version, True) not in [
        (status.version, status.state in wanted) for status in client.statuses(NAME)
    ]:
        time.sleep(POLL_SECONDS)


# What the kernel says.


def _evict(directory: Path) -> None:
    """Drop a directory's files, which are on disk, from the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _process(pid: int) -> dict[str, int]:
    """Memory in bytes, page faults, processor time in clock ticks."""
    memory = proc.memory(pid)
    return {
        "rss_anon": memory["RssAnon"],
        "rss_file": memory["RssFile"],
        **proc.counters(pid)._asdict(),
        "ticks_per_second": os.sysconf("SC_CLK_TCK"),
    }


@contextmanager
def _sampling(pid: int, values: list[int]) -> Iterator[None]:
    """Append the process's private memory to ``values`` every few milliseconds."""
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(POLL_SECONDS):
            values.append(proc.private_memory(pid))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def _memory_limit(limit: int) -> Iterator[Callable[[int], Any]]:
    """A memory cgroup with this limit, as what puts a process into it."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    old = next((path for _, controllers, path in lines if controllers == "memory"), None)
    if old is not None:
        parent, limit_file = Path("/sys/fs/cgroup/memory" + old), "memory.limit_in_bytes"
    else:
        parent, limit_file = Path("/sys/fs/cgroup" + next(path for _, _, path in lines)), "memory.max"
    group = parent / f"spikeless-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit_file).write_text(str(limit))
        yield lambda pid: (group / "cgroup.procs").write_text(str(pid))
    finally:
        group.rmdir()


# Results.


def _save_run(options: Options, result: bench.Run) -> Path:
    path = bench.result_path(options.out, result)
    result.save(path)
    return path


def _save(options: Options, scenario: str, server: launch.ServerProcess, measured: dict[str, Any]) -> Path:
    now = datetime.datetime.now(datetime.timezone.utc)
    content = {
        "schema": SCHEMA,
        "scenario": scenario,
        "started": now.isoformat(),
        "commit": source_commit(),
        "machine": dataclasses.asdict(describe_machine()),
        "server": dataclasses.asdict(server_facts(server)),
        "parameters": {"bytes": options.size},
        "measured": measured,
    }
    path = options.out / f"{scenario}-{now:%Y%m%dT%H%M%SZ}.json"
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


if __name__ == "__main__":
    main()
