"""From raw results to numbers: the windows of a run, and the latencies in them.

In: a `Run`. Out: a `Summary`. A percentile is one of the latencies of its window: the
smallest that at least that share of the requests do not exceed. Failed requests count.

Windows, by the intended start of a request:

steady   after the warm seconds, until publishing began (or to the end without any);
         of a start, from the first answer within the SLO on
reload   from the beginning of publishing until one second after the old version
         was seen to have ended; of several versions (`spikeless.bench.events`) from the
         first beginning until a second after the last end
control  for each reload, a window of the same length without a reload, in the middle of
         the quiet time before it, which begins after the last reload or warm second
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikeless.bench.events import PUBLISH_ALL, START, STORM, UNLOAD
from spikeless.bench.run_file import Publish, Run
from spikeless.bench.watch import GONE, StateChange
from spikeless.errors import Code, InvalidArgument

AFTER_END_SECONDS = 1.0
#: A window is contaminated when the hypervisor took more than this share of the
#: processors' time,
STEAL_LIMIT = 0.02
#: or when more than this share of the requests left later than `LATE_SECONDS`.
LATE_LIMIT = 0.01
LATE_SECONDS = 0.005

RULES = (
    f"A window counts as contaminated when the hypervisor took more than {STEAL_LIMIT:.0%} of the "
    f"processors' time in it (steal, /proc/stat), or when more than {LATE_LIMIT:.0%} of its requests left "
    f"the generator more than {LATE_SECONDS * 1e3:g} ms late. A reload that was not seen to end before the "
    "next version was published does not count either. Where a run has clean reloads, its reload figures "
    "come from these alone; where a scenario has clean runs, its medians do. These rules were fixed before "
    "any run."
)


@dataclass(frozen=True)
class Window:
    """The requests of one or more spans of time. Latencies are in milliseconds."""

    #: Of the first span, in seconds after the start of the run.
    begin: float
    #: Of the last span.
    end: float
    requests: int
    p50: float
    p99: float
    p99_9: float
    max: float
    #: gRPC status -> requests.
    codes: dict[str, int]
    #: Share of the processors' time that the hypervisor took; None: unknown.
    steal: float | None
    #: Share of the requests that left late.
    late: float
    #: The rules that it breaks, in words.
    contaminated: Sequence[str]

    @property
    def failed(self) -> int:
        return self.requests - self.codes.get(Code.OK.name, 0)


@dataclass(frozen=True)
class Reload:
    """One event of a run, mostly a swap.

    Versions and times are None when they were not seen. Of several models, versions are
    those of the first, and times the latest of all.
    """

    #: Such as ``publish v2``, ``unload v1``, ``storm v2 to v21``.
    what: str
    window: Window
    #: The window to compare with; None where the quiet time before is too short.
    control: Window | None
    #: What was not seen before the next publishing or the end of the load, in words.
    incomplete: Sequence[str]
    old_version: int | None
    new_version: int | None
    #: From publishing until the new version was first seen AVAILABLE.
    swap_seconds: float | None
    #: When the old version was first seen to have ended, in seconds after publishing.
    ended: float | None
    #: Whether a new version became AVAILABLE, or the one to unload ended.
    happened: bool
    #: Latency of the first request that the new version answered; None for a version
    #: of another model.
    first_ms: float | None
    #: How many requests were over the SLO,
    over_slo: int
    #: and the time from the first to the last of them.
    width_ms: float

    @property
    def clean(self) -> bool:
        return not self.incomplete and not self.window.contaminated


@dataclass(frozen=True)
class Startup:
    """How soon a server answers, in seconds after its exec."""

    #: The first successful answer,
    answered: float
    #: and the first whose latency was within the SLO.
    within_slo: float


@dataclass(frozen=True)
class Summary:
    """What a run shows."""

    steady: Window
    #: Every swap, in order.
    reloads: Sequence[Reload]
    #: All clean reloads together, or where none is clean all that a new version came
    #: with; None without any. The figures below come from the same reloads.
    reload: Window | None
    #: Its p99.9 relative to the steady one.
    ratio: float | None
    #: Its maximum.
    height_ms: float | None
    #: Median of the reloads; so are over_slo, first_ms and swap_seconds.
    width_ms: float | None
    over_slo: float
    first_ms: float | None
    #: Before the first swap.
    old_version: int | None
    #: After the last.
    new_version: int | None
    #: Version -> requests of the whole run.
    served: dict[int, int]
    #: gRPC status -> requests of the whole run; of a start, since its first answer.
    codes: dict[str, int]
    #: Of a run that is a start.
    startup: Startup | None
    #: How many versions were published, or unloaded, and
    published: int
    #: how many became AVAILABLE since the first was.
    loaded: int
    swap_seconds: float | None
    #: Private (anonymous) memory in bytes just before the first publishing,
    memory_before: int | None
    #: the largest during the reloads,
    memory_peak: int | None
    #: and at the end.
    memory_after: int | None
    notes: Sequence[str]

    @property
    def counted(self) -> Sequence[Reload]:
        """The reloads that `reload` and the figures after it come from."""
        return _counted(self.reloads)

    @property
    def failed(self) -> int:
        return sum(count for code, count in self.codes.items() if code != Code.OK.name)


def _counted(reloads: Sequence[Reload]) -> Sequence[Reload]:
    """Those that figures come from: without a new version there is no swap."""
    swapped = [swap for swap in reloads if swap.happened]
    return [swap for swap in swapped if swap.clean] or swapped


def percentile(values: NDArray[np.float64], share: float) -> float:
    """The smallest value that a `share` of all do not exceed; NaN without any."""
    if not len(values):
        return float("nan")
    return float(np.quantile(values, share, method="inverted_cdf"))


def analyse(run: Run) -> Summary:
    """The numbers of a run.

    Raises:
        InvalidArgument: no request of the run falls into its steady window.
    """
    settings, published = run.facts.settings, run.facts.publishes
    intended, versions = run.requests["intended"], run.requests["version"]
    # On a machine that stalls, publishing can begin after the end of the load.
    end = max(settings.seconds, *intended[-1:].tolist(), *(publish.begin for publish in published))
    startup = _startup(run) if settings.event == START else None
    begin = settings.warm_seconds if startup is None else startup.within_slo
    steady = _window(run, [(begin, published[0].begin if published else end)])
    if not steady.requests:
        raise InvalidArgument(
            f"run {run.facts.scenario!r} of {run.facts.started} has no request in its steady window "
            f"({steady.begin:g} to {steady.end:g} s)"
        )
    reloads = _reloads(run, end)
    counted = _counted(reloads)
    reload = _window(run, [(swap.window.begin, swap.window.end) for swap in counted]) if counted else None
    memory, sampled = run.samples["rss_anon"], run.samples["t"]
    before = (sampled >= settings.warm_seconds) & (sampled < steady.end)
    swapped = [(swap.window.begin, swap.window.end) for swap in reloads if swap.happened]
    during = _inside(sampled, swapped)
    return Summary(
        steady=steady,
        reloads=reloads,
        reload=reload,
        ratio=reload.p99_9 / steady.p99_9 if reload and reload.requests else None,
        height_ms=reload.max if reload and reload.requests else None,
        width_ms=_median(swap.width_ms for swap in counted),
        over_slo=_median(swap.over_slo for swap in counted) or 0,
        first_ms=_median(swap.first_ms for swap in counted),
        old_version=reloads[0].old_version if reloads else None,
        new_version=reloads[-1].new_version if reloads else None,
        served={
            int(version): int(count)
            for version, count in zip(*np.unique(versions[versions > 0], return_counts=True), strict=True)
        },
        codes=_codes(run.requests["code"][intended >= (startup.answered if startup else 0.0)]),
        startup=startup,
        published=len(published),
        loaded=sum(
            change.state == "AVAILABLE" and change.t >= published[0].begin for change in run.facts.states
        )
        if published
        else 0,
        swap_seconds=_median(swap.swap_seconds for swap in counted),
        memory_before=_last(memory[before]),
        memory_peak=_largest(memory[during]),
        memory_after=_last(memory) if swapped else None,
        notes=[
            *run.facts.notes,
            *(
                f"Reload {number}: {what}."
                for number, swap in enumerate(reloads, start=1)
                for what in swap.incomplete
            ),
        ],
    )


def _startup(run: Run) -> Startup:
    latency, good = run.requests["latency"], run.requests["code"] == Code.OK
    ends = run.requests["intended"] + latency
    soon = good & (latency * 1e3 <= run.facts.settings.slo_ms)
    if not soon.any():
        raise InvalidArgument(
            f"run {run.facts.scenario!r} of {run.facts.started} has no answer within "
            f"{run.facts.settings.slo_ms:g} ms"
        )
    return Startup(float(ends[good].min()), float(ends[soon].min()))


def latencies(run: Run, window: Window) -> NDArray[np.float64]:
    """The latencies of a window's requests, in milliseconds."""
    inside = _inside(run.requests["intended"], [(window.begin, window.end)])
    milliseconds: NDArray[np.float64] = run.requests["latency"][inside] * 1e3
    return milliseconds


def _reloads(run: Run, end: float) -> list[Reload]:
    """Every event of the run; `end` is that of the load."""
    settings, publishes = run.facts.settings, run.facts.publishes
    counts = {PUBLISH_ALL: len(settings.published_models), STORM: len(publishes)}
    together = max(1, counts.get(settings.event, 1))
    groups = [publishes[first : first + together] for first in range(0, len(publishes), together)]
    quiet = settings.warm_seconds
    reloads = []
    limits = [*(group[0].begin for group in groups), end][1:]
    for group, limit in zip(groups, limits, strict=True):
        reloads.append(_reload(run, quiet, group, limit))
        quiet = reloads[-1].window.end
    return reloads


def _reload(run: Run, quiet: float, group: Sequence[Publish], limit: float) -> Reload:
    """The event that these publishings were, after quiet time from `quiet` on.

    What happens after `limit` is not part of it.
    """
    settings, begin = run.facts.settings, group[0].begin
    unload = settings.event == UNLOAD
    first_of: dict[str, Publish] = {}
    for publish in group:
        first_of.setdefault(publish.model, publish)
    follow = {UNLOAD: _unloaded, STORM: _stormed}.get(settings.event, _swap)
    found = [follow(run, publish, limit) for publish in first_of.values()]
    old, new = found[0].old, found[0].new
    available = _latest(one.available for one in found)
    ended = _latest(one.ended for one in found)
    until = limit if ended is None else min(limit, ended + AFTER_END_SECONDS)
    incomplete = []
    if not unload and available is None:
        incomplete.append("no new version was seen AVAILABLE")
    if ended is None:
        incomplete.append(
            "the old version was not seen to end, so its window runs to the next publishing or the end"
        )
    spare = begin - quiet - (until - begin)
    control = _window(run, [(quiet + spare / 2, begin - spare / 2)]) if spare >= 0 else None

    intended, latency = run.requests["intended"], run.requests["latency"] * 1e3
    slow = intended[_inside(intended, [(begin, until)]) & (latency > settings.slo_ms)]
    on_new = np.zeros(0, np.int64)
    if new is not None and not group[0].model:
        on_new = np.flatnonzero(run.requests["version"] == new)
    return Reload(
        what=_what(settings.event, group, old, new),
        window=_window(run, [(begin, until)]),
        control=control,
        incomplete=incomplete,
        old_version=old,
        new_version=new,
        swap_seconds=available - begin if available is not None else None,
        ended=ended - begin if ended is not None else None,
        happened=(ended if unload else available) is not None,
        first_ms=float(latency[on_new[0]]) if len(on_new) else None,
        over_slo=len(slow),
        width_ms=float(slow[-1] - slow[0]) * 1e3 if len(slow) else 0.0,
    )


@dataclass(frozen=True)
class _Change:
    """What happened to a model: versions, and times after the start of the run."""

    old: int | None
    new: int | None
    #: When the new version was first seen AVAILABLE,
    available: float | None
    #: and when the old one, or all old ones, had ended.
    ended: float | None


_ENDED = ("END", GONE)


def _states(run: Run, publish: Publish, limit: float) -> tuple[dict[int, str], list[StateChange]]:
    """States of the published model before it was, and their changes until `limit`."""
    changes = [change for change in run.facts.states if change.model == publish.model]
    last = {change.version: change.state for change in changes if change.t < publish.begin}
    return last, [change for change in changes if publish.begin <= change.t < limit]


def _swap(run: Run, publish: Publish, limit: float) -> _Change:
    last, after = _states(run, publish, limit)
    old = max((version for version, state in last.items() if state == "AVAILABLE"), default=None)
    arrived = [change for change in after if change.state == "AVAILABLE" and change.version != old]
    gone = [change for change in after if change.version == old and change.state in _ENDED]
    return _Change(
        old,
        arrived[0].version if arrived else None,
        arrived[0].t if arrived else None,
        gone[0].t if gone else None,
    )


def _stormed(run: Run, publish: Publish, limit: float) -> _Change:
    """From the first of many publishings until only the newest version is left."""
    last, after = _states(run, publish, limit)
    old = max((version for version, state in last.items() if state == "AVAILABLE"), default=None)
    arrived = [change for change in after if change.state == "AVAILABLE" and change.version != old]
    if not arrived:
        return _Change(old, None, None, None)
    newest = max(arrived, key=lambda change: change.version)
    states = last | {change.version: change.state for change in after}
    left = [version for version, state in states.items() if version != newest.version and state not in _ENDED]
    gone = [change.t for change in after if change.version != newest.version and change.state in _ENDED]
    return _Change(old, newest.version, newest.t, None if left else max(gone, default=None))


def _unloaded(run: Run, publish: Publish, limit: float) -> _Change:
    _, after = _states(run, publish, limit)
    gone = [
        change for change in after if change.state in _ENDED and publish.version in (None, change.version)
    ]
    return _Change(gone[0].version if gone else publish.version, None, None, gone[0].t if gone else None)


def _what(name: str, group: Sequence[Publish], old: int | None, new: int | None) -> str:
    if name == UNLOAD:
        return f"unload v{old or '?'}"
    if name == PUBLISH_ALL:
        return f"publish {', '.join(publish.model for publish in group)}"
    first = group[0].version
    return f"storm v{first or '?'} to v{new or '?'}" if name == STORM else f"publish v{new or '?'}"


def _latest(times: Iterable[float | None]) -> float | None:
    """The last of these times; None where one is missing."""
    known = list(times)
    return None if None in known else max(time for time in known if time is not None)


#: Begin and end in seconds after the start of the run; the end is not part of it.
_Span = tuple[float, float]


def _window(run: Run, spans: Sequence[_Span]) -> Window:
    """The window that consists of one or more spans, in ascending order."""
    inside = _inside(run.requests["intended"], spans)
    latency = run.requests["latency"][inside] * 1e3
    late = float(np.mean(run.requests["lag"][inside] > LATE_SECONDS)) if len(latency) else 0.0
    steal = _steal(run.samples, spans)
    contaminated = []
    if steal is not None and steal > STEAL_LIMIT:
        contaminated.append(f"the hypervisor took {steal:.1%} of the processors' time")
    if late > LATE_LIMIT:
        contaminated.append(f"{late:.1%} of the requests left more than {LATE_SECONDS * 1e3:g} ms late")
    return Window(
        begin=spans[0][0],
        end=spans[-1][1],
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


def _steal(samples: dict[str, NDArray[Any]], spans: Sequence[_Span]) -> float | None:
    total = steal = 0
    for span in spans:
        inside = np.flatnonzero(_inside(samples["t"], [span]))
        if len(inside):
            first, last = inside[0], inside[-1]
            total += int(samples["cpu_total"][last] - samples["cpu_total"][first])
            steal += int(samples["cpu_steal"][last] - samples["cpu_steal"][first])
    return steal / total if total else None


def _inside(times: NDArray[Any], spans: Sequence[_Span]) -> NDArray[np.bool_]:
    inside = np.zeros(len(times), bool)
    for begin, end in spans:
        inside |= (times >= begin) & (times < end)
    return inside


def _median(values: Iterable[float | None]) -> float | None:
    """The median of what is known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _last(values: NDArray[Any]) -> int | None:
    return int(values[-1]) if len(values) else None


def _largest(values: NDArray[Any]) -> int | None:
    return int(values.max()) if len(values) else None
