"""Raw results become something to look at: one self-contained HTML page and a markdown table.

In: the files of `spikeless bench`. Out: ``index.html`` (no network needed) and ``summary.md`` in a directory.
Runs of one scenario are repeats: tables give the median and the spread, pictures the run whose reload spike
is the median one. Where there are several reloads they are also folded into one (`spikeless.bench.folding`).
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from spikeless import __version__
from spikeless.bench import run_file
from spikeless.bench.analysis import RULES, Reload, Summary, Window, analyse, percentile
from spikeless.bench.folding import CONFIDENCE, FIGURES, FOLD_RULES, Estimate, Fold, fold
from spikeless.bench.run_file import Run
from spikeless.disk.atomic import write_atomically
from spikeless.errors import Code, InvalidArgument

NOTHING = "-"
#: The timeline has about this many bins; in each, the median and the slowest request are drawn.
_BINS = 400
_SHORTEST_BIN = 0.05
#: The zoom draws every request, up to this many; beyond, fast ones are thinned out and the page says so.
_ZOOM_POINTS = 6000
_ZOOM_BEFORE_SECONDS = 0.5
#: The folded picture has a line through the 99th percentile of each of so many stretches.
_FOLD_BINS = 40
#: The list of slow requests stops here; the picture has them all.
_LISTED = 200
#: So many of the reloads that were left out are named.
_NAMED = 5
#: With more versions than these the requests are not counted for each.
_SERVED = 4


@dataclass(frozen=True)
class Scenario:
    """The repeats of one scenario, in the order of their start, and all of their reloads in one."""

    name: str
    runs: Sequence[Run]
    summaries: Sequence[Summary]
    fold: Fold

    @property
    def clean(self) -> list[int]:
        """Numbers of the runs whose windows are not contaminated; all of them when none is clean."""
        numbers = [
            number
            for number, summary in enumerate(self.summaries)
            if not any(w.contaminated for w in _windows(summary))
        ]
        return numbers or list(range(len(self.runs)))

    @property
    def shown(self) -> int:
        """Number of the run to draw: among the clean ones the one with the median spike."""
        heights = {number: self.summaries[number].height_ms or 0.0 for number in self.clean}
        median = statistics.median_low(heights.values())
        return next(number for number, height in heights.items() if height == median)


@dataclass(frozen=True)
class Panel:
    """The run of a scenario that is drawn: what happened, its numbers, and the points of its pictures."""

    name: str
    run: Run
    summary: Summary
    picture: dict[str, Any]
    fold: Fold
    slow: Sequence[dict[str, Any]]
    slow_count: int


@dataclass(frozen=True)
class Row:
    """A line of the summary table: a label, what it means, and one cell per scenario."""

    label: str
    hint: str
    cells: Sequence[str]


def write(results: Sequence[str | os.PathLike[str]], directory: str | os.PathLike[str]) -> Path:
    """Read raw results and write the report; returns the path of the page.

    Raises:
        InvalidArgument: there are no results, or a run has no steady window.
        NotFound, DataLoss: a result cannot be read.
    """
    scenarios = group([run_file.read_run(path) for path in results])
    out = Path(directory)
    html, markdown = render_html(scenarios), render_markdown(scenarios)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "summary.md", markdown.encode())
    write_atomically(out / "index.html", html.encode())
    return out / "index.html"


def group(runs: Sequence[Run]) -> list[Scenario]:
    """Runs by scenario, in the order in which the scenarios first started."""
    if not runs:
        raise InvalidArgument("there are no results to report: give files that `spikeless bench run` wrote")
    ordered = sorted(runs, key=lambda run: run.facts.started)
    names = dict.fromkeys(run.facts.scenario for run in ordered)
    scenarios = []
    for name in names:
        mine = [run for run in ordered if run.facts.scenario == name]
        summaries = [analyse(run) for run in mine]
        scenarios.append(Scenario(name, mine, summaries, fold(mine, summaries)))
    return scenarios


def table(scenarios: Sequence[Scenario]) -> list[Row]:
    """The summary: one row per figure, one cell per scenario."""
    rows = []
    for label, hint, get, show in _FIGURES:
        cells = [_cell(scenario, get, show) for scenario in scenarios]
        rows.append(Row(label, hint, cells))
    if any(scenario.fold.enough for scenario in scenarios):
        rows += _folded_rows(scenarios)
    rows.append(Row("errors", "gRPC status of the requests that failed", [_errors(s) for s in scenarios]))
    rows.append(Row("served by", "requests per version, in the run shown", [_served(s) for s in scenarios]))
    return rows


def render_markdown(scenarios: Sequence[Scenario]) -> str:
    """The summary as a markdown table with the facts of the measurement below it."""
    lines = [
        "| | " + " | ".join(_escape(scenario.name) for scenario in scenarios) + " |",
        "|---|" + "---:|" * len(scenarios),
    ]
    lines += [f"| {row.label} | " + " | ".join(map(_escape, row.cells)) + " |" for row in table(scenarios)]
    lines += ["", *(f"- {name}: {_escape(value)}" for name, value in provenance(scenarios)), ""]
    lines += [f"- {remark}" for remark in (*warnings(scenarios), *_rules(scenarios))]
    lines.append("")
    return "\n".join(lines)


def render_html(scenarios: Sequence[Scenario]) -> str:
    """The page, with everything it needs inside."""
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spikeless.bench.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    facts = scenarios[0].runs[0].facts
    panels = [_panel(scenario) for scenario in scenarios]
    page = environment.get_template("report.html.j2").render(
        title=_title(panels[0]),
        facts=facts,
        settings=facts.settings,
        panels=panels,
        rows=table(scenarios),
        provenance=provenance(scenarios),
        warnings=warnings(scenarios),
        rules=_rules(scenarios),
        repeats=max(len(scenario.runs) for scenario in scenarios),
        milliseconds=_milliseconds,
        estimate=_estimate,
        version=__version__,
    )
    # The library goes in last: templating five megabytes of script would only cost time.
    return page.replace("/* plotly */", get_plotlyjs(), 1)


def provenance(scenarios: Sequence[Scenario]) -> list[tuple[str, str]]:
    """What was measured where; a fact on which the runs differ is given with each of its values."""
    every = [run.facts for scenario in scenarios for run in scenario.runs]

    def values(get: Callable[[run_file.Facts], str]) -> str:
        return "; ".join(dict.fromkeys(get(facts) for facts in every))

    return [
        ("started", f"{every[0].started}, {len(every)} run{'s' if len(every) > 1 else ''}"),
        (
            "machine",
            values(lambda f: f"{f.machine.cpu}, {f.machine.cpus} CPUs, {f.machine.memory / 2**30:.0f} GiB"),
        ),
        ("system", values(lambda f: f"{f.machine.system}, {f.machine.kernel}, {f.machine.architecture}")),
        ("engine", values(lambda f: f"{f.server.engine} {f.server.engine_version}")),
        ("allocator", values(lambda f: f"{f.server.allocator} ({f.server.allocator_proof})")),
        ("load", values(lambda f: _load(f.settings))),
        ("seed of the arrivals", values(lambda f: f"{f.settings.seed}")),
        ("generator's floor", values(lambda f: floor_text(f.floor))),
        (
            "source",
            values(lambda f: f"Spikeless {__version__}, commit {f.commit}, Python {f.machine.python}"),
        ),
        *((f"server, {scenario.name}", _server(scenario.runs[0].facts.server)) for scenario in scenarios),
    ]


def _server(server: run_file.ServerFacts) -> str:
    return f"`{' '.join(server.command)}`, {server.allocator}" if server.command else "started elsewhere"


def warnings(scenarios: Sequence[Scenario]) -> list[str]:
    """What a reader has to know before believing a number."""
    found = []
    for scenario in scenarios:
        for number, summary in enumerate(scenario.summaries, start=1):
            where = f"{scenario.name}, run {number}" if len(scenario.runs) > 1 else scenario.name
            found += [f"{where}: {note}" for note in summary.notes]
            for name, window in (("steady", summary.steady), ("reload", summary.reload)):
                if window is not None:
                    found += [f"{where}, {name} window contaminated: {why}." for why in window.contaminated]
        if scenario.fold.left_out and sum(len(summary.reloads) for summary in scenario.summaries) > 1:
            found.append(f"{scenario.name}: {_left_out(scenario.fold)}")
    machines = {run.facts.machine for scenario in scenarios for run in scenario.runs}
    if len(machines) > 1:
        found.append("These runs are from different machines: do not compare them.")
    return found


def _left_out(fold: Fold) -> str:
    named, more = fold.left_out[:_NAMED], len(fold.left_out) - _NAMED
    text = "; ".join(named) + (f"; and {more} more" if more > 0 else "")
    total = len(fold.pairs) + len(fold.left_out)
    rest = "" if fold.enough else " (too few are left to have any)"
    return f"{len(fold.left_out)} of {total} reloads are left out of the folded figures{rest}: {text}."


def _rules(scenarios: Sequence[Scenario]) -> list[str]:
    return [RULES, FOLD_RULES] if any(scenario.fold.enough for scenario in scenarios) else [RULES]


# Figures of the table


def _milliseconds(value: float | None) -> str:
    """Three significant digits are more than a run can tell."""
    if value is None or math.isnan(value):
        return NOTHING
    if value >= 100:
        return f"{value:.0f} ms"
    return f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def _factor(value: float) -> str:
    return f"{value:.1f}x"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _megabytes(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def _steady(name: str) -> Callable[[Summary], float | None]:
    return lambda summary: getattr(summary.steady, name)


def _reload(name: str) -> Callable[[Summary], float | None]:
    return lambda summary: getattr(summary.reload, name) if summary.reload else None


_FIGURES: Sequence[tuple[str, str, Callable[[Summary], float | None], Callable[[float], str]]] = (
    ("steady p50", "before publishing, after the warm start", _steady("p50"), _milliseconds),
    ("steady p99", "", _steady("p99"), _milliseconds),
    ("steady p99.9", "", _steady("p99_9"), _milliseconds),
    ("steady max", "", _steady("max"), _milliseconds),
    (
        "reload p50",
        "from publishing until the old version's end, plus 1 s; all reloads of a run",
        _reload("p50"),
        _milliseconds,
    ),
    ("reload p99", "", _reload("p99"), _milliseconds),
    ("reload p99.9", "", _reload("p99_9"), _milliseconds),
    ("reload max", "the spike's height", _reload("max"), _milliseconds),
    ("reload p99.9 / steady p99.9", "1.0x would be a swap that nobody notices", lambda s: s.ratio, _factor),
    ("spike width", "from the first to the last request over the SLO", lambda s: s.width_ms, _milliseconds),
    ("requests over the SLO", "within the reload", lambda s: s.over_slo if s.reload else None, _whole),
    ("first request on the new version", "", lambda s: s.first_ms, _milliseconds),
    ("publish to available", "", lambda s: s.swap_seconds, _seconds),
    ("requests in the steady window", "", _steady("requests"), _whole),
    ("requests in the reload window", "", _reload("requests"), _whole),
    ("private memory before", "RssAnon just before publishing", lambda s: s.memory_before, _megabytes),
    ("private memory, peak", "while both versions are there", lambda s: s.memory_peak, _megabytes),
    ("private memory after", "", lambda s: s.memory_after, _megabytes),
    ("failed requests", "of the whole run", lambda s: s.failed, _whole),
)


def _cell(scenario: Scenario, get: Callable[[Summary], float | None], show: Callable[[float], str]) -> str:
    found = [value for number in scenario.clean if (value := get(scenario.summaries[number])) is not None]
    if not found:
        return NOTHING
    middle = show(statistics.median(found))
    if len(found) == 1:
        return middle
    low, high = (show(value).partition(" ")[0] for value in (min(found), max(found)))
    return f"{middle} ({low} to {high})"


def _folded_rows(scenarios: Sequence[Scenario]) -> list[Row]:
    """The figures of all reloads together, beside those of windows without one."""

    def row(label: str, hint: str, get: Callable[[Fold], str]) -> Row:
        return Row(label, hint, [get(s.fold) if s.fold.enough else NOTHING for s in scenarios])

    def figure(part: str, name: str) -> Callable[[Fold], str]:
        return lambda fold: _estimate(getattr(fold, part)[name])

    rows = [
        Row(
            "folded reloads",
            "clean ones, each with its control",
            [f"{len(s.fold.pairs)} of {len(s.fold.pairs) + len(s.fold.left_out)}" for s in scenarios],
        )
    ]
    for part, label, hint in _FOLD_PARTS:
        rows += [row(f"{label} {name}", hint, figure(part, name)) for name in FIGURES.values()]
    return rows


_FOLD_PARTS = (
    ("reload", "folded reload", f"all reloads together, and the interval of {CONFIDENCE:.0%}"),
    ("control", "folded control", "as many windows without a reload"),
    ("excess", "folded excess", "reload less control"),
)


def _estimate(estimate: Estimate) -> str:
    low, high = (_milliseconds(value).partition(" ")[0] for value in (estimate.low, estimate.high))
    return f"{_milliseconds(estimate.value)} [{low}, {high}]"


def _errors(scenario: Scenario) -> str:
    counts: dict[str, int] = {}
    for summary in scenario.summaries:
        for code, count in summary.codes.items():
            if code != Code.OK.name:
                counts[code] = counts.get(code, 0) + count
    return ", ".join(f"{count:,} {code}" for code, count in counts.items()) or "none"


def _served(scenario: Scenario) -> str:
    served = scenario.summaries[scenario.shown].served
    if len(served) > _SERVED:
        return f"v{min(served)} to v{max(served)}: {sum(served.values()):,}"
    return ", ".join(f"v{version}: {count:,}" for version, count in served.items()) or NOTHING


def _load(settings: run_file.Settings) -> str:
    swaps = settings.publish_moments
    published = (
        f"{len(swaps)} versions published, one every {settings.publish_every:g} s, " if len(swaps) > 1 else ""
    )
    return (
        f"open loop, {settings.rate:g} requests/s for {settings.seconds:g} s, {published}"
        f"{settings.arrivals} arrivals, "
        f"{settings.processes} process{'es' if settings.processes > 1 else ''}, "
        f"SLO {settings.slo_ms:g} ms"
    )


def floor_text(floor: run_file.Floor | None) -> str:
    """The generator's floor in words."""
    if floor is None:
        return "not measured"
    return (
        f"p50 {floor.p50:.2f}, p99 {floor.p99:.2f}, p99.9 {floor.p99_9:.2f}, max {floor.max:.2f} ms at "
        f"{floor.rate:g}/s ({floor.requests:,} requests to a server that answers at once)"
    )


def _windows(summary: Summary) -> list[Window]:
    return [window for window in (summary.steady, summary.reload) if window is not None]


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _title(panel: Panel) -> str:
    name, summary = panel.run.facts.settings.model_name, panel.summary
    if summary.reload is None:
        return f"{name} under load"
    if summary.new_version is None:
        return f"Publishing {name} under load"
    if len(summary.reloads) > 1:
        return f"Swapping {name} {len(summary.reloads)} times under load"
    return f"Swapping {name} {summary.old_version} \N{RIGHTWARDS ARROW} {summary.new_version} under load"


# Pictures


def _panel(scenario: Scenario) -> Panel:
    run, summary = scenario.runs[scenario.shown], scenario.summaries[scenario.shown]
    picture = _picture(scenario.name, run, summary)
    picture["fold"] = _folded_picture(scenario) if scenario.fold.enough else None
    return Panel(scenario.name, run, summary, picture, scenario.fold, *_slow_list(run))


def _picture(name: str, run: Run, summary: Summary) -> dict[str, Any]:
    """What the page draws of one run. Times are seconds after the first publishing, or after the start."""
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
    """The moment from which the pictures of a run count."""
    return run.facts.publishes[0].begin if run.facts.publishes else 0.0


def _shown_reload(summary: Summary) -> Reload:
    """Among the clean reloads, or all of them, the one with the median spike."""
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
    """All slow requests and every n-th fast one, so that not too many are drawn; and n."""
    step = max(1, math.ceil(np.count_nonzero(inside) / _ZOOM_POINTS))
    keep = inside & slow
    keep[np.flatnonzero(inside & ~slow & ~failed)[::step]] = True
    return keep, step


def _folded_picture(scenario: Scenario) -> dict[str, Any]:
    """All reloads that count over each other, and their controls. Times are seconds after each begin."""
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
    """The requests of several windows by time after each window's begin: points, and a line of percentiles.

    A part is a run, the window, and the version whose requests are told from the others.
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
    """Median and slowest request per bin: the outline of the run in a few hundred points."""
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
    """Publishing and the two changes that make the swap."""
    begin = swap.window.begin - zero
    marks = [{"t": round(begin, 3), "label": f"publish v{swap.new_version or '?'}", "kind": "publish"}]
    if swap.swap_seconds is not None:
        label = f"v{swap.new_version} available"
        marks.append({"t": round(begin + swap.swap_seconds, 3), "label": label, "kind": "state"})
    if swap.ended is not None:
        label = f"v{swap.old_version} ended"
        marks.append({"t": round(begin + swap.ended, 3), "label": label, "kind": "state"})
    return marks


def _tracks(run: Run, zero: float, begin: float = -math.inf, end: float = math.inf) -> list[dict[str, Any]]:
    """Which version was in which state from when to when, between `begin` and `end` after `zero`.

    Versions that are not there at the same time share a track.
    """
    begin, end = max(begin, -zero), min(end, run.facts.settings.seconds - zero)
    tracks: list[list[dict[str, Any]]] = []
    for version in sorted({change.version for change in run.facts.states}):
        changes = [change for change in run.facts.states if change.version == version]
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
    return [{"label": _track_label(track), "segments": track} for track in tracks]


def _track_label(track: Sequence[dict[str, Any]]) -> str:
    versions = list(dict.fromkeys(segment["version"] for segment in track))
    return f"v{versions[0]}" if len(versions) == 1 else f"v{versions[0]}, ..."


def _slow_list(run: Run) -> tuple[list[dict[str, Any]], int]:
    """The slowest and the failed requests, at most `_LISTED`, and how many there are."""
    zero = _zero(run)
    requests = run.requests
    worth = np.flatnonzero(
        (requests["latency"] * 1e3 > run.facts.settings.slo_ms) | (requests["code"] != Code.OK)
    )
    slowest = worth[np.argsort(-requests["latency"][worth], kind="stable")][:_LISTED]
    return [
        {
            "t": f"{requests['intended'][index] - zero:+.3f} s",
            "latency": _milliseconds(float(requests["latency"][index]) * 1e3),
            "lag": _milliseconds(float(requests["lag"][index]) * 1e3),
            "version": int(requests["version"][index]) or NOTHING,
            "code": Code(int(requests["code"][index])).name,
        }
        for index in slowest
    ], len(worth)


def _rounded(values: NDArray[Any], digits: int) -> list[float]:
    rounded: list[float] = np.round(values, digits).tolist()
    return rounded
