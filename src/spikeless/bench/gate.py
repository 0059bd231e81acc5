"""Judge a swap by limits: what lets a pull request pass, and what stops it.

In: the runs of one scenario, limits, and earlier runs to compare with. Out: a
`Judgement` with one `Check` for each limit. There are three outcomes: held, broken, and
too noisy to tell, which is never a pass.

The figures are those of all reloads together (`spikeless.bench.folding`), each with its
interval. A limit is broken when the whole interval is above it, and held when none of
it is. It is too noisy to tell when the limit is inside; when there are no figures,
because fewer than `FEWEST_RELOADS` reloads can be used; and, where the limit would be
held,

- when more than `MOST_LEFT_OUT` of the reloads cannot be used: what takes the
  processors from the generator may be the server, and then its worst reloads are
  missing, or
- when the reloads have too few requests (see `fewest_requests`).

A generator whose own latency reaches the limit cannot tell anything about it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spikeless.bench.folding import CONFIDENCE, FEWEST_RELOADS, FIGURES, Estimate, Fold, relative
from spikeless.bench.report.comparison import check_machines
from spikeless.bench.report.table import Scenario, group
from spikeless.bench.run_file import Run
from spikeless.errors import FailedPrecondition, InvalidArgument

#: Of all reloads, the share that may be unusable when a limit counts as held.
MOST_LEFT_OUT = 0.2
_SHARES = {name: share for share, name in FIGURES.items()}
_DEFAULT_FIGURE = "p99.9"


class GateOutcome(str, enum.Enum):
    """What is known of a limit."""

    HELD = "held"
    BROKEN = "broken"
    UNCLEAR = "too noisy to tell"

    @property
    def exit_code(self) -> int:
        """Of the command: 0, 1 and 3. Wrong usage has 2."""
        return _EXIT_CODES[self]


_EXIT_CODES = {GateOutcome.HELD: 0, GateOutcome.BROKEN: 1, GateOutcome.UNCLEAR: 3}


@dataclass(frozen=True)
class Limits:
    """What a swap must hold."""

    #: Name of a figure during reloads (``p50``, ``p99``, ``p99.9``, ``max``) -> its
    #: limit in milliseconds.
    slo: Mapping[str, float] = field(default_factory=dict)
    #: Of p99.9 during reloads relative to as many windows without one.
    spike_ratio: float | None = None
    #: How many requests of all runs may fail.
    errors: int = 0
    #: Of the figures in `slo`, or p99.9 without any, relative to a baseline.
    baseline_ratio: float = 1.25

    def __post_init__(self) -> None:
        for name, limit in self.slo.items():
            if name not in _SHARES:
                raise InvalidArgument(f"there is no figure {name!r}: choose one of {', '.join(_SHARES)}")
            _check_positive(f"the limit of {name}", limit)
        if self.spike_ratio is not None:
            _check_positive("the spike ratio", self.spike_ratio)
        _check_positive("the ratio to the baseline", self.baseline_ratio)
        if self.errors < 0:
            raise InvalidArgument(f"the limit of errors must be 0 or more, not {self.errors}")


@dataclass(frozen=True)
class Check:
    """One limit and what was found."""

    name: str
    #: ``ms``, ``x`` (a factor) or nothing (a count).
    unit: str
    limit: float
    #: None where the runs cannot tell.
    value: float | None
    #: The ends of the interval; of a count both are the value.
    low: float | None
    high: float | None
    outcome: GateOutcome
    #: Why it is too noisy to tell, or what broke; may be empty.
    why: str = ""


@dataclass(frozen=True)
class Judgement:
    """What the limits say of a scenario."""

    scenario: str
    checks: Sequence[Check]
    #: How many reloads there were,
    reloads: int
    #: and why each of the unusable ones is none of the figures'.
    left_out: Sequence[str]

    @property
    def outcome(self) -> GateOutcome:
        """Broken when one limit is; else too noisy to tell when that is one."""
        found = {check.outcome for check in self.checks}
        return next(
            one for one in (GateOutcome.BROKEN, GateOutcome.UNCLEAR, GateOutcome.HELD) if one in found
        )


def judge(runs: Sequence[Run], limits: Limits, baseline: Sequence[Run] = ()) -> Judgement:
    """Judge runs of one scenario.

    Raises:
        InvalidArgument: there are no runs or several scenarios, or nothing was
            published.
        FailedPrecondition: the baseline is of another machine or another load.
    """
    scenario = _only(runs, "the runs")
    fold = scenario.fold
    reloads = len(fold.pairs) + len(fold.left_out)
    doubts = _doubts(fold)
    figures = {name: fold.reload.get(name) for name in _SHARES}
    checks = [
        _checked(
            f"reload {name}",
            "ms",
            limit,
            figures[name],
            doubts=[*doubts, *_few_requests(fold, name)],
            blind=_blind(scenario, name, limit),
        )
        for name, limit in limits.slo.items()
    ]
    if limits.spike_ratio is not None:
        name = _DEFAULT_FIGURE
        few = _few_requests(fold, name)
        checks.append(
            _checked(
                f"reload {name} / steady {name}",
                "x",
                limits.spike_ratio,
                fold.ratio.get(name),
                [*doubts, *few],
            )
        )
    if baseline:
        before = _only(baseline, "the baseline")
        _check_comparable(before, scenario)
        factors = relative(before.runs, before.fold, scenario.runs, fold)
        for name in limits.slo or (_DEFAULT_FIGURE,):
            unsure = [*_doubts(before.fold), *_few_requests(before.fold, name)]
            unsure = [*doubts, *_few_requests(fold, name), *(f"baseline: {doubt}" for doubt in unsure)]
            checks.append(
                _checked(f"reload {name} / baseline", "x", limits.baseline_ratio, factors.get(name), unsure)
            )
    failed = sum(summary.failed for summary in scenario.summaries)
    checks.append(_counted("failed requests", limits.errors, failed, _codes(scenario)))
    errors = [
        f"version {' '.join(filter(None, (change.model, str(change.version))))}: {change.error}"
        for run in scenario.runs
        for change in run.facts.states
        if change.error and change.t >= run.facts.publishes[0].begin
    ]
    checks.append(_counted("failed loads", 0, len(errors), "; ".join(errors)))
    return Judgement(scenario.name, checks, reloads, fold.left_out)


def fewest_requests(figure: str) -> int:
    """How many requests the reloads must have for a limit of a figure to count as held.

    With fewer, none of them over the limit would be likely by chance even if more than
    the figure's share of all requests were. (For p99.9 this is the rule of three: 3 /
    0.001.)
    """
    share = _SHARES[figure]
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(share)) if share < 1 else 1


def _check_positive(what: str, value: float) -> None:
    if not value > 0:
        raise InvalidArgument(f"{what} must be positive, not {value:g}")


def _only(runs: Sequence[Run], what: str) -> Scenario:
    scenarios = group(runs)
    if len(scenarios) > 1:
        raise InvalidArgument(
            f"{what} are of {len(scenarios)} scenarios, {', '.join(one.name for one in scenarios)}: "
            "judge one at a time"
        )
    for run in runs:
        if not run.facts.publishes:
            raise InvalidArgument(
                f"nothing was published in the run of {run.facts.started}: there is no swap to judge"
            )
    return scenarios[0]


def _checked(
    name: str,
    unit: str,
    limit: float,
    figure: Estimate | None,
    doubts: Sequence[str],
    blind: str | None = None,
) -> Check:
    if figure is None:
        return Check(name, unit, limit, None, None, None, GateOutcome.UNCLEAR, "; ".join(doubts))
    if blind is not None:
        outcome, why = GateOutcome.UNCLEAR, blind
    elif figure.low > limit:
        outcome, why = GateOutcome.BROKEN, ""
    elif figure.high > limit:
        outcome, why = GateOutcome.UNCLEAR, "the limit is inside the interval: publish more versions"
    elif doubts:
        outcome, why = GateOutcome.UNCLEAR, "; ".join(doubts)
    else:
        outcome, why = GateOutcome.HELD, ""
    return Check(name, unit, limit, figure.value, figure.low, figure.high, outcome, why)


def _counted(name: str, limit: int, count: int, what: str) -> Check:
    broken = count > limit
    outcome = GateOutcome.BROKEN if broken else GateOutcome.HELD
    return Check(name, "", limit, count, count, count, outcome, what if broken else "")


def _doubts(fold: Fold) -> list[str]:
    """Why the reloads that are used may not stand for all."""
    reloads, used = len(fold.pairs) + len(fold.left_out), len(fold.pairs)
    first = f" ({fold.left_out[0]})" if fold.left_out else ""
    if not fold.enough:
        return [f"{used} of {reloads} reloads can be used{first}, and figures need {FEWEST_RELOADS}"]
    if len(fold.left_out) > MOST_LEFT_OUT * reloads:
        return [f"only {used} of {reloads} reloads can be used{first}"]
    return []


def _few_requests(fold: Fold, figure: str) -> list[str]:
    found, needed = sum(swap.window.requests for _, swap in fold.pairs), fewest_requests(figure)
    if not fold.enough:
        return []  # Which is doubt enough.
    return [f"{found:,} requests during reloads, and {figure} needs {needed:,}"] if found < needed else []


def _blind(scenario: Scenario, figure: str, limit: float) -> str | None:
    """What to say where the generator's own latency reaches the limit."""
    field = figure.replace(".", "_")
    floors = [getattr(run.facts.floor, field) for run in scenario.runs if run.facts.floor is not None]
    if not floors or max(floors) < limit:
        return None
    return f"the load generator's own {figure} is {max(floors):.3g} ms: measure on a quieter machine"


def _check_comparable(before: Scenario, after: Scenario) -> None:
    check_machines(("the baseline", before.runs), ("this result", after.runs))
    old, new = map(_loads, (before, after))
    if old != new:
        told = (
            ", ".join(f"{rate:g}/s {' '.join(rest)}" for rate, *rest in sorted(one)) for one in (old, new)
        )
        raise FailedPrecondition(
            f"the baseline had another load ({' / '.join(told)}): measure both with the same one"
        )


def _loads(scenario: Scenario) -> set[tuple[float, str, str]]:
    settings = [run.facts.settings for run in scenario.runs]
    return {(one.rate, one.arrivals, one.event) for one in settings}


def _codes(scenario: Scenario) -> str:
    counts: dict[str, int] = {}
    for summary in scenario.summaries:
        for code, count in summary.codes.items():
            counts[code] = counts.get(code, 0) + count
    return ", ".join(f"{count:,} {code}" for code, count in counts.items() if code != "OK")
