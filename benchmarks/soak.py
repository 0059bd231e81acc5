"""Hours of reloads under load: does anything fail, grow, or get lost?

    python benchmarks/soak.py                      # an hour, a step every 10 s
    python benchmarks/soak.py --duration 2m
    python benchmarks/soak.py --show RESULT        # writes its page again

A server (``SPIKELESS_SERVER`` chooses which) answers an open-loop load, and every few
seconds a step changes what it serves: a version is published and promoted, every third
one is broken and must be refused, some are rolled back, and some promotions are killed
in the middle and repeated. A client that is killed in each step asks beside the load.
The server itself is not killed: whoever asks one server alone cannot but notice.
Several soaks may run at once, on different engines: they share no file and no port.

In: nothing. Out: a directory with ``load.npz`` (every request), ``soak.json`` (every
step and sample), ``index.html`` (all of it over time) and ``summary.md`` (each bound,
and whether it was held). The exit code is 1 when one was not.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import make_embedding_model
import numpy as np
import psutil
from rich.console import Console

import spikeless
from spikeless import bench, launch
from spikeless.bench.analysis import percentile
from spikeless.bench.machine import describe_machine
from spikeless.cli.options import Duration, Size
from spikeless.client import Client
from spikeless.disk import children, proc
from spikeless.errors import SpikelessError
from spikeless.formats import tfrecord
from spikeless.formats.protos import saved_model_pb2
from spikeless.formats.savedmodel import SAVED_MODEL_FILE
from spikeless.formats.states import State
from spikeless.repository import layout
from spikeless.repository.publishing import publish
from spikeless.rollout.probes import ComparisonSettings
from spikeless.warmup import warmup_file
from spikeless.warmup.requests import predict

MODEL = "soak"
_PATH = click.Path(path_type=Path)
SERVER_FLAGS = (
    *bench.SERVER_FLAGS,
    "--allow_version_labels_for_unavailable_models=true",
    "--max_num_load_retries=0",
    "--file_system_poll_wait_seconds=1",
)
#: Versions that stay on disk.
KEPT = 4
#: The first samples are of a server that is still warming up: of all, so many.
WARM_SHARE = 0.1
_SAMPLE_SECONDS = 1.0
#: A promotion is killed within so many seconds of its start.
_KILLED_WITHIN = 3.0

#: Asks the server until it is killed.
_CLIENT = """
import sys, time
import numpy as np
from spikeless.bench.replayed import read_requests
from spikeless.openloop.loop import OpenLoop
target, requests, name = sys.argv[1:]
OpenLoop(np.arange(0, 3600, 0.05), read_requests(requests, name), target, 10.0).run(time.monotonic())
"""


# Breaking a version, as it is on disk.


def _missing_file(version: Path) -> None:
    (version / "variables" / "variables.index").unlink()


def _truncated_shard(version: Path) -> None:
    (shard,) = (version / "variables").glob("variables.data-*")
    os.truncate(shard, shard.stat().st_size // 2)


def _bad_warmup(version: Path) -> None:
    record = predict("serving_default", {"ids": np.array([["no", "numbers"]])})
    tfrecord.write(warmup_file(version), [record.SerializeToString()])


def _wrong_signature(version: Path) -> None:
    graph = version / SAVED_MODEL_FILE
    model = saved_model_pb2.SavedModel.FromString(graph.read_bytes())
    for meta in model.meta_graphs:
        meta.signature_def["other"].CopyFrom(meta.signature_def["serving_default"])
        del meta.signature_def["serving_default"]
    graph.write_bytes(model.SerializeToString())


FAULTS: dict[str, Callable[[Path], None]] = {
    "missing file": _missing_file,
    "bad warmup": _bad_warmup,
    "wrong signature": _wrong_signature,
    "truncated shard": _truncated_shard,
}


# What is measured beside the load.


@dataclass(frozen=True)
class Sample:
    """The server and its repository at a moment."""

    #: Seconds on the clock of ``time.monotonic``.
    t: float
    #: Whether no step is in progress.
    quiet: bool
    private_bytes: int
    threads: int
    descriptors: int
    mappings: int
    disk_bytes: int


@dataclass(frozen=True)
class Bound:
    """How much a figure may grow from the first third of quiet samples to the last."""

    figure: str
    share: float
    absolute: float
    #: A server keeps the threads that a stall made, one for each call in progress. How
    #: much each adds.
    per_call: int = 0

    def allowed(self, before: float, calls: int) -> float:
        """The bound, where so many calls were in progress at once."""
        return before * (1 + self.share) + self.absolute + self.per_call * calls


BOUNDS = (
    Bound("private_bytes", 0.05, 64 << 20),
    Bound("threads", 0.0, 8, per_call=1),
    Bound("descriptors", 0.0, 8),
    # A stack and an arena of the allocator, each with what is reserved beside it.
    Bound("mappings", 0.05, 64, per_call=4),
)
FIGURES = (*(bound.figure for bound in BOUNDS), "disk_bytes")
#: What a repository of `KEPT` versions may take, in versions: one is on its way.
DISK_VERSIONS = KEPT + 1.5


class Sampler(threading.Thread):
    """Samples a process and a directory until it is ended."""

    def __init__(self, pid: int, directory: Path) -> None:
        super().__init__(daemon=True)
        self.samples: list[Sample] = []
        self.quiet = True
        self._process = psutil.Process(pid)
        self._directory = directory
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            quiet = self.quiet
            try:
                sample = Sample(
                    time.monotonic(),
                    quiet and self.quiet,
                    proc.private_memory(self._process.pid),
                    self._process.num_threads(),
                    self._process.num_fds(),
                    len(Path(f"/proc/{self._process.pid}/maps").read_text().splitlines()),
                    _disk(self._directory),
                )
            except (OSError, psutil.Error):
                continue  # The server is gone, which the load tells.
            self.samples.append(sample)

    def end(self) -> None:
        self._ended.set()
        self.join()


def _disk(directory: Path) -> int:
    """The bytes below it; what goes away meanwhile does not count."""
    total, seen = 0, set()
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                status = os.stat(os.path.join(folder, name), follow_symlinks=False)
            except OSError:
                continue
            if status.st_ino not in seen:
                seen.add(status.st_ino)
                total += status.st_blocks * 512
    return total


# What happens.


@dataclass(frozen=True)
class Step:
    """One change."""

    #: Seconds on the clock of ``time.monotonic``.
    begin: float
    end: float
    #: ``promote``, ``rollback``, ``killed promote`` or the fault of a broken version.
    action: str
    version: int
    #: What went wrong; empty when all was as it should be.
    wrong: str
    #: What a refusal said.
    message: str = ""


@dataclass
class Operator:
    """Whoever changes versions: one `step` after the other."""

    models: Path
    saved_model: Path
    requests: Path
    target: str
    sampler: Sampler
    steps: list[Step] = field(default_factory=list)
    stable: int = 0
    #: What must be on disk.
    versions: set[int] = field(default_factory=set)
    _faults: int = 0
    _client: subprocess.Popen[bytes] | None = None
    _random: random.Random = field(default_factory=lambda: random.Random(1))

    @property
    def fleet(self) -> spikeless.FleetSettings:
        return spikeless.FleetSettings([self.target], load_timeout=300.0, patience=60.0)

    @property
    def settings(self) -> spikeless.PromotionSettings:
        # Only errors count: what latency is, the load tells.
        comparison = ComparisonSettings(requests=20, max_p99_ratio=1e6)
        return spikeless.PromotionSettings(comparison=comparison, takes_unlabelled=True)

    def first(self) -> None:
        """Publish and promote the first version."""
        self.stable = self._publish()
        spikeless.promote(self.models, MODEL, self.stable, self.fleet, self.settings)

    def _publish(self) -> int:
        version = int(publish(self.saved_model, self.models, MODEL, gates=()).name)
        self.versions.add(version)
        return version

    def step(self) -> str:
        """One change; never raises, but tells what went wrong."""
        number = len(self.steps) + 1
        self.sampler.quiet = False
        self._restart_client()
        begin = time.monotonic()
        version, message, wrong = 0, "", ""
        action = "promote"
        try:
            if number % 3 == 0:
                action, version, message = self._broken()
            elif number % 6 == 2:
                action, version = "rollback", self._roll_back()
            else:
                killed = number % 6 == 4
                action = "killed promote" if killed else "promote"
                version = self._promote(killed)
            self._check()
            if len(layout.versions(self.models, MODEL)) > KEPT:
                pruned = spikeless.prune(self.models, MODEL, KEPT, self.fleet, force=True)
                self.versions -= set(pruned.removed)
        except (SpikelessError, AssertionError, OSError) as error:
            wrong = f"{type(error).__name__}: {error}"
        self.steps.append(Step(begin, time.monotonic(), action, version, wrong, message))
        self.sampler.quiet = True
        return f"{action} {version}" + (f": {wrong}" if wrong else "")

    def _promote(self, killed: bool) -> int:
        version = self._publish()
        if killed:
            command = [sys.executable, "-m", "spikeless", "promote", MODEL, str(version)]
            command += ["--models", str(self.models), "--servers", self.target, "--takes-unlabelled"]
            process = subprocess.Popen(
                children.tied(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                process.wait(self._random.uniform(0.3, _KILLED_WITHIN))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        spikeless.promote(self.models, MODEL, version, self.fleet, self.settings)
        self.stable = version
        return version

    def _roll_back(self) -> int:
        before = self.stable
        self.stable = spikeless.rollback(self.models, MODEL, self.fleet, reason="soak").version
        assert self.stable != before, f"the rollback left version {before}"
        return self.stable

    def _broken(self) -> tuple[str, int, str]:
        fault, damage = list(FAULTS.items())[self._faults % len(FAULTS)]
        self._faults += 1
        version = self._publish()
        directory = layout.versions(self.models, MODEL)[version]
        damage(directory)
        refusal = ""
        try:
            spikeless.promote(self.models, MODEL, version, self.fleet, self.settings)
            self.stable = version
        except SpikelessError as error:
            refusal = str(error)
        assert refusal, f"a version with a fault ({fault}) was promoted"
        # Who reads it must know what was refused.
        assert re.search(rf"\b{version}\b", refusal), f"the refusal does not name {version}: {refusal}"
        shutil.rmtree(directory)  # As an operator would do.
        self.versions.discard(version)
        return fault, version, refusal.replace(f"{self.models}/", "")

    def _check(self) -> None:
        """No version is lost; the stable one is on disk, served, and answers."""
        lost = (self.versions | {self.stable}) - set(layout.versions(self.models, MODEL))
        assert not lost, f"versions {sorted(lost)} are lost"
        with Client(self.target) as client:
            states = {status.version: status.state for status in client.statuses(MODEL)}
            assert states.get(self.stable) == State.AVAILABLE, f"version {self.stable} is {states}"

    def _restart_client(self) -> None:
        self.end()
        command = [sys.executable, "-c", _CLIENT, self.target, str(self.requests), MODEL]
        self._client = subprocess.Popen(children.tied(command), stderr=subprocess.DEVNULL)

    def end(self) -> None:
        """Kill the client."""
        if self._client is not None:
            self._client.kill()
            self._client.wait()


# The whole.


@dataclass(frozen=True)
class Finding:
    """A bound, what was found, and whether it was held."""

    what: str
    bound: str
    found: str
    held: bool


def findings(
    run: bench.Run, steps: Sequence[Step], samples: Sequence[Sample], version_bytes: int, log: str
) -> list[Finding]:
    """Each bound; none without enough samples counts as held.

    `version_bytes` is the size of a version on disk, `log` what the server logged.
    """
    failed = int(np.count_nonzero(run.requests["code"]))
    wrong = [step for step in steps if step.wrong]
    broken = [step for step in steps if step.action in FAULTS]
    found = [
        Finding("failed requests", "0", f"{failed} of {len(run.requests['code']):,}", not failed),
        Finding("steps that went wrong", "0", f"{len(wrong)} of {len(steps)}", not wrong and bool(steps)),
        Finding(
            "broken versions refused by name",
            "all",
            f"{sum(not step.wrong for step in broken)} of {len(broken)}",
            not any(step.wrong for step in broken),
        ),
    ]
    # What is refused before any server loads it is in no server's log.
    loaded = [step for step in broken if "-canary" in step.message]
    named = sum(
        re.search(rf"^\S+ \S+ [EW] .*\bversion: {step.version}\}}", log, re.MULTILINE) is not None
        for step in loaded
    )
    found.append(
        Finding("failed loads in the server's log", "all", f"{named} of {len(loaded)}", named == len(loaded))
    )
    quiet = [sample for sample in samples if sample.quiet]
    disk = max((sample.disk_bytes for sample in quiet), default=0)
    room = int(DISK_VERSIONS * version_bytes)
    found.append(Finding("disk_bytes", f"{room:,}", f"{disk:,}", 0 < disk <= room))
    quiet = quiet[int(len(quiet) * WARM_SHARE) :]
    third = len(quiet) // 3
    calls = _most_at_once(run)
    for bound in BOUNDS:
        values = [getattr(sample, bound.figure) for sample in quiet]
        if not third:
            found.append(Finding(bound.figure, "", "too few samples", False))
            continue
        # How many versions are loaded differs from step to step: the largest counts.
        before, after = max(values[:third]), max(values[-third:])
        text = f"{before:,} to {after:,}"
        limit = bound.allowed(before, calls)
        found.append(Finding(bound.figure, f"{limit:,.0f}", text, after <= limit))
    return found


def _most_at_once(run: bench.Run) -> int:
    """How many calls were in progress at once."""
    sent = run.requests["intended"] + run.requests["lag"]
    ended = run.requests["intended"] + run.requests["latency"]
    order = np.argsort(np.concatenate([sent, ended]), kind="stable")
    changes = np.repeat([1, -1], [len(sent), len(ended)])
    return int(changes[order].cumsum().max(initial=0))


def measure(
    saved_model: Path,
    requests: Path,
    work: Path,
    duration: float,
    every: float,
    rate: float,
    note: str,
    console: Console,
) -> tuple[bench.Run, list[Step], list[Sample], float]:
    """The soak; the last of the result is the run's start (``time.monotonic``)."""
    models = work / "models"
    models.mkdir()
    config = models / "models.config"
    config.write_text("model_config_list {}\n")
    settings = bench.Settings(
        MODEL,
        str(requests),
        rate=rate,
        seconds=duration,
        publish_at=every,
        publishes=max(1, int(duration / every) - 1),
        publish_every=every,
        warm_seconds=min(3.0, every / 2),
    )
    flags = (f"--model_config_file={config}", *SERVER_FLAGS)
    server = launch.start(launch.LaunchSettings(flags=flags, log=work / "server.log"))
    with server:
        facts = bench.server_facts(server, note)
        assert facts.pid is not None, "only a server on this machine can be sampled"
        sampler = Sampler(facts.pid, models)
        operator = Operator(models, saved_model, requests, server.target, sampler)
        operator.first()
        with (
            _running(sampler),
            bench.progress_bar("soak", duration, console) as progress,
        ):
            starts: list[float] = []

            def follow(moment: bench.Moment) -> None:
                starts.append(time.monotonic() - moment.elapsed)
                progress(moment)

            try:
                run = bench.run("soak", settings, facts, operator.step, progress=follow)
            finally:
                operator.end()
    return run, operator.steps, sampler.samples, starts[-1]


@contextmanager
def _running(sampler: Sampler) -> Iterator[None]:
    sampler.start()
    try:
        yield
    finally:
        sampler.end()


def page(run: bench.Run, steps: Sequence[Step], samples: Sequence[Sample], start: float) -> str:
    """A self-contained page with everything over time."""
    from plotly.graph_objects import Figure, Scattergl
    from plotly.subplots import make_subplots

    titles = [
        "latency of each second's requests, ms: median, p99 and slowest",
        "failed requests",
        *FIGURES,
        "steps",
    ]
    chart: Figure = make_subplots(len(titles), 1, shared_xaxes=True, subplot_titles=titles)
    seconds, quantiles, failed = _by_second(run)
    for values, colour in zip(quantiles, ("steelblue", "darkorange", "firebrick"), strict=True):
        chart.add_trace(Scattergl(x=seconds, y=values, mode="lines", line_color=colour), row=1, col=1)
    chart.add_trace(Scattergl(x=seconds, y=failed, mode="lines"), row=2, col=1)
    chart.update_yaxes(type="log", row=1, col=1)
    times = [sample.t - start for sample in samples]
    for row, figure in enumerate(FIGURES, start=3):
        values = [getattr(sample, figure) for sample in samples]
        chart.add_trace(Scattergl(x=times, y=values, mode="lines"), row=row, col=1)
    steps_row = len(titles)
    for action in dict.fromkeys(step.action for step in steps):
        begins = [step.begin - start for step in steps if step.action == action]
        chart.add_trace(
            Scattergl(x=begins, y=[action] * len(begins), mode="markers", marker_size=4), row=steps_row, col=1
        )
    # What went wrong goes through all of them. All lines at once: plotly's `add_vline`
    # takes a second for each of some hundred.
    place = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": "red", "width": 1}}
    wrong = [step.begin - start for step in steps if step.wrong]
    chart.update_layout(shapes=[{**place, "x0": begin, "x1": begin} for begin in wrong])
    chart.update_layout(height=260 * len(titles), showlegend=False, title="Soak")
    chart.update_xaxes(title_text="seconds", row=len(titles), col=1)
    return str(chart.to_html(include_plotlyjs=True, full_html=True))


def _by_second(run: bench.Run) -> tuple[list[int], list[list[float]], list[int]]:
    """Of each second p50, p99 and maximum in milliseconds, and its failed requests."""
    second = run.requests["intended"].astype(int)
    latency, wrong = run.requests["latency"] * 1e3, run.requests["code"] != 0
    seconds = np.unique(second).tolist()
    mine = [second == one for one in seconds]
    quantiles = [
        [round(percentile(latency[inside], share), 3) for inside in mine] for share in (0.5, 0.99, 1.0)
    ]
    return seconds, quantiles, [int(np.count_nonzero(wrong[inside])) for inside in mine]


def summary(run: bench.Run, steps: Sequence[Step], found: Sequence[Finding]) -> str:
    facts = run.facts
    actions: dict[str, int] = {}
    for step in steps:
        actions[step.action] = actions.get(step.action, 0) + 1
    latency = run.requests["latency"] * 1e3
    note = f", {facts.server.engine_note}" if facts.server.engine_note else ""
    lines = [
        "# Soak",
        "",
        f"{facts.settings.seconds:g} s at {facts.settings.rate:g} requests/s, commit {facts.commit}.",
        f"Engine: {' '.join([facts.server.engine, facts.server.engine_version])}{note}.",
        f"{describe_machine().describe()}.",
        "",
        f"Steps: {', '.join(f'{count} {action}' for action, count in actions.items())}.",
        f"p50 {percentile(latency, 0.5):.2f} ms, p99.9 {percentile(latency, 0.999):.2f} ms.",
        "",
        "| what | bound | found | held |",
        "|---|---|---|---|",
        *(f"| {one.what} | {one.bound} | {one.found} | {'yes' if one.held else 'NO'} |" for one in found),
        "",
        *(f"- {step.action} {step.version}: {step.wrong}" for step in steps if step.wrong),
    ]
    return "\n".join([*lines, ""])


def write(directory: Path) -> bool:
    """Write page and summary of a result; returns whether all bounds were held."""
    run = bench.read_run(directory / "load.npz")
    content = json.loads((directory / "soak.json").read_text())
    steps = [Step(**step) for step in content["steps"]]
    samples = [Sample(**sample) for sample in content["samples"]]
    log = (directory / "server.log").read_text(errors="replace")
    found = findings(run, steps, samples, content["version_bytes"], log)
    (directory / "index.html").write_text(page(run, steps, samples, content["start"]))
    (directory / "summary.md").write_text(summary(run, steps, found))
    print((directory / "summary.md").read_text())
    return all(one.held for one in found)


@click.command()
@click.option("--duration", type=Duration(at_least=20), default="1h", show_default=True)
@click.option("--every", type=Duration(at_least=5), default="10s", show_default=True, help="Between steps.")
@click.option("--rate", type=float, default=100.0, show_default=True, help="Requests per second.")
@click.option("--size", type=Size(), default="64MiB", show_default=True, help="Of the model.")
@click.option("--engine-note", default="", envvar="SPIKELESS_ENGINE_NOTE", help="What else to say of it.")
@click.option("--out", type=_PATH, help="[default: benchmarks/results/<date>-<engine>-soak]")
@click.option("--show", type=_PATH, help="Only write page and summary of this result.")
def main(
    duration: float,
    every: float,
    rate: float,
    size: int,
    engine_note: str,
    out: Path | None,
    show: Path | None,
) -> None:
    """Reload a server for hours under load, and report what fails or grows."""
    if show is not None:
        raise SystemExit(0 if write(show) else 1)
    today = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    engine = Path(launch.chosen_engine()).name
    out = out or Path(__file__).parent / "results" / f"{today}-{engine}-soak"
    if out.exists():
        raise SystemExit(f"error: {out} is there already and is not overwritten; give another --out")
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spikeless-soak-")))
        work.chmod(0o755)
        make_embedding_model.make(work / "made", size, "module", versions=1)
        run, steps, samples, start = measure(
            work / "made" / "1",
            work / "made" / "requests",
            work,
            duration,
            every,
            rate,
            engine_note,
            Console(stderr=True),
        )
        log = (work / "server.log").read_text(errors="replace")
        version_bytes = _disk(work / "made" / "1")
    out.mkdir(parents=True)
    run.save(out / "load.npz")
    content: dict[str, Any] = {"start": start, "version_bytes": version_bytes}
    content |= {"steps": list(map(asdict, steps)), "samples": list(map(asdict, samples))}
    (out / "soak.json").write_text(json.dumps(content))
    (out / "server.log").write_text(log)
    raise SystemExit(0 if write(out) else 1)


if __name__ == "__main__":
    main()
