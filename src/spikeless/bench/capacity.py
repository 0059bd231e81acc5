"""What a server can do: the highest rate at which it keeps up, found by bracketing.

In: the settings of a load, a server. Out: a `Capacity` with every rate that was tried.

A server keeps up with a rate when, over a few seconds of open-loop load, no request
fails and no backlog grows: the median latency of the last third stays below
`BACKLOG_MS`. The rate is doubled until the server does not keep up, then the gap is
halved until it is narrow. The search needs no load of its own: it is the load of
`spikeless.bench.scenario.run`, without publishing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from spikeless.bench.analysis import percentile
from spikeless.bench.run_file import Run, ServerFacts, Settings
from spikeless.bench.scenario import run
from spikeless.errors import Code, FailedPrecondition

BACKLOG_MS = 100.0
PROBE_SECONDS = 3.0
FIRST_RATE = 50.0
#: What one process of the generator is asked for at most, in requests per second.
HIGHEST_RATE = 20_000.0
#: The bracket is narrow when its ends differ by this share.
NARROW = 0.1


@dataclass(frozen=True)
class Probe:
    """A rate that was tried."""

    #: Requests per second.
    rate: float
    #: Median of the last third, in milliseconds.
    backlog_ms: float
    failed: int

    @property
    def kept_up(self) -> bool:
        return not self.failed and self.backlog_ms <= BACKLOG_MS

    def __str__(self) -> str:
        told = "kept up" if self.kept_up else "did not keep up"
        failed = f", {self.failed:,} failed" if self.failed else ""
        return f"{self.rate:.0f}/s {told} ({self.backlog_ms:.1f} ms at the end{failed})"


@dataclass(frozen=True)
class SloProbe(Probe):
    """A rate that was tried, judged by the 99th percentile of its latency."""

    p99_ms: float
    slo_ms: float

    @property
    def kept_up(self) -> bool:
        return not self.failed and self.p99_ms <= self.slo_ms


@dataclass(frozen=True)
class Capacity:
    """The result of a search."""

    #: The highest rate that the server kept up with.
    rate: float
    #: In order.
    probes: Sequence[Probe]

    def __str__(self) -> str:
        return f"{self.rate:.0f}/s: " + "; ".join(map(str, self.probes))


def find_capacity(
    settings: Settings,
    server: ServerFacts,
    tell: Callable[[Probe], object] = lambda probe: None,
    judge: Callable[[Run], Probe] | None = None,
    narrow: float = NARROW,
    seconds: float = PROBE_SECONDS,
) -> Capacity:
    """Search the highest rate with the requests and arrivals of `settings`.

    `tell` gets each probe when it is over. `judge` decides what keeping up is, by
    default `judge_probe`. The bracket is `narrow` when its ends differ by this share. A
    rate is tried for so many `seconds`.

    Raises:
        FailedPrecondition: the server does not keep up even with `FIRST_RATE`, or the
            generator reached its own limit first.
        SpikelessError: what `spikeless.bench.scenario.run` raises.
    """

    def probe(rate: float) -> Probe:
        load = dataclasses.replace(settings, rate=rate, seconds=seconds, warm_seconds=0.0, publish_at=None)
        found = (judge or judge_probe)(run("capacity", load, server))
        tell(found)
        return found

    return bracket(probe, HIGHEST_RATE * settings.processes, narrow)


def share_of_capacity(
    settings: Settings, server: ServerFacts, share: float, tell: Callable[[str], object]
) -> tuple[float, str]:
    """Search what the server can do; returns the rate that is `share` of it, and how.

    `tell` gets each probe and the result as text. Raises as `find_capacity`.
    """
    found = find_capacity(settings, server, lambda probe: tell(f"capacity: {probe}"))
    note = f"the rate is {share:.0%} of what the server keeps up with, {found}"
    tell(f"capacity: {note}")
    return round(found.rate * share, 1), note


def bracket(probe: Callable[[float], Probe], highest: float, narrow: float = NARROW) -> Capacity:
    """The highest rate up to `highest` at which `probe` keeps up.

    Raises:
        FailedPrecondition: it does not keep up with `FIRST_RATE`, or still does with
            `highest`.
    """
    probes = [probe(FIRST_RATE)]
    if not probes[0].kept_up:
        raise FailedPrecondition(
            f"the server cannot be loaded with a share of what it can do: {probes[0]}; give --rate"
        )
    low, high = FIRST_RATE, None
    while high is None:
        if low >= highest:
            raise FailedPrecondition(
                f"the server still keeps up with {low:.0f}/s, the most that is asked for; "
                "give --rate, or more --processes"
            )
        probes.append(probe(min(2 * low, highest)))
        if probes[-1].kept_up:
            low = probes[-1].rate
        else:
            high = probes[-1].rate
    while high > low * (1 + narrow):
        probes.append(probe((low + high) / 2))
        if probes[-1].kept_up:
            low = probes[-1].rate
        else:
            high = probes[-1].rate
    return Capacity(low, tuple(probes))


def judge_probe(result: Run) -> Probe:
    """What a run says of its rate."""
    settings = result.facts.settings
    codes, intended = result.requests["code"], result.requests["intended"]
    last = result.requests["latency"][intended >= settings.seconds * 2 / 3]
    backlog = float(np.median(last)) * 1e3 if len(last) else 0.0
    return Probe(settings.rate, backlog, int(np.count_nonzero(codes != Code.OK)))


def within_slo(slo_ms: float) -> Callable[[Run], SloProbe]:
    """A judge for which a server keeps up while p99 is at most `slo_ms`."""

    def judge(result: Run) -> SloProbe:
        seen = judge_probe(result)
        p99 = percentile(result.requests["latency"] * 1e3, 0.99)
        return SloProbe(seen.rate, seen.backlog_ms, seen.failed, p99, slo_ms)

    return judge
