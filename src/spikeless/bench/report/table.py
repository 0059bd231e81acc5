"""The numbers of the report: one row for each figure, one cell for each scenario.

In: runs. Out: scenarios, and the rows of their table. Runs of one scenario are repeats:
a cell has their median and, in brackets, the smallest and the largest. From five
reloads on, the headline figure has an interval instead, and the reloads are also folded
into one (`spikeless.bench.folding`).

The page, its charts, the Markdown and the terminal all take their numbers from here.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spikeless.bench.analysis import Summary, analyse
from spikeless.bench.events import STORM
from spikeless.bench.folding import CONFIDENCE, FIGURES, Estimate, Fold, fold, median_interval
from spikeless.bench.run_file import Run
from spikeless.errors import Code, InvalidArgument

NOTHING = "-"
#: Requests are counted for each version only up to this many versions.
_SERVED = 4


@dataclass(frozen=True)
class Scenario:
    """The repeats of one scenario."""

    name: str
    #: In the order of their start.
    runs: Sequence[Run]
    #: One for each run.
    summaries: Sequence[Summary]
    #: The reloads of all runs together.
    fold: Fold
    #: Of the headline figure (`headline`), by reload; None for fewer than five reloads.
    interval: tuple[float, float] | None

    @property
    def clean(self) -> list[int]:
        """Indices of the runs without a contaminated window, or of all runs."""
        numbers = [
            number
            for number, summary in enumerate(self.summaries)
            if not any(window and window.contaminated for window in (summary.steady, summary.reload))
        ]
        return numbers or list(range(len(self.runs)))

    @property
    def shown(self) -> int:
        """Index of the run to draw: of the clean ones, that with the median spike."""
        heights = {number: self.summaries[number].height_ms or 0.0 for number in self.clean}
        median = statistics.median_low(heights.values())
        return next(number for number, height in heights.items() if height == median)


@dataclass(frozen=True)
class Spread:
    """A figure of a scenario: the median of its runs, and how far it is known."""

    middle: float
    #: The smallest and the largest run, or with `interval` the bounds of that.
    low: float
    high: float
    #: Whether the bounds are an interval by reload (`median_interval`).
    interval: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    #: The heading that it stands under.
    group: str
    label: str
    #: What the label means; may be empty.
    hint: str
    #: One for each scenario.
    cells: Sequence[str]
    #: Whether it is only for readers who want every figure.
    advanced: bool = False


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
        scenario = Scenario(name, mine, summaries, fold(mine, summaries), None)
        clean = scenario.clean
        interval = median_interval(
            [mine[number] for number in clean], [summaries[number] for number in clean]
        )
        scenarios.append(dataclasses.replace(scenario, interval=interval))
    return scenarios


def table(scenarios: Sequence[Scenario]) -> list[Row]:
    """The rows of the table, group by group; the advanced ones come last."""
    rows = [
        Row(group, figure.label, figure.hint, [_cell(one, figure) for one in scenarios], group in _ADVANCED)
        for group, figures in _FIGURES.items()
        for figure in figures
    ]
    failures = [
        Row(_FAILURES, "errors", "gRPC status of the requests that failed", [_errors(s) for s in scenarios]),
        Row(
            _FAILURES, "served by", "requests per version, in the run drawn", [_served(s) for s in scenarios]
        ),
    ]
    last = max(number for number, row in enumerate(rows) if row.group == _FAILURES) + 1
    rows[last:last] = failures
    if any(run.facts.settings.event == STORM for scenario in scenarios for run in scenario.runs):
        rows[last + 2 : last + 2] = [
            Row(_VERSIONS, figure.label, figure.hint, [_cell(one, figure) for one in scenarios])
            for figure in _STORM_FIGURES
        ]
    if any(summary.startup for scenario in scenarios for summary in scenario.summaries):
        rows[:0] = [
            Row(_START, figure.label, figure.hint, [_cell(one, figure) for one in scenarios])
            for figure in _START_FIGURES
        ]
    if any(scenario.fold.enough for scenario in scenarios):
        rows += _folded_rows(scenarios)
    return rows


def headline(scenario: Scenario) -> Spread:
    """The figure that a scenario is judged by: p99.9 during reloads, or the steady one.

    It is that of the row `HEADLINE`, or of ``steady p99.9`` where nothing is reloaded.
    """
    return _reload_headline(scenario) or steady(scenario)


def _reload_headline(scenario: Scenario) -> Spread | None:
    found = _spread(scenario, _reload("p99_9"))
    if found is None or scenario.interval is None:
        return found
    return Spread(found.middle, *scenario.interval, interval=True)


def steady(scenario: Scenario) -> Spread:
    """The steady p99.9."""
    found = _spread(scenario, _steady("p99_9"))
    assert found is not None, "every run has a steady window"
    return found


def milliseconds(value: float | None) -> str:
    """At most three significant digits: a run cannot tell more."""
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


def _startup(name: str) -> Callable[[Summary], float | None]:
    return lambda summary: getattr(summary.startup, name) if summary.startup else None


def changed(before: Scenario, after: Scenario) -> list[Row]:
    """Rows with three cells: before, after, and the second relative to the first.

    Where the ranges of the runs overlap, the third says so.
    """
    rows = []
    for heading, figures in _FIGURES.items():
        for figure in figures if heading not in _ADVANCED else ():
            old, new = _of(before, figure), _of(after, figure)
            if old is None or new is None:
                continue
            cells = [spread_text(old, figure.show), spread_text(new, figure.show), _relative(old, new)]
            rows.append(Row(heading, figure.label, figure.hint, cells))
    return rows


def _relative(old: Spread, new: Spread) -> str:
    if old.middle == new.middle:
        return "same"
    factor = f"{new.middle / old.middle:.2f}x" if old.middle else NOTHING
    overlap = old.low <= new.high and new.low <= old.high
    kind = "intervals" if old.interval and new.interval else "ranges"
    return f"{factor}, {kind} overlap" if overlap else factor


class _Figure(NamedTuple):
    """What a row shows."""

    label: str
    hint: str
    #: Its value in a run.
    get: Callable[[Summary], float | None]
    show: Callable[[float], str]


#: The row that scenarios are judged by.
HEADLINE = "reload p99.9"
_FAILURES = "Failures"
_FIGURES: dict[str, Sequence[_Figure]] = {
    "During the swap": (
        _Figure(
            HEADLINE, "from publishing until 1 s after the old version's end", _reload("p99_9"), milliseconds
        ),
        _Figure("reload p99.9 / steady p99.9", "1.0x: no difference", lambda s: s.ratio, _factor),
        _Figure("reload max", "the spike's height", _reload("max"), milliseconds),
        _Figure("spike width", "first to last request over the SLO", lambda s: s.width_ms, milliseconds),
        _Figure("requests over the SLO", "in a reload", lambda s: s.over_slo if s.reload else None, _whole),
        _Figure("first request on the new version", "", lambda s: s.first_ms, milliseconds),
        _Figure("publish to available", "", lambda s: s.swap_seconds, _seconds),
    ),
    "Without a swap": (
        _Figure("steady p50", "before publishing, after the warm start", _steady("p50"), milliseconds),
        _Figure("steady p99", "", _steady("p99"), milliseconds),
        _Figure("steady p99.9", "", _steady("p99_9"), milliseconds),
    ),
    _FAILURES: (_Figure("failed requests", "of the whole run", lambda s: s.failed, _whole),),
    "Memory": (
        _Figure("private memory before", "RssAnon before publishing", lambda s: s.memory_before, _megabytes),
        _Figure("private memory, peak", "during the swap", lambda s: s.memory_peak, _megabytes),
        _Figure("private memory after", "", lambda s: s.memory_after, _megabytes),
    ),
    "Other percentiles and counts": (
        _Figure("reload p50", "all reloads of a run", _reload("p50"), milliseconds),
        _Figure("reload p99", "", _reload("p99"), milliseconds),
        _Figure("steady max", "", _steady("max"), milliseconds),
        _Figure("requests in the reload window", "", _reload("requests"), _whole),
        _Figure("requests in the steady window", "", _steady("requests"), _whole),
    ),
}
_START = "From the exec of the server"
_START_FIGURES = (
    _Figure("to the first answer", "", _startup("answered"), _seconds),
    _Figure(
        "to the first answer within the SLO",
        "",
        _startup("within_slo"),
        _seconds,
    ),
)
_VERSIONS = "Versions of a storm"
_STORM_FIGURES = (
    _Figure("versions published", "", lambda s: s.published, _whole),
    _Figure(
        "versions that loaded", "a server may skip those that a newer one follows", lambda s: s.loaded, _whole
    ),
    _Figure("versions that answered", "with the first one", lambda s: len(s.served), _whole),
)
_FOLDED = "All reloads together"
_ADVANCED = ("Other percentiles and counts", _FOLDED)


def start_seconds(scenario: Scenario) -> tuple[str, str] | None:
    """Medians of the times to the first answer and to the first within the SLO."""
    found = [_spread(scenario, figure.get) for figure in _START_FIGURES]
    one, two = (None if spread is None else _seconds(spread.middle) for spread in found)
    return None if one is None or two is None else (one, two)


def _spread(scenario: Scenario, get: Callable[[Summary], float | None]) -> Spread | None:
    found = [value for number in scenario.clean if (value := get(scenario.summaries[number])) is not None]
    return Spread(statistics.median(found), min(found), max(found)) if found else None


def _of(scenario: Scenario, figure: _Figure) -> Spread | None:
    return _reload_headline(scenario) if figure.label == HEADLINE else _spread(scenario, figure.get)


def _cell(scenario: Scenario, figure: _Figure) -> str:
    found = _of(scenario, figure)
    return spread_text(found, figure.show) if found else NOTHING


def spread_text(spread: Spread, show: Callable[[float], str] = milliseconds) -> str:
    """The median and, of several runs, the range: ``5.62 ms (5.50 to 5.74)``.

    Where there is an interval, it is there instead: ``5.62 ms [5.50, 5.74]``.
    """
    middle = show(spread.middle)
    low, high = (show(value).partition(" ")[0] for value in (spread.low, spread.high))
    if spread.interval:
        return f"{middle} [{low}, {high}]"
    if low == high:
        return middle
    return f"{middle} ({low} to {high})"


def _folded_rows(scenarios: Sequence[Scenario]) -> list[Row]:
    """The figures of all reloads together, and those of windows without a reload."""

    def row(label: str, hint: str, get: Callable[[Fold], str]) -> Row:
        cells = [get(s.fold) if s.fold.enough else NOTHING for s in scenarios]
        return Row(_FOLDED, label, hint, cells, advanced=True)

    def figure(part: str, name: str) -> Callable[[Fold], str]:
        return lambda fold: estimate(getattr(fold, part)[name])

    rows = [
        Row(
            _FOLDED,
            "folded reloads",
            "clean reloads, each with a control window",
            [f"{len(s.fold.pairs)} of {len(s.fold.pairs) + len(s.fold.left_out)}" for s in scenarios],
            advanced=True,
        )
    ]
    for part, label, hint in _FOLD_PARTS:
        rows += [row(f"{label} {name}", hint, figure(part, name)) for name in FIGURES.values()]
    return rows


_FOLD_PARTS = (
    ("reload", "folded reload", f"all reloads together, with {CONFIDENCE:.0%} intervals"),
    ("control", "folded control", "as many windows without a reload"),
    ("excess", "folded excess", "reload minus control"),
)


def estimate(estimate: Estimate) -> str:
    low, high = (milliseconds(value).partition(" ")[0] for value in (estimate.low, estimate.high))
    return f"{milliseconds(estimate.value)} [{low}, {high}]"


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
