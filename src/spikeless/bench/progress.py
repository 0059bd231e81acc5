"""The progress of a run, as it happens.

In: the moments that `spikeless.bench.scenario.run` reports. Out: on a terminal a live
picture of load, memory, versions and swaps; elsewhere a line every few seconds, and one
for each thing that happens to a version.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from spikeless.bench.scenario import Moment, Progress

_LINE_SECONDS = 5.0
#: Of the last things that happened, so many stay on the terminal.
_SHOWN_EVENTS = 8
STATE_COLOURS = {"AVAILABLE": "green", "START": "yellow", "LOADING": "yellow", "UNLOADING": "bright_black"}


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
    bar = Bar(*columns, console=console)
    task = bar.add_task(escape(title), total=seconds, text="starting the load")
    with Live(bar, console=console, auto_refresh=False) as live:

        def show(moment: Moment) -> None:
            done = min(max(moment.elapsed, 0.0), seconds)
            bar.update(task, completed=done, text=f"{done:.0f}/{seconds:g} s, {moment.sent:,} sent")
            live.update(Group(bar, *_picture(moment)), refresh=True)

        yield show
        bar.update(task, completed=seconds)
        live.refresh()


def _picture(moment: Moment) -> list[RenderableType]:
    """What is below the bar: load, versions, and when what happened to them."""
    load = f"  {_load(moment)}"
    lines: list[RenderableType] = [Text(load, style="red" if moment.failed else "")]
    if moment.states:
        states = [
            (f"  {version} {state}", STATE_COLOURS.get(state, "")) for version, state in moment.states.items()
        ]
        lines.append(Text.assemble(*states))
    lines += [Text(f"  {_event(*event)}") for event in moment.events[-_SHOWN_EVENTS:]]
    return lines


def _lines(title: str, seconds: float, console: Console) -> Progress:
    due, told = 0.0, 0

    def show(moment: Moment) -> None:
        nonlocal due, told
        lines = [_event(*event) for event in moment.events[told:]]
        told = len(moment.events)
        if moment.elapsed >= due:
            due = moment.elapsed + _LINE_SECONDS
            lines.append(describe(moment, seconds))
        for line in lines:
            console.print(f"{title}: {line}", highlight=False, soft_wrap=True, markup=False)

    return show


def describe(moment: Moment, seconds: float) -> str:
    """One line: ``12/30 s, 3,600 sent, 300/s, p99 1.9 ms, ..., v1 AVAILABLE``."""
    states = ", ".join(f"{version} {state}" for version, state in moment.states.items())
    parts = [f"{max(moment.elapsed, 0.0):.0f}/{seconds:g} s", f"{moment.sent:,} sent", _load(moment), states]
    return ", ".join(filter(None, parts))


def _load(moment: Moment) -> str:
    parts = [
        f"{moment.rate:.0f}/s",
        f"p99 {moment.p99_ms:.1f} ms",
        f"slowest {moment.slowest_ms:.1f} ms",
        f"{moment.failed:,} failed",
    ]
    if moment.memory is not None:
        parts.append(f"{moment.memory / 2**20:,.0f} MiB private")
    return ", ".join(parts)


def _event(t: float, what: str) -> str:
    return f"at {t:6.2f} s {what}"
