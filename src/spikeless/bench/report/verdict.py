"""The verdict of a report: one sentence that says whether the SLO held.

In: scenarios. Out: a `Verdict`. A scenario holds its SLO when its headline figure (see
`spikeless.bench.report.table.headline`) is within it and no request failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spikeless.bench.events import EVENTS
from spikeless.bench.report.table import Scenario, headline, milliseconds, start_seconds


@dataclass(frozen=True)
class Verdict:
    """What the report says first."""

    #: Of every scenario; None where versions were published and none was swapped, and
    #: of starts.
    held: Sequence[bool | None]
    #: ``SLO held`` or ``SLO broken``, and for which scenarios.
    title: str
    sentence: str

    @property
    def kind(self) -> str:
        """``held``, ``broken`` or, where it is both or neither, ``mixed``."""
        known = {held for held in self.held if held is not None}
        return "mixed" if len(known) != 1 else "held" if known.pop() else "broken"


def slo_ms(scenario: Scenario) -> float:
    return scenario.runs[0].facts.settings.slo_ms


def failed(scenario: Scenario) -> int:
    """The failed requests of all runs."""
    return sum(summary.failed for summary in scenario.summaries)


def unswapped(scenario: Scenario) -> bool:
    """Whether versions were published and none of them became AVAILABLE."""
    published = any(run.facts.publishes for run in scenario.runs)
    return published and not any(summary.reload for summary in scenario.summaries)


def judge(scenarios: Sequence[Scenario]) -> Verdict:
    """The verdict on these scenarios; on those without a swap there is none."""
    if all(start_seconds(one) for one in scenarios):
        return _started(scenarios)
    swapped = [one for one in scenarios if not unswapped(one)]
    if len(swapped) == len(scenarios):
        return _judge(scenarios)
    still = [one for one in scenarios if unswapped(one)]
    where = "" if len(scenarios) == 1 else f" with {_names(still)}"
    nothing = (
        f"What was published{where} was not seen AVAILABLE before the load ended, which says nothing of a "
        "swap: `spikeless status` shows what the server serves, and why"
    )
    if not swapped:
        return Verdict([None] * len(scenarios), "No version was swapped", f"{nothing}.")
    verdict = _judge(swapped)
    held = iter(verdict.held)
    return Verdict(
        [None if unswapped(one) else next(held) for one in scenarios],
        verdict.title,
        f"{verdict.sentence} {nothing}.",
    )


def _started(scenarios: Sequence[Scenario]) -> Verdict:
    """How soon servers answered, for which there is no limit."""
    told = []
    for one in scenarios:
        seconds = start_seconds(one)
        assert seconds is not None
        told.append(
            f"with {_names([one])} the first answer came after {seconds[0]}, and the first within "
            f"{slo_ms(one):g} ms after {seconds[1]}"
        )
    sentence = "; ".join(told)
    return Verdict([None] * len(scenarios), "Started", f"{sentence[:1].upper()}{sentence[1:]}.")


def _judge(scenarios: Sequence[Scenario]) -> Verdict:
    held = [headline(one).middle <= slo_ms(one) and not failed(one) for one in scenarios]
    if len(scenarios) == 1:
        title = "SLO held" if held[0] else "SLO broken"
        return Verdict(held, title, _of_one(scenarios[0]))
    limits = {slo_ms(one) for one in scenarios}
    slo = f"SLO {limits.pop():g} ms" if len(limits) == 1 else "each with its own SLO"
    during = " during swaps" if any(one.summaries[0].reload for one in scenarios) else ""
    good = [one for one, fine in zip(scenarios, held, strict=True) if fine]
    bad = [one for one, fine in zip(scenarios, held, strict=True) if not fine]
    if not good or not bad:
        title = f"SLO {'held' if good else 'broken'} in every scenario"
        return Verdict(held, title, f"p99.9{during} is {_range(scenarios)} ({slo}){_failures(scenarios)}.")
    title = f"SLO held with {_names(good)}, broken with {_names(bad)}"
    sentence = (
        f"p99.9{during} is {_range(good)} with {_names(good)}, and {_range(bad)} with {_names(bad)} "
        f"({slo}){_failures(scenarios)}."
    )
    return Verdict(held, title, sentence)


def _of_one(scenario: Scenario) -> str:
    changes = sum(summary.published for summary in scenario.summaries)
    count = "a version was" if changes == 1 else f"{changes} versions were"
    done = EVENTS[scenario.runs[0].facts.settings.event].done
    when = f"While {count} {done}" if changes else "Without a swap"
    return (
        f"{when}, 99.9% of the requests took at most {milliseconds(headline(scenario).middle)} "
        f"(SLO {slo_ms(scenario):g} ms){_failures([scenario])}."
    )


def _failures(scenarios: Sequence[Scenario]) -> str:
    total = sum(map(failed, scenarios))
    return f", and {total:,} requests failed" if total else ", and no request failed"


def _range(scenarios: Sequence[Scenario]) -> str:
    figures = [headline(one).middle for one in scenarios]
    low, high = milliseconds(min(figures)), milliseconds(max(figures))
    return low if low == high else f"{low.partition(' ')[0]} to {high}"


def _names(scenarios: Sequence[Scenario]) -> str:
    names = [f"\N{LEFT DOUBLE QUOTATION MARK}{one.name}\N{RIGHT DOUBLE QUOTATION MARK}" for one in scenarios]
    if len(names) > 3:
        return f"the {len(names)} others"
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])
