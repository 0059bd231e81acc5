"""What a reader should know about the numbers, one line for each thing.

In: scenarios. Out: `Note`, each once, with the runs that it concerns as details.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from spikeless.bench.folding import FEWEST_RELOADS
from spikeless.bench.report.table import Scenario


@dataclass(frozen=True)
class Note:
    """One remark."""

    #: One line.
    text: str
    #: Which runs it concerns, and with what figures.
    details: Sequence[str] = ()
    #: Whether the numbers must not be read without it.
    serious: bool = False


def notes(scenarios: Sequence[Scenario]) -> list[Note]:
    """The remarks on a report; the serious ones first."""
    found = []
    if len({run.facts.machine for scenario in scenarios for run in scenario.runs}) > 1:
        machines = [
            f"{scenario.name}: {machine}"
            for scenario in scenarios
            for machine in dict.fromkeys(run.facts.machine.describe() for run in scenario.runs)
        ]
        found.append(Note("These runs are from different machines: do not compare them.", machines, True))
    return [*found, *_of_runs(scenarios), *_incomplete(scenarios), *_contaminated(scenarios)]


def _where(scenario: Scenario, number: int) -> str:
    return f"{scenario.name}, run {number}" if len(scenario.runs) > 1 else scenario.name


def _of_runs(scenarios: Sequence[Scenario]) -> list[Note]:
    """What was noted when the runs were made."""
    where: dict[str, list[str]] = defaultdict(list)
    for scenario in scenarios:
        for number, run in enumerate(scenario.runs, start=1):
            for text in run.facts.notes:
                where[text].append(_where(scenario, number))
    every = sum(len(scenario.runs) for scenario in scenarios)
    return [
        Note(text[:1].upper() + text[1:], runs if len(runs) < every else ()) for text, runs in where.items()
    ]


def _incomplete(scenarios: Sequence[Scenario]) -> list[Note]:
    """Swaps that were not seen whole."""
    where: dict[str, list[str]] = defaultdict(list)
    for scenario in scenarios:
        for number, summary in enumerate(scenario.summaries, start=1):
            for position, swap in enumerate(summary.reloads, start=1):
                for reason in swap.incomplete:
                    where[reason].append(f"{_where(scenario, number)}, reload {position}")
    return [Note(f"{_count(len(swaps), 'reload')}: {reason}.", swaps) for reason, swaps in where.items()]


def _contaminated(scenarios: Sequence[Scenario]) -> list[Note]:
    """Windows that count as contaminated, and reloads that are left out therefore."""
    found = []
    windows = [
        f"{_where(scenario, number)}, {name} window: {why}"
        for scenario in scenarios
        for number, summary in enumerate(scenario.summaries, start=1)
        for name, window in (("steady", summary.steady), ("reload", summary.reload))
        if window is not None
        for why in window.contaminated
    ]
    if windows:
        text = (
            f"{_count(len(windows), 'window')} contaminated: figures come from clean ones where these exist."
        )
        found.append(Note(text, windows))
    # Fewer reloads could not have been folded anyway.
    folded = [one for one in scenarios if len(one.fold.pairs) + len(one.fold.left_out) >= FEWEST_RELOADS]
    left_out = [f"{scenario.name}: {why}" for scenario in folded for why in scenario.fold.left_out]
    if left_out:
        total = sum(len(one.fold.pairs) + len(one.fold.left_out) for one in folded)
        few = [one.name for one in folded if not one.fold.enough]
        rest = f"; too few are left for any with {', '.join(few)}" if few else ""
        text = f"{len(left_out)} of {_count(total, 'reload')} left out of the folded figures{rest}."
        found.append(Note(text, left_out))
    return found


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
