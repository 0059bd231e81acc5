"""Prove the instrument: does it report stalls that are known exactly?

    python benchmarks/instrument.py                     # 10 minutes of an idle machine
    python benchmarks/instrument.py --show DIRECTORY    # the tables of a result

A server holds requests by a timetable (`stalling_server`): for 5, 20 and 100 ms, one
request and everyone's, in quiet time and during swaps. `spikeless bench` measures it,
with one process and with Locust's master and two workers, and a closed loop beside it
shows what it would have missed. Then the floor is measured on a server that answers at
once. In: nothing. Out: a directory with each run's raw result, the server's log, and
``summary.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import select
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import stalling_server
from rich.console import Console
from stalling_server import BYSTANDERS, MODEL, Held, Stall, Timetable

from spikeless import bench
from spikeless.bench.load.generator_floor import built_in_requests
from spikeless.bench.machine import describe_machine, source_commit
from spikeless.errors import SpikelessError, Unavailable
from spikeless.formats.kinds import PREDICT
from spikeless.openloop.connection import Connection

HEIGHTS = (0.005, 0.02, 0.1)
RATES = (100.0, 200.0, 500.0, 1000.0, 2000.0)
#: Requests that take longer are named. It is between the floor and the lowest stall.
NAMED_MS = 4.0
#: How far a report may be from the truth: a share of it, or milliseconds.
CLOSE, CLOSE_MS = 0.1, 1.0
#: A closed loop asks at most so often.
CLOSED_RATE = 100.0
_TIMEOUT = 60.0


@dataclass(frozen=True)
class Plan:
    """Stalls in quiet time and, with one swap for each, during swaps."""

    heights: Sequence[float] = HEIGHTS
    #: Seconds from one stall to the next.
    apart: float = 1.0
    #: Seconds from one swap to the next.
    swaps_apart: float = 3.0
    warm: float = 2.0
    swap_seconds: float = 0.3
    #: Slower requests are named.
    named_ms: float = NAMED_MS

    @property
    def kinds(self) -> list[tuple[float, bool]]:
        """Height, and whether everyone is held."""
        return list(itertools.product(self.heights, (False, True)))

    @property
    def timetable(self) -> Timetable:
        quiet = [
            Stall(self.warm + (number + 0.5) * self.apart, height, everyone)
            for number, (height, everyone) in enumerate(self.kinds)
        ]
        swaps = [
            Stall(self.swap_seconds / 2, height, everyone, swap)
            for swap, (height, everyone) in enumerate(self.kinds)
        ]
        return Timetable([*quiet, *swaps], self.swap_seconds)

    def settings(self, requests: Path, rate: float, processes: int) -> bench.Settings:
        """The load. Publishing begins when the stalls of quiet time are over."""
        quiet = self.warm + (len(self.kinds) + 1) * self.apart
        return bench.Settings(
            MODEL,
            str(requests),
            rate=rate,
            seconds=quiet + len(self.kinds) * self.swaps_apart,
            timeout=_TIMEOUT,
            processes=processes,
            publish_at=quiet,
            publishes=len(self.kinds),
            publish_every=self.swaps_apart,
            warm_seconds=self.warm,
            slo_ms=self.named_ms,
        )


@dataclass(frozen=True)
class Seen:
    """A stall as the server knows it and as the instrument reports it."""

    stall: Stall
    #: Requests that the server held longer than `Plan.named_ms`,
    held: int
    #: and those of them that the instrument does not name.
    missed: int
    #: The longest hold, by the server, and the same request's latency.
    height_ms: float
    reported_ms: float
    #: From the arrival of the first held request to that of the last, and between the
    #: intended starts of these two.
    width_ms: float
    reported_width_ms: float
    #: Of the closed loop: how many requests it held, and the longest of them.
    closed_held: int
    closed_ms: float

    @property
    def close(self) -> bool:
        """Whether it hit somebody, and its height and width are reported closely.

        That is within `CLOSE` or `CLOSE_MS`.
        """
        pairs = ((self.height_ms, self.reported_ms), (self.width_ms, self.reported_width_ms))
        return self.held > 0 and all(abs(told - true) <= max(CLOSE * true, CLOSE_MS) for true, told in pairs)


@dataclass(frozen=True)
class Proof:
    """One run against the server with stalls."""

    run: bench.Run
    #: What the server logged, by the number of the request.
    log: dict[int, Held]
    #: Latencies of the closed loop in milliseconds, by the number of its request.
    closed: dict[int, float]
    seen: Sequence[Seen]
    #: Requests that the instrument names and the server answered at once: what the
    #: machine and the generator added.
    unheld: int


class ClosedLoop(threading.Thread):
    """One user who waits for each answer before asking again, and counts from there."""

    def __init__(self, target: str) -> None:
        super().__init__(daemon=True)
        self.latency_ms: dict[int, float] = {}
        self._connection = Connection(target)
        self._ended = threading.Event()
        self._failure: SpikelessError | None = None

    def run(self) -> None:
        try:
            self._ask()
        except SpikelessError as error:
            self._failure = error
        finally:
            self._connection.close()

    def _ask(self) -> None:
        self._connection.open(_TIMEOUT)
        due = time.monotonic()
        for number in itertools.count(BYSTANDERS):
            if self._ended.wait(max(0.0, due - time.monotonic())):
                break
            begin = time.monotonic()
            message = stalling_server.request(number).SerializeToString()
            self._connection.send(number, PREDICT.path, message)
            self._connection.flush()
            while not self._answered():
                pass
            now = time.monotonic()
            self.latency_ms[number] = (now - begin) * 1e3
            due = max(now, begin + 1 / CLOSED_RATE)

    def _answered(self) -> bool:
        select.select([self._connection], [], [])
        content = self._connection.read()
        if not content:
            raise Unavailable(f"{self._connection.target} hung up on the closed loop")
        replies = self._connection.parse(content)
        self._connection.flush()
        return bool(replies)

    def end(self) -> None:
        """Wait for the last answer.

        Raises:
            Unavailable: the server did not give one.
        """
        self._ended.set()
        self.join()
        if self._failure is not None:
            raise self._failure


def prove(
    plan: Plan, rate: float, processes: int, directory: Path, progress: bench.Progress | None = None
) -> Proof:
    """Measure the server with stalls; `directory` gets its log."""
    count = len(bench.Settings(MODEL, "", rate, plan.settings(Path(), rate, 1).seconds).schedule.offsets())
    requests = stalling_server.write_requests(directory / "requests", count)
    log = directory / "log.jsonl"
    settings = plan.settings(requests, rate, processes)
    with stalling_server.started(plan.timetable, log) as (target, process):
        closed = ClosedLoop(target)

        def swap() -> None:
            os.kill(process.pid, signal.SIGUSR1)

        # It begins with the open loop, whose first request starts the timetable.
        moments: list[bench.Moment] = []

        def follow(moment: bench.Moment) -> None:
            if not moments and moment.sent:
                moments.append(moment)
                closed.start()
            if progress is not None:
                progress(moment)

        server = bench.ServerFacts(target, engine="stalling server")
        run = bench.run(f"{rate:g}/s, {processes} processes", settings, server, swap, progress=follow)
        if moments:
            closed.end()
    held = stalling_server.read_log(log)
    return Proof(
        run, held, closed.latency_ms, _seen(plan, run, held, closed.latency_ms), _unheld(plan, run, held)
    )


def _seen(plan: Plan, run: bench.Run, log: dict[int, Held], closed: dict[int, float]) -> list[Seen]:
    numbers = run.requests["request"].tolist()
    latency = dict(zip(numbers, (run.requests["latency"] * 1e3).tolist(), strict=True))
    intended = dict(zip(numbers, run.requests["intended"].tolist(), strict=True))
    found = []
    for number, stall in enumerate(plan.timetable.stalls):
        mine = [held for held in log.values() if held.stall == number]
        ours = [held for held in mine if held.id < BYSTANDERS and held.seconds * 1e3 > plan.named_ms]
        ours.sort(key=lambda held: held.arrived)
        others = [closed[held.id] for held in mine if held.id in closed]
        highest = max(ours, key=lambda held: held.seconds, default=None)
        found.append(
            Seen(
                stall,
                held=len(ours),
                missed=sum(latency[held.id] <= plan.named_ms for held in ours),
                height_ms=highest.seconds * 1e3 if highest else 0.0,
                reported_ms=latency[highest.id] if highest else 0.0,
                width_ms=(ours[-1].arrived - ours[0].arrived) * 1e3 if ours else 0.0,
                reported_width_ms=abs(intended[ours[-1].id] - intended[ours[0].id]) * 1e3 if ours else 0.0,
                closed_held=len(others),
                closed_ms=max(others, default=0.0),
            )
        )
    return found


def _unheld(plan: Plan, run: bench.Run, log: dict[int, Held]) -> int:
    named = run.requests["request"][run.requests["latency"] * 1e3 > plan.named_ms].tolist()
    return sum(log[number].seconds * 1e3 <= plan.named_ms - CLOSE_MS for number in named)


# Measuring.


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    today = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results / f"{today}-instrument")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--floor-seconds", type=float, default=15.0)
    parser.add_argument("--show", type=Path, help="only print the summary of this result")
    options = parser.parse_args()
    if options.show:
        print((options.show / "summary.md").read_text())
        return
    options.out.mkdir(parents=True)
    console = Console(stderr=True)
    proofs = {}
    for rate, processes in itertools.product(options.rates, options.processes):
        title = f"{rate:g}-per-second-{processes}"
        with (
            tempfile.TemporaryDirectory() as directory,
            bench.progress_bar(title, Plan().settings(Path(), rate, 1).seconds, console) as progress,
        ):
            proof = prove(Plan(), rate, processes, Path(directory), progress)
        proofs[rate, processes] = proof
        # The numbered requests are made, so their file tells nothing.
        facts = dataclasses.replace(
            proof.run.facts, settings=dataclasses.replace(proof.run.facts.settings, requests="numbered")
        )
        dataclasses.replace(proof.run, facts=facts).save(options.out / f"{title}.npz")
        held = [dataclasses.asdict(one) for one in proof.log.values() if one.stall is not None]
        (options.out / f"{title}.json").write_text(json.dumps({"held": held, "closed": proof.closed}))
    floors = {}
    with built_in_requests() as requests:
        for rate, processes in itertools.product(options.rates, options.processes):
            settings = bench.Settings(
                MODEL, str(requests), rate, options.floor_seconds, processes=processes, warm_seconds=0
            )
            with bench.progress_bar(f"floor {rate:g}/s", options.floor_seconds, console) as progress:
                floors[rate, processes] = bench.measure_floor(settings, options.floor_seconds, progress)
    summary = "\n".join(_summary(proofs, floors))
    (options.out / "summary.md").write_text(summary)
    print(summary)


_Key = tuple[float, int]


def _summary(proofs: dict[_Key, Proof], floors: dict[_Key, bench.Floor]) -> list[str]:
    lines = ["# The instrument against stalls that are known exactly", ""]
    lines += [f"{describe_machine().describe()}, commit {source_commit()}.", ""]
    for (rate, processes), proof in proofs.items():
        far = [one for one in proof.seen if not one.close]
        lines += [
            f"## {rate:g} requests/s, {_generator(processes)}",
            "",
            f"{len(proof.seen) - len(far)} of {len(proof.seen)} stalls are reported within {CLOSE:.0%} or "
            f"{CLOSE_MS:g} ms; of {sum(one.held for one in proof.seen)} requests that the server held longer "
            f"than {NAMED_MS:g} ms, {sum(one.missed for one in proof.seen)} are not named; {proof.unheld} "
            "that it answered at once are.",
            "",
            "| stall | held | when | height: true, reported ms | width: true, reported ms | requests: true, "
            "named | closed loop: requests, highest ms | close |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for one in proof.seen:
            lines.append(
                f"| {one.stall.seconds * 1e3:g} ms | {'all' if one.stall.everyone else 'one'} | "
                f"{'quiet' if one.stall.swap is None else 'swap'} | "
                f"{one.height_ms:.2f}, {one.reported_ms:.2f} | {one.width_ms:.2f}, "
                f"{one.reported_width_ms:.2f} | {one.held}, {one.held - one.missed} | {one.closed_held}, "
                f"{one.closed_ms:.2f} | {'yes' if one.close else 'no'} |"
            )
        lines.append("")
    lines += _same(proofs)
    lines += [
        "## Floor",
        "",
        "Latency from the intended start on a server that answers at once, in ms.",
        "",
        "| rate | generator | requests | p50 | p99 | p99.9 | max |",
        "|---|---|---|---|---|---|---|",
    ]
    for (rate, processes), floor in floors.items():
        figures = (floor.p50, floor.p99, floor.p99_9, floor.max)
        cells = " | ".join(f"{figure:.2f}" for figure in figures)
        lines.append(f"| {rate:g}/s | {_generator(processes)} | {floor.requests:,} | {cells} |")
    return [*lines, ""]


def _same(proofs: dict[_Key, Proof]) -> list[str]:
    """Whether one process and Locust's workers report the same."""
    lines = [
        "## One process beside Locust's master with workers",
        "",
        f"The same when each stall's reported height differs by at most {CLOSE:.0%} or {CLOSE_MS:g} ms, and "
        "neither leaves out a request that was hit.",
        "",
        "| rate | generator | largest difference of a height, ms | same |",
        "|---|---|---|---|",
    ]
    for (rate, processes), proof in proofs.items():
        alone = proofs.get((rate, 1))
        if processes == 1 or alone is None:
            continue
        pairs = [(one.reported_ms, two.reported_ms) for one, two in zip(alone.seen, proof.seen, strict=True)]
        far = max(abs(one - two) for one, two in pairs)
        same = all(abs(one - two) <= max(CLOSE * one, CLOSE_MS) for one, two in pairs)
        named = not any(seen.missed for seen in (*alone.seen, *proof.seen))
        cells = [f"{rate:g}/s", _generator(processes), f"{far:.2f}", "yes" if same and named else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""] if len(lines) > 6 else []


def _generator(processes: int) -> str:
    return "one process" if processes == 1 else f"Locust's master with {processes} workers"


if __name__ == "__main__":
    main()
