"""Two results side by side: what changed from one to the other.

In: the runs of both. Out: scenarios with the side in their name, and the `Change` of
each figure. Results of different machines are refused, because their difference says
nothing about what was changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from spikeless.bench.report.table import Row, Scenario, changed, group
from spikeless.bench.run_file import Run
from spikeless.errors import FailedPrecondition, InvalidArgument


@dataclass(frozen=True)
class ResultComparison:
    """Two results and their difference."""

    #: Names of the two sides.
    before: str
    after: str
    #: Of both sides, each scenario before and after.
    scenarios: Sequence[Scenario]
    #: Rows with three cells: before, after, and the second relative to the first.
    rows: Sequence[Row]

    @property
    def columns(self) -> tuple[str, str, str]:
        """The headings of the three cells."""
        return self.before, self.after, f"{self.after} relative to {self.before}"


def compare(
    before: tuple[str, Sequence[Run]], after: tuple[str, Sequence[Run]], force: bool = False
) -> ResultComparison:
    """Compare two results, each a name and its runs.

    Scenarios of the same name are compared; where each side has just one, these two.

    Raises:
        FailedPrecondition: they are from different machines, and `force` is not given.
        InvalidArgument: they have no scenario in common.
    """
    (old_name, _), (new_name, _) = before, after
    if old_name == new_name:
        raise InvalidArgument(f"both results are called {old_name}: give two different ones")
    if not force:
        check_machines(before, after)
    old, new = ({one.name: one for one in group(runs)} for _, runs in (before, after))
    if len(old) == len(new) == 1:
        pairs = {"": (*old.values(), *new.values())}
    else:
        pairs = {name: (old[name], new[name]) for name in old if name in new}
    if not pairs:
        raise InvalidArgument(
            f"{old_name} and {new_name} have no scenario in common: the first has {', '.join(old)}, the "
            f"second {', '.join(new)}"
        )
    scenarios: list[Scenario] = []
    rows: list[Row] = []
    for name, (first, second) in pairs.items():
        label = f"{name}, " if name else ""
        scenarios += [_renamed(first, label + old_name), _renamed(second, label + new_name)]
        rows += [dataclasses.replace(row, group=name or row.group) for row in changed(first, second)]
    return ResultComparison(old_name, new_name, scenarios, rows)


def _renamed(scenario: Scenario, name: str) -> Scenario:
    return dataclasses.replace(scenario, name=name)


def check_machines(before: tuple[str, Sequence[Run]], after: tuple[str, Sequence[Run]]) -> None:
    """Raise FailedPrecondition where these named results are of different machines."""
    old, new = (
        {run.facts.machine.describe(): run.facts.machine for run in runs} for _, runs in (before, after)
    )
    if set(old) != set(new) or len(old) > 1:
        raise FailedPrecondition(
            f"{before[0]} and {after[0]} are from different machines ({'; '.join(old)} / {'; '.join(new)}): "
            "their difference says nothing about the change; measure both on one machine, or give --force"
        )
