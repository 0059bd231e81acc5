"""What a new version costs on other servers, each as its own users run it.

    python benchmarks/bench_peers.py                    # a quarter of an hour
    python benchmarks/bench_peers.py --show DIRECTORY   # the table of a result

All peers (`peer_servers`) serve one model (`peer_model`), in turns, on this machine and
under one open-loop load over HTTP/1.1. In: their environments. Out: a directory with
each run's raw result, what was sampled beside it, ``summary.md`` and ``peers.svg``
(`peer_report`).

For each peer: its answers are compared with TensorFlow's; then there is load, first
without a new version and then with some; then the greatest rate is searched at which
p99 is within the SLO. Versions tell themselves by their answers, so every time is seen
from outside. Memory and processor time are those of the server with all of its
processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peer_model
import peer_report
import psutil
from peer_servers import MODEL, PEERS, Peer, Place, Started, ask, left_out, started
from rich.console import Console

from spikeless import bench, launch
from spikeless.bench.capacity import find_capacity, within_slo
from spikeless.bench.watch import StateChange
from spikeless.errors import FailedPrecondition, Internal, SpikelessError

HERE = Path(__file__).parent
_SAMPLE_SECONDS = 0.2
#: How far an answer may be from TensorFlow's.
_TOLERANCE = 1e-4
_NARROW, _PROBE_SECONDS = 0.25, 2.0
#: How long a version may take until the next one comes all the same.
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class Plan:
    """The load of one turn."""

    size: int = 64 << 20
    rate: float = 100.0
    #: Seconds without a new version, after the warm ones.
    steady: float = 15.0
    swaps: int = 3
    #: Seconds from one new version to the next.
    swaps_apart: float = 14.0
    warm: float = 3.0
    slo_ms: float = 50.0
    timeout: float = 30.0
    #: Whether the rate at the SLO is searched.
    search: bool = True

    def settings(self, peer: Peer, requests: Path) -> bench.Settings:
        return bench.Settings(
            MODEL,
            str(requests),
            rate=self.rate,
            seconds=self.warm + self.steady + self.swaps * self.swaps_apart,
            protocol=peer.protocol,
            url_path=peer.url_path,
            timeout=self.timeout,
            publish_at=self.warm + self.steady,
            publishes=self.swaps,
            publish_every=self.swaps_apart,
            warm_seconds=self.warm,
            slo_ms=self.slo_ms,
        )


class Family(threading.Thread):
    """Samples private memory and processor time of a process and all that it started.

    A process that was seen once is followed wherever its parent goes, and what it used
    counts for good: not every parent keeps the account of its children. What a process
    uses after it was seen last, `_SAMPLE_SECONDS` at most, is missing.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        #: Seconds of ``time.monotonic``, bytes (RssAnon), processor seconds.
        self.samples: list[tuple[float, int, float]] = []
        self._root = psutil.Process(pid)
        #: The processor seconds of each process that was seen.
        self._used: dict[psutil.Process, float] = {}
        self._over = threading.Event()

    def __enter__(self) -> Family:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        self._used[self._root] = 0.0
        while not self._over.wait(_SAMPLE_SECONDS):
            memory = 0
            for process in self._living():
                try:
                    times = process.cpu_times()
                    found = process.memory_info()
                except psutil.NoSuchProcess:
                    continue
                self._used[process] = times.user + times.system
                memory += found.rss - found.shared
            self.samples.append((time.monotonic(), memory, sum(self._used.values())))

    def _living(self) -> set[psutil.Process]:
        """Those that were seen and still run, and all that is below one of them."""
        family = {process for process in self._used if process.is_running()}
        others = {process: process.info["ppid"] for process in psutil.process_iter(["ppid"])}
        while found := {
            process
            for process, parent in others.items()
            if process not in family and parent in {one.pid for one in family}
        }:
            family |= found
        return family


def measure(plan: Plan, peer: Peer, model: Path, console: Console) -> tuple[bench.Run, dict[str, Any]]:
    """One turn of a peer: its run, and what was found beside it.

    Raises:
        SpikelessError: it cannot be started, or answers something else than TensorFlow.
    """
    requests = model / "requests"
    replayed = bench.read_requests(requests, MODEL, peer.protocol, peer.url_path)
    with tempfile.TemporaryDirectory(prefix="spikeless-peer-") as directory:
        place = Place(Path(directory), launch.free_port())
        staged = [_staged(peer, model, number, place) for number in range(1, plan.swaps + 2)]
        place.models.mkdir()
        os.rename(staged[0], place.models / "1")
        begin = time.monotonic()
        with started(peer, place, replayed[0].path, replayed[0].message) as server:
            facts: dict[str, Any] = {"peer": peer.name, "title": peer.title, "way": peer.way}
            facts |= {"version": server.version, "start_seconds": time.monotonic() - begin}
            facts["difference"] = _check(server, replayed, model, 1)
            described = bench.ServerFacts(
                "",
                engine=peer.title,
                engine_version=server.version,
                command=[str(part) for part in peer.command(Path(), place)],
                pid=server.pid,
                rest_target=server.target,
            )
            settings = plan.settings(peer, requests)
            waiting = iter(staged[1:])
            with (
                Family(server.pid) as family,
                bench.progress_bar(peer.title, settings.seconds, console) as progress,
            ):
                moments: list[float] = []

                def follow(moment: bench.Moment) -> None:
                    moments.append(time.monotonic() - moment.elapsed)
                    progress(moment)

                def publish() -> Path:
                    # Another one comes only when this one is there: servers that
                    # restart refuse to be told meanwhile.
                    published = server.publish(next(waiting))
                    first = replayed[0]
                    server.wait_for(int(published.name), first.path, first.message, _PATIENCE_SECONDS)
                    return published

                run = bench.run(peer.name, settings, described, publish, progress=follow)
            start = min(moments)
            facts["samples"] = [(t - start, memory, processor) for t, memory, processor in family.samples]
            facts["difference"] = max(facts["difference"], _check(server, replayed, model, plan.swaps + 1))
            if plan.search:
                facts["search"] = _search(plan, settings, described, console)
    states = tuple(_seen(run))
    run = dataclasses.replace(run, facts=dataclasses.replace(run.facts, states=states))
    return run, facts


def _staged(peer: Peer, model: Path, number: int, place: Place) -> Path:
    """A version beside those that the server sees; its files are links."""
    staged = place.folder / "staged" / str(number)
    source = model / "onnx" / str(number) if peer.onnx else model / str(number)
    shutil.copytree(source, staged, copy_function=os.link)
    return staged


def _check(server: Started, replayed: Sequence[Any], model: Path, version: int) -> float:
    """The largest difference of an answer from TensorFlow's; waits for the version."""
    with np.load(model / "expected.npz") as expected:
        right = expected[str(version)].ravel()
    first = replayed[0]
    if not server.wait_for(version, first.path, first.message, 2 * _PATIENCE_SECONDS):
        raise Internal(
            f"{server.peer.title} does not answer with version {version}{_end_of(server.place.log)}"
        )
    answers = [ask(server.place.port, one.path, one.message) for one in replayed[: len(right)]]
    if failed := [answer for status, answer in answers if status != 200]:
        raise Internal(f"{server.peer.title} fails: {failed[0].decode(errors='replace')[:500]}")
    scores = np.array([_score(answer) for _, answer in answers])
    difference = float(np.abs(scores - right).max())
    if difference > _TOLERANCE:
        raise Internal(f"{server.peer.title} answers {difference:g} beside what TensorFlow does")
    return difference


def _end_of(log: Path) -> str:
    return "; its log ends:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-30:])


def _score(answer: bytes) -> float:
    outputs = json.loads(answer)["outputs"]
    if isinstance(outputs, list):
        (values,) = (output["data"] for output in outputs if output["name"] == "scores")
    else:
        values = outputs["scores"]
    return float(np.ravel(values)[0])


def _search(
    plan: Plan, settings: bench.Settings, server: bench.ServerFacts, console: Console
) -> dict[str, Any]:
    """The greatest rate at which p99 is within the SLO."""
    probes: list[Any] = []
    try:
        found = find_capacity(
            settings, server, probes.append, within_slo(plan.slo_ms), _NARROW, _PROBE_SECONDS
        )
    except FailedPrecondition as error:
        console.print(f"{settings.model_name}: {error}", highlight=False)
        rate = max((probe.rate for probe in probes if probe.kept_up), default=0.0)
    else:
        rate = found.rate
    return {"rate": rate, "probes": [dataclasses.asdict(probe) for probe in probes]}


def _seen(run: bench.Run) -> list[StateChange]:
    """What the answers say of versions: each is there from its first answer on.

    It has ended with its last answer, but not before a newer version answers: a server
    that lets calls wait while it changes may give the last one before it is told.
    """
    versions = run.requests["version"]
    arrived = run.requests["intended"] + run.requests["latency"]
    found = [StateChange(-1.0, 1, "AVAILABLE")]
    served = [int(version) for version in np.unique(versions[versions > 0])]
    for version in served:
        mine = arrived[versions == version]
        if version > 1:
            found.append(StateChange(float(mine.min()), version, "AVAILABLE"))
        if version < served[-1]:
            newer = arrived[versions > version]
            found.append(StateChange(float(max(mine.max(), newer.min())), version, "END"))
    return sorted(found, key=lambda change: change.t)


def prepare(plan: Plan, model: Path, onnx: Peer | None) -> None:
    """Make the model where there is none, and convert it for the peer `onnx`."""
    if not model.exists():
        peer_model.make(model, plan.size, plan.swaps + 1)
    for number in range(1, plan.swaps + 2) if onnx else ():
        converted = model / "onnx" / str(number) / "model.onnx"
        if onnx is None or converted.exists():
            continue
        converted.parent.mkdir(parents=True, exist_ok=True)
        command = [onnx.bin / "python", "-m", "tf2onnx.convert", "--saved-model", model / str(number)]
        command += ["--opset", "17", "--output", converted]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
        if done.returncode:
            raise Internal(f"tf2onnx cannot convert {model / str(number)}: {done.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    today = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    plan = Plan()
    add = parser.add_argument
    add("--out", type=Path, default=HERE / "results" / f"{today}-peers")
    add("--model", type=Path, default=HERE.parent / "runs" / "peers-model", help="made where it is missing")
    add("--peer", choices=PEERS, action="append", help="only this one; repeatable")
    add("--rounds", type=int, default=1, help="how often all take turns")
    add("--rate", type=float, default=plan.rate, help="requests per second")
    add("--steady", type=float, default=plan.steady, help="seconds without a new version")
    add("--swaps-apart", type=float, default=plan.swaps_apart, help="seconds from one version to the next")
    add("--slo-ms", type=float, default=plan.slo_ms, help="limit of p99 in the search of a rate")
    add("--no-search", dest="search", action="store_false", help="leave out the rate at the SLO")
    add("--show", type=Path, help="only print the summary of this result")
    options = parser.parse_args()
    if options.show:
        print(peer_report.write(options.show))
        return
    plan = dataclasses.replace(
        plan,
        rate=options.rate,
        steady=options.steady,
        swaps_apart=options.swaps_apart,
        slo_ms=options.slo_ms,
        search=options.search,
    )
    console = Console(stderr=True)
    chosen = [PEERS[name] for name in options.peer or PEERS]
    missing = {name: why for name, why in left_out().items() if PEERS[name] in chosen}
    chosen = [peer for peer in chosen if peer.name not in missing]
    if not measure_all(plan, chosen, missing, options.rounds, options.model, options.out, console):
        raise SystemExit("no peer could be measured")
    print(peer_report.write(options.out))


def measure_all(
    plan: Plan,
    peers: Sequence[Peer],
    missing: dict[str, str],
    rounds: int,
    model: Path,
    out: Path,
    console: Console,
) -> int:
    """Measure the peers in turns into `out`, which is new; returns how many runs."""
    out.mkdir(parents=True)
    prepare(plan, model, next((peer for peer in peers if peer.onnx), None))
    failures = dict(missing)
    for number in range(rounds):
        for peer in peers:
            try:
                run, facts = measure(plan, peer, model, console)
            except SpikelessError as error:
                first, *log = str(error).splitlines()
                failures[peer.name] = " ".join([first, *log[-1:]])
                console.print(f"[red]{peer.title}[/red]: {error}", highlight=False, markup=True)
                continue
            run.save(out / f"{peer.name}-{number + 1}.npz")
            (out / f"{peer.name}-{number + 1}.json").write_text(json.dumps(facts) + "\n")
    plan_facts = {"plan": dataclasses.asdict(plan), "rounds": rounds, "not_measured": failures}
    (out / "peers.json").write_text(json.dumps(plan_facts, indent=1) + "\n")
    return len(list(out.glob("*.npz")))


if __name__ == "__main__":
    main()
