"""The numbers of the report: one row for each figure, one cell for each scenario.

In: runs. Out: scenarios, and the rows of their table. Runs of one scenario are repeats:
a cell has their median and, in brackets, the smallest and the largest. Several reloads
are also folded into one (`spikeless.bench.folding`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spikeless.bench.analysis import Summary, analyse
from spikeless.bench.folding import CONFIDENCE, FIGURES, Estimate, Fold, fold
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
class Row:
    """A line of the table."""

    label: str
    #: What the label means; may be empty.
    hint: str
    #: One for each scenario.
    cells: Sequence[str]


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
    """The rows of the table."""
    rows = [
        Row(label, hint, [_cell(scenario, get, show) for scenario in scenarios])
        for label, hint, get, show in _FIGURES
    ]
    if any(scenario.fold.enough for scenario in scenarios):
        rows += _folded_rows(scenarios)
    rows.append(Row("errors", "gRPC status of the requests that failed", [_errors(s) for s in scenarios]))
    rows.append(Row("served by", "requests per version, in the run shown", [_served(s) for s in scenarios]))
    return rows


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


#: Label, hint, the value of a run, and its format.
_FIGURES: Sequence[tuple[str, str, Callable[[Summary], float | None], Callable[[float], str]]] = (
    ("steady p50", "before publishing, after the warm start", _steady("p50"), milliseconds),
    ("steady p99", "", _steady("p99"), milliseconds),
    ("steady p99.9", "", _steady("p99_9"), milliseconds),
    ("steady max", "", _steady("max"), milliseconds),
    (
        "reload p50",
        "from publishing until the old version's end, plus 1 s; all reloads of a run",
        _reload("p50"),
        milliseconds,
    ),
    ("reload p99", "", _reload("p99"), milliseconds),
    ("reload p99.9", "", _reload("p99_9"), milliseconds),
    ("reload max", "the spike's height", _reload("max"), milliseconds),
    ("reload p99.9 / steady p99.9", "1.0x: the swap cannot be noticed", lambda s: s.ratio, _factor),
    ("spike width", "from the first to the last request over the SLO", lambda s: s.width_ms, milliseconds),
    ("requests over the SLO", "within the reload", lambda s: s.over_slo if s.reload else None, _whole),
    ("first request on the new version", "", lambda s: s.first_ms, milliseconds),
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
    """The figures of all reloads together, and those of windows without a reload."""

    def row(label: str, hint: str, get: Callable[[Fold], str]) -> Row:
        return Row(label, hint, [get(s.fold) if s.fold.enough else NOTHING for s in scenarios])

    def figure(part: str, name: str) -> Callable[[Fold], str]:
        return lambda fold: estimate(getattr(fold, part)[name])

    rows = [
        Row(
            "folded reloads",
            "clean reloads, each with a control window",
            [f"{len(s.fold.pairs)} of {len(s.fold.pairs) + len(s.fold.left_out)}" for s in scenarios],
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
