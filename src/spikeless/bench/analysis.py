"""From raw results to numbers: the windows of a run and what its requests felt in them.

In: a `Run`. Out: a `Summary`. Every percentile is taken from all latencies of its window and is one of them
(the smallest that at least that share of the requests did not exceed); failed requests count with the rest.

Windows, by the intended start of a request:

steady  after the warm seconds, before publishing began (or until the end where nothing was published)
reload  from the beginning of publishing until one second after the old version was first seen at its end
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikeless.bench.record import Run
from spikeless.bench.watch import GONE
from spikeless.errors import Code, InvalidArgument

AFTER_END_SECONDS = 1.0
#: A window in which the hypervisor took more than this share of the processors' time is contaminated.
STEAL_LIMIT = 0.02
#: So is one in which more than this share of requests left later than `LATE_SECONDS`: the generator was
#: behind.
LATE_LIMIT = 0.01
LATE_SECONDS = 0.005

RULES = (
    f"A window counts as contaminated when the hypervisor took more than {STEAL_LIMIT:.0%} of the "
    f"processors' time in it (steal, /proc/stat), or when more than {LATE_LIMIT:.0%} of its requests left "
    f"the generator more than {LATE_SECONDS * 1e3:g} ms late. These rules were fixed before any run; "
    "contaminated windows are marked, and medians over repeats leave them out where a clean repeat exists."
)


@dataclass(frozen=True)
class Window:
    """The requests of a stretch of time. Times in seconds after the run's start, latencies in milliseconds.

    codes: gRPC status -> count. steal: share of processor time, None when unknown. late: share of requests
    that left late. contaminated: the rules that it broke, in words.
    """

    begin: float
    end: float
    requests: int
    p50: float
    p99: float
    p99_9: float
    max: float
    codes: dict[str, int]
    steal: float | None
    late: float
    contaminated: Sequence[str]

    @property
    def failed(self) -> int:
        return self.requests - self.codes.get(Code.OK.name, 0)


@dataclass(frozen=True)
class Summary:
    """What a run shows.

    reload is None when nothing was published. height_ms and ratio: the reload's maximum, and its p99.9 by
    that of the steady window. width_ms: from the first to the last request over the SLO within the reload.
    over_slo: how many those were. first_ms: latency of the first request that the new version answered.
    served: version -> requests. failed: requests of the whole run that did not end in OK. swap_seconds:
    from publishing until the new version was first seen AVAILABLE. memory_*: largest private (anon) and
    file-backed bytes in the steady window and from publishing on.
    """

    steady: Window
    reload: Window | None
    ratio: float | None
    height_ms: float | None
    width_ms: float | None
    over_slo: int
    first_ms: float | None
    old_version: int | None
    new_version: int | None
    served: dict[int, int]
    codes: dict[str, int]
    swap_seconds: float | None
    memory_before: int | None
    memory_peak: int | None
    memory_after: int | None
    notes: Sequence[str]

    @property
    def failed(self) -> int:
        return sum(count for code, count in self.codes.items() if code != Code.OK.name)


def percentile(values: NDArray[np.float64], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of all values do not exceed; NaN without values."""
    if not len(values):
        return float("nan")
    return float(np.quantile(values, share, method="inverted_cdf"))


def analyse(run: Run) -> Summary:
    """The numbers of a run.

    Raises:
        InvalidArgument: no request of the run falls into its steady window.
    """
    settings, published = run.facts.settings, run.facts.publish
    intended, latency = run.requests["intended"], run.requests["latency"]
    versions = run.requests["version"]
    notes = list(run.facts.notes)
    end = max(settings.seconds, float(intended[-1]) if len(intended) else 0.0)

    steady = _window(run, settings.warm_seconds, published.begin if published else end)
    if not steady.requests:
        raise InvalidArgument(
            f"run {run.facts.scenario!r} of {run.facts.started} has no request in its steady window "
            f"({steady.begin:g} to {steady.end:g} s)"
        )
    served = {
        int(version): int(count)
        for version, count in zip(*np.unique(versions[versions > 0], return_counts=True), strict=True)
    }
    codes = _codes(run.requests["code"])
    memory = run.samples["rss_anon"]
    sampled = run.samples["t"]
    if published is None:
        before = memory[sampled >= settings.warm_seconds]
        return Summary(
            steady,
            None,
            None,
            None,
            None,
            0,
            None,
            None,
            None,
            served,
            codes,
            None,
            _last(before),
            None,
            None,
            notes,
        )

    old, new, available, ended = _swap(run)
    if new is None:
        notes.append("No new version was seen AVAILABLE after publishing.")
    if ended is None:
        notes.append("The old version was not seen to end: the reload window runs to the end of the load.")
    reload = _window(run, published.begin, min(end, ended + AFTER_END_SECONDS) if ended is not None else end)
    inside = (intended >= reload.begin) & (intended < reload.end)
    slow = intended[inside & (latency * 1e3 > settings.slo_ms)]
    on_new = np.flatnonzero(versions == new) if new is not None else np.zeros(0, np.int64)
    return Summary(
        steady=steady,
        reload=reload,
        ratio=reload.p99_9 / steady.p99_9 if reload.requests else None,
        height_ms=reload.max if reload.requests else None,
        width_ms=float(slow[-1] - slow[0]) * 1e3 if len(slow) else 0.0,
        over_slo=len(slow),
        first_ms=float(latency[on_new[0]]) * 1e3 if len(on_new) else None,
        old_version=old,
        new_version=new,
        served=served,
        codes=codes,
        swap_seconds=available - published.begin if available is not None else None,
        memory_before=_last(memory[sampled < published.begin]),
        memory_peak=_largest(memory[(sampled >= reload.begin) & (sampled < reload.end)]),
        memory_after=_last(memory),
        notes=notes,
    )


def _swap(run: Run) -> tuple[int | None, int | None, float | None, float | None]:
    """Old and new version, and when the new one was first seen AVAILABLE and the old one at its end."""
    assert run.facts.publish is not None
    moment = run.facts.publish.begin
    before = [change for change in run.facts.states if change.t < moment]
    after = [change for change in run.facts.states if change.t >= moment]
    last = {change.version: change.state for change in before}
    old = max((version for version, state in last.items() if state == "AVAILABLE"), default=None)
    arrived = [change for change in after if change.state == "AVAILABLE" and change.version != old]
    gone = [change for change in after if change.version == old and change.state in ("END", GONE)]
    return (
        old,
        arrived[0].version if arrived else None,
        arrived[0].t if arrived else None,
        gone[0].t if gone else None,
    )


def _window(run: Run, begin: float, end: float) -> Window:
    intended = run.requests["intended"]
    inside = (intended >= begin) & (intended < end)
    latency = run.requests["latency"][inside] * 1e3
    late = float(np.mean(run.requests["lag"][inside] > LATE_SECONDS)) if len(latency) else 0.0
    steal = _steal(run.samples, begin, end)
    contaminated = []
    if steal is not None and steal > STEAL_LIMIT:
        contaminated.append(f"the hypervisor took {steal:.1%} of the processors' time")
    if late > LATE_LIMIT:
        contaminated.append(f"{late:.1%} of the requests left more than {LATE_SECONDS * 1e3:g} ms late")
    return Window(
        begin=begin,
        end=end,
        requests=len(latency),
        p50=percentile(latency, 0.5),
        p99=percentile(latency, 0.99),
        p99_9=percentile(latency, 0.999),
        max=percentile(latency, 1.0),
        codes=_codes(run.requests["code"][inside]),
        steal=steal,
        late=late,
        contaminated=tuple(contaminated),
    )


def _codes(codes: NDArray[Any]) -> dict[str, int]:
    return {
        Code(int(code)).name: int(count)
        for code, count in zip(*np.unique(codes, return_counts=True), strict=True)
    }


def _steal(samples: dict[str, NDArray[Any]], begin: float, end: float) -> float | None:
    inside = (samples["t"] >= begin) & (samples["t"] < end)
    total, steal = samples["cpu_total"][inside], samples["cpu_steal"][inside]
    if len(total) < 2 or total[-1] == total[0]:
        return None
    return float((steal[-1] - steal[0]) / (total[-1] - total[0]))


def _last(values: NDArray[Any]) -> int | None:
    return int(values[-1]) if len(values) else None


def _largest(values: NDArray[Any]) -> int | None:
    return int(values.max()) if len(values) else None
