"""The goal of the ladder: a reload costs requests nothing that can be measured.

In: scenarios, and how much the model's parameters weigh. Out: Markdown that says for
each scenario whether it meets the goal, and by how much.
"""

from __future__ import annotations

from collections.abc import Sequence

from spikeless.bench.folding import CONFIDENCE, FEWEST_RELOADS, Estimate
from spikeless.bench.report.table import NOTHING, Scenario, milliseconds
from spikeless.bench.report.verdict import failed

#: p99 and p99.9 of requests during reloads, relative to windows without a reload.
MOST_RATIO = 1.1
#: Private memory through the swap, relative to the parameters,
MOST_MEMORY = 0.1
#: where these are at least so many bytes.
MEMORY_COUNTS_FROM = 1 << 30
_FIGURES = ("p99", "p99.9")

GOAL = (
    f"p99 and p99.9 during reloads at most {MOST_RATIO:g} x those of control windows, no failed request, "
    f"and, from 1 GiB of parameters on, private memory at most {MOST_MEMORY:.0%} of the parameters through "
    "the swap"
)


def met(scenario: Scenario, parameters: int | None) -> bool | None:
    """Whether a scenario meets the goal; None: it has too few reloads to tell.

    Args:
        scenario: its runs.
        parameters: bytes of the model's parameters; None: unknown.
    """
    if not scenario.fold.enough:
        return None
    memory = _memory(scenario)
    limit = None if parameters is None or parameters < MEMORY_COUNTS_FROM else MOST_MEMORY * parameters
    return (
        all(scenario.fold.ratio[figure].value <= MOST_RATIO for figure in _FIGURES)
        and not failed(scenario)
        and (limit is None or (memory is not None and memory <= limit))
    )


def render_goal(scenarios: Sequence[Scenario], parameters: int | None) -> str:
    """The goal and a table with a line for each scenario, in Markdown."""
    if not any(scenario.fold.enough for scenario in scenarios):
        return f"Goal: {GOAL}. Fewer than {FEWEST_RELOADS} reloads can be used, so nothing can be said."
    lines = [
        f"Goal: {GOAL}. Brackets: {CONFIDENCE:.0%} intervals.",
        "",
        "| | goal | p99 | p99.9 | failed requests | private memory, peak | reloads |",
        "|---|---|---|---|---|---|---|",
    ]
    for scenario in scenarios:
        verdict = {True: "met", False: "not met", None: NOTHING}[met(scenario, parameters)]
        cells = [scenario.name, verdict]
        cells += [_compared(scenario, figure) for figure in _FIGURES]
        cells += [
            f"{failed(scenario):,}",
            _share(_memory(scenario), parameters),
            f"{len(scenario.fold.pairs)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _compared(scenario: Scenario, figure: str) -> str:
    """``1.66 ms / 1.41 ms: 1.18 x [1.02, 1.31]``."""
    fold = scenario.fold
    if not fold.enough:
        return NOTHING
    ratio: Estimate = fold.ratio[figure]
    values = f"{milliseconds(fold.reload[figure].value)} / {milliseconds(fold.control[figure].value)}"
    return f"{values}: {ratio.value:.2f} x [{ratio.low:.2f}, {ratio.high:.2f}]"


def _memory(scenario: Scenario) -> int | None:
    """The largest private memory of any run during its reloads, in bytes."""
    return max((peak for summary in scenario.summaries if (peak := summary.memory_peak)), default=None)


def _share(memory: int | None, parameters: int | None) -> str:
    if memory is None:
        return NOTHING
    share = f", {memory / parameters:.1%} of the parameters" if parameters else ""
    return f"{memory / 2**20:,.0f} MiB{share}"
