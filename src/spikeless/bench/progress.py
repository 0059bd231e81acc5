"""The progress of a run.

In: the moments that `spikeless.bench.scenario.run` reports. Out: a bar on a terminal, a
line every few seconds elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from spikeless.bench.scenario import Moment, Progress

_LINE_SECONDS = 5.0


@contextmanager
def progress_bar(title: str, seconds: float, console: Console | None = None) -> Iterator[Progress]:
    """A callable for ``run(progress=...)``; `seconds` is the duration of the load.

    Without a console it writes to standard error.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title, seconds, console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"))
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(title, total=seconds, text="starting the load")

        def show(moment: Moment) -> None:
            bar.update(task, completed=min(max(moment.elapsed, 0.0), seconds), text=describe(moment, seconds))

        yield show
        bar.update(task, completed=seconds)


def _lines(title: str, seconds: float, console: Console) -> Progress:
    due = 0.0

    def show(moment: Moment) -> None:
        nonlocal due
        if moment.elapsed >= due:
            due = moment.elapsed + _LINE_SECONDS
            console.print(f"{title}: {describe(moment, seconds)}", highlight=False, soft_wrap=True)

    return show


def describe(moment: Moment, seconds: float) -> str:
    """One line: ``12/30 s, 3,600 sent, 0 failed, slowest 2.1 ms, v1 AVAILABLE``."""
    states = ", ".join(f"v{version} {state}" for version, state in sorted(moment.states.items()))
    return (
        f"{max(moment.elapsed, 0.0):.0f}/{seconds:g} s, {moment.sent:,} sent, {moment.failed:,} failed, "
        f"slowest {moment.slowest_ms:.1f} ms" + (f", {states}" if states else "")
    )
