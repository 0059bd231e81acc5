"""The report on a terminal: the verdict, and the rows that the page shows unfolded.

In: scenarios. Out: text on a console. Advanced rows are left to the page.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spikeless.bench.report.comparison import ResultComparison
from spikeless.bench.report.notes import notes
from spikeless.bench.report.table import Row, Scenario, table
from spikeless.bench.report.verdict import judge

_COLOURS = {"held": "green", "mixed": "yellow", "broken": "red"}


def show(
    scenarios: Sequence[Scenario], console: Console | None = None, comparison: ResultComparison | None = None
) -> None:
    """Print table, notes and verdict; on standard output where no console is given."""
    # Only a terminal has a width that lines must fit.
    console = console or Console(width=None if sys.stdout.isatty() else 10_000)
    verdict = judge(scenarios)
    if comparison is not None:
        console.print(_table(comparison.columns, comparison.rows))
    else:
        rows = [row for row in table(scenarios) if not row.advanced]
        console.print(_table([scenario.name for scenario in scenarios], rows))
    for note in notes(scenarios):
        console.print(f"note: {escape(note.text)}", soft_wrap=True, highlight=False)
    title = f"[bold {_COLOURS[verdict.kind]}]{verdict.title}.[/]"
    console.print(f"{title} {escape(verdict.sentence)}", soft_wrap=True, highlight=False)


def _table(names: Sequence[str], rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("")
    for name in names:
        table.add_column(escape(name), justify="right")
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            table.add_section()
        table.add_row(row.label, *map(escape, row.cells))
    return table
