"""What the charts of the report draw.

In: a scenario. Out: a `Panel` with the points of its charts, as the page's script reads
them. The run with the median reload spike stands for the scenario. `draw_ladder` has
the one chart of several scenarios.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikeless.bench.analysis import Reload, Summary, Window, percentile
from spikeless.bench.folding import Fold
from spikeless.bench.report.table import NOTHING, Scenario, headline, milliseconds, spread_text, steady
from spikeless.bench.report.verdict import Verdict, slo_ms
from spikeless.bench.run_file import Run
from spikeless.errors import Code

#: The timeline draws the median and the slowest request of about this many bins.
_BINS = 400
_SHORTEST_BIN = 0.05
#: With more requests than this, the zoom draws only some of the fast ones, and says so.
_ZOOM_POINTS = 6000
_ZOOM_BEFORE_SECONDS = 0.5
#: The folded picture has a line through the 99th percentiles of this many bins.
_FOLD_BINS = 40
#: The list of slow requests stops here; the timeline shows all of them.
_LISTED = 200


@dataclass(frozen=True)
class Panel:
    """The run that is drawn for a scenario."""

    name: str
    run: Run
    #: Which one it is, as in ``run 1 of 2``; empty where there is only one.
    which: str
    summary: Summary
    #: What the page's script draws.
    picture: dict[str, Any]
    fold: Fold
    #: The slowest and the failed requests, at most `_LISTED`.
    slow: Sequence[dict[str, Any]]
    #: How many there are in all.
    slow_count: int


def draw(scenario: Scenario) -> Panel:
    run, summary = scenario.runs[scenario.shown], scenario.summaries[scenario.shown]
    picture = _picture(scenario.name, run, summary)
    picture["fold"] = _folded_picture(scenario) if scenario.fold.enough else None
    which = f"run {scenario.shown + 1} of {len(scenario.runs)}" if len(scenario.runs) > 1 else ""
    picture["which"] = which
    return Panel(scenario.name, run, which, summary, picture, scenario.fold, *_slow_list(run))


def draw_ladder(scenarios: Sequence[Scenario], verdict: Verdict) -> dict[str, Any]:
    """The headline figure of each scenario beside the steady one, and each reload's."""
    spreads, calm = [headline(one) for one in scenarios], [steady(one) for one in scenarios]
    return {
        "name": [one.name for one in scenarios],
        "ms": [round(spread.middle, 3) for spread in spreads],
        "interval": [
            [round(spread.low, 3), round(spread.high, 3)] if spread.interval else None for spread in spreads
        ],
        "text": [spread_text(spread) for spread in spreads],
        "steady": [round(spread.middle, 3) for spread in calm],
        "held": list(verdict.held),
        "slo": [slo_ms(one) for one in scenarios],
        "reloads": [
            [
                round(swap.window.p99_9, 3)
                for number in one.clean
                for swap in one.summaries[number].reloads
                if swap.window.requests
            ]
            for one in scenarios
        ],
    }


def _picture(name: str, run: Run, summary: Summary) -> dict[str, Any]:
    """What the page draws of one run.

    Times are seconds after the first publishing, or after the start where there is
    none.
    """
    facts = run.facts
    zero = _zero(run)
    time = run.requests["intended"] - zero
    latency = run.requests["latency"] * 1e3
    failed = run.requests["code"] != Code.OK
    slow = (latency > facts.settings.slo_ms) & ~failed
    return {
        "name": name,
        "slo": facts.settings.slo_ms,
        "span": [-zero, facts.settings.seconds - zero],
        "warm": facts.settings.warm_seconds - zero,
        "bins": _bins(time, latency),
        "slow": _points(run, time, slow),
        "failed": _points(run, time, failed),
        "marks": [mark for swap in summary.reloads for mark in _marks(swap, zero)],
        "tracks": _tracks(run, zero),
        "memory": {
            "t": _rounded(run.samples["t"] - zero, 2),
            "private": _rounded(run.samples["rss_anon"] / 2**20, 1),
            "file": _rounded(run.samples["rss_file"] / 2**20, 1),
        },
        "zoom": _zoom(run, _shown_reload(summary), slow, failed) if summary.reloads else None,
    }


def _zero(run: Run) -> float:
    """The moment that the times in a run's pictures count from."""
    return run.facts.publishes[0].begin if run.facts.publishes else 0.0


def _shown_reload(summary: Summary) -> Reload:
    """The reload with the median spike, of the clean ones if there are any."""
    reloads = [swap for swap in summary.reloads if swap.clean] or summary.reloads
    median = statistics.median_low(swap.window.max for swap in reloads)
    return next((swap for swap in reloads if swap.window.max == median), reloads[0])


def _zoom(run: Run, swap: Reload, slow: NDArray[np.bool_], failed: NDArray[np.bool_]) -> dict[str, Any]:
    """One swap, request by request. Times are seconds after its publishing began."""
    zero = swap.window.begin
    time = run.requests["intended"] - zero
    begin, end = -_ZOOM_BEFORE_SECONDS, swap.window.end - zero
    inside = (time >= begin) & (time < end)
    keep, step = _thinned(inside, slow, failed)
    return {
        "span": [begin, end],
        "old": swap.old_version,
        "new": swap.new_version,
        "thinned": step if step > 1 else 0,
        "marks": _marks(swap, zero),
        "tracks": _tracks(run, zero, begin, end),
        "failed": _points(run, time, inside & failed),
        "points": [
            {"version": int(version), **_points(run, time, keep & (run.requests["version"] == version))}
            for version in np.unique(run.requests["version"][keep])
        ],
    }


def _thinned(
    inside: NDArray[np.bool_], slow: NDArray[np.bool_], failed: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], int]:
    """A mask of all slow requests and every n-th fast one; and n. Limits the points."""
    step = max(1, math.ceil(np.count_nonzero(inside) / _ZOOM_POINTS))
    keep = inside & slow
    keep[np.flatnonzero(inside & ~slow & ~failed)[::step]] = True
    return keep, step


def _folded_picture(scenario: Scenario) -> dict[str, Any]:
    """All usable reloads over each other, and their controls.

    Times are seconds after the begin of each window.
    """
    pairs = [(scenario.runs[number], swap) for number, swap in scenario.fold.pairs]
    swaps = [swap for _, swap in pairs]
    return {
        "seconds": round(scenario.fold.seconds, 3),
        "count": len(pairs),
        "reload": _overlaid([(run, swap.window, swap.new_version) for run, swap in pairs]),
        "control": _overlaid([(run, swap.control, None) for run, swap in pairs if swap.control]),
        "marks": [
            {"t": round(statistics.median(times), 3), "label": label}
            for label, times in (
                ("available", [swap.swap_seconds for swap in swaps if swap.swap_seconds is not None]),
                ("old ended", [swap.ended for swap in swaps if swap.ended is not None]),
            )
        ],
    }


def _overlaid(parts: Sequence[tuple[Run, Window, int | None]]) -> dict[str, Any]:
    """The requests of several windows together: points, and a line of percentiles.

    A part is a run, its window, and the version whose requests are marked as new.
    """
    time, latency, new, slow, failed = (
        np.concatenate(column) for column in zip(*map(_part, parts), strict=True)
    )
    keep, step = _thinned(np.ones(len(time), bool), slow, failed)
    keep |= failed
    seconds = max(window.end - window.begin for _, window, _ in parts)
    bin = np.minimum((time / seconds * _FOLD_BINS).astype(int), _FOLD_BINS - 1)
    filled = np.unique(bin)
    return {
        "t": _rounded(time[keep], 3),
        "ms": _rounded(latency[keep], 3),
        "new": new[keep].tolist(),
        "failed": failed[keep].tolist(),
        "thinned": step if step > 1 else 0,
        "line": {
            "t": _rounded((filled + 0.5) / _FOLD_BINS * seconds, 3),
            "ms": [round(percentile(latency[bin == number], 0.99), 3) for number in filled],
        },
    }


def _part(part: tuple[Run, Window, int | None]) -> tuple[NDArray[Any], ...]:
    run, window, version = part
    inside = (run.requests["intended"] >= window.begin) & (run.requests["intended"] < window.end)
    latency = run.requests["latency"][inside] * 1e3
    failed = run.requests["code"][inside] != Code.OK
    return (
        run.requests["intended"][inside] - window.begin,
        latency,
        run.requests["version"][inside] == version,
        (latency > run.facts.settings.slo_ms) & ~failed,
        failed,
    )


def _bins(time: NDArray[Any], latency: NDArray[Any]) -> dict[str, Any]:
    """The median and the slowest request of each bin."""
    if not len(time):
        return {"t": [], "median": [], "slowest": [], "width": 0.0}
    width = max(_SHORTEST_BIN, float(time[-1] - time[0]) / _BINS)
    number = np.floor((time - time[0]) / width).astype(int)
    edges = np.searchsorted(number, np.arange(number[-1] + 2))
    filled = [(bin, a, b) for bin, (a, b) in enumerate(itertools.pairwise(edges)) if b > a]
    return {
        "t": _rounded(np.array([time[0] + (bin + 0.5) * width for bin, _, _ in filled]), 3),
        "median": _rounded(np.array([np.median(latency[a:b]) for _, a, b in filled]), 3),
        "slowest": _rounded(np.array([latency[a:b].max() for _, a, b in filled]), 3),
        "width": round(width * 1e3),
    }


def _points(run: Run, time: NDArray[Any], mask: NDArray[np.bool_]) -> dict[str, list[Any]]:
    return {
        "t": _rounded(time[mask], 4),
        "ms": _rounded(run.requests["latency"][mask] * 1e3, 3),
        "text": [
            f"v{version}" if code == Code.OK else Code(int(code)).name
            for version, code in zip(run.requests["version"][mask], run.requests["code"][mask], strict=True)
        ],
    }


def _marks(swap: Reload, zero: float) -> list[dict[str, Any]]:
    """When the new version was published and available, and when the old one ended."""
    begin = swap.window.begin - zero
    marks = [{"t": round(begin, 3), "label": swap.what, "kind": "publish"}]
    if swap.swap_seconds is not None:
        label = f"v{swap.new_version} available"
        marks.append({"t": round(begin + swap.swap_seconds, 3), "label": label, "kind": "state"})
    if swap.ended is not None:
        label = f"v{swap.old_version} ended"
        marks.append({"t": round(begin + swap.ended, 3), "label": label, "kind": "state"})
    return marks


def _tracks(run: Run, zero: float, begin: float = -math.inf, end: float = math.inf) -> list[dict[str, Any]]:
    """The states of the versions, from `begin` to `end` after `zero`.

    Versions that do not overlap share a track; each segment names its own.
    """
    begin, end = max(begin, -zero), min(end, run.facts.settings.seconds - zero)
    tracks: list[list[dict[str, Any]]] = []
    for model, version in sorted({(change.model, change.version) for change in run.facts.states}):
        changes = [
            change for change in run.facts.states if (change.model, change.version) == (model, version)
        ]
        until = [change.t - zero for change in changes[1:]] + [end]
        segments = [
            {
                "version": version,
                "from": round(max(change.t - zero, begin), 3),
                "to": round(min(stop, end), 3),
                "state": change.state,
            }
            for change, stop in zip(changes, until, strict=True)
            if stop > begin and change.t - zero < end and change.state not in ("END", "GONE")
        ]
        if segments:
            free = (track for track in tracks if track[-1]["to"] <= segments[0]["from"])
            track = next(free, None)
            if track is None:
                tracks.append(segments)
            else:
                track += segments
    return [{"label": str(number), "segments": track} for number, track in enumerate(tracks)]


def _slow_list(run: Run) -> tuple[list[dict[str, Any]], int]:
    """The values of `Panel.slow` and `Panel.slow_count`."""
    zero = _zero(run)
    requests = run.requests
    worth = np.flatnonzero(
        (requests["latency"] * 1e3 > run.facts.settings.slo_ms) | (requests["code"] != Code.OK)
    )
    slowest = worth[np.argsort(-requests["latency"][worth], kind="stable")][:_LISTED]
    return [
        {
            "t": f"{requests['intended'][index] - zero:+.3f} s",
            "latency": milliseconds(float(requests["latency"][index]) * 1e3),
            "lag": milliseconds(float(requests["lag"][index]) * 1e3),
            "version": int(requests["version"][index]) or NOTHING,
            "code": Code(int(requests["code"][index])).name,
        }
        for index in slowest
    ], len(worth)


def _rounded(values: NDArray[Any], digits: int) -> list[float]:
    rounded: list[float] = np.round(values, digits).tolist()
    return rounded
