"""``spikeless status``: the repository and its servers side by side."""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from spikeless.cli.options import (
    check_only_of_a_store,
    json_option,
    models_option,
    servers_option,
    store_option,
)
from spikeless.disk import proc
from spikeless.errors import SpikelessError
from spikeless.rollout import local_servers, server_metrics
from spikeless.rollout.server_metrics import Traffic
from spikeless.rollout.status import ModelReport, VersionReport, changes, status

_WATCH_SECONDS = 0.5
_ANY_WIDTH = 10_000
_LINE_SECONDS = 5.0
#: Of the last changes, so many stay on the terminal.
_SHOWN_EVENTS = 12


@click.command()
@click.argument("name", required=False)
@json_option
@click.option("--watch", is_flag=True, help="Go on, and show each change when it happens, until Ctrl-C.")
@click.option(
    "--metrics",
    default="",
    help="With --watch, for rate and p99: as in http://{host}:8501/monitoring/prometheus/metrics.",
)
@models_option
@servers_option
@store_option
def command(
    name: str | None,
    as_json: bool,
    watch: bool,
    metrics: str,
    models: Path,
    servers: Any,
    store: str | None,
) -> None:
    """Show the versions of NAME, or of all models: on disk, configured, on each server.

    Where these disagree, or a server does not answer, it says so below the table and
    exits with 1; so it does where there is no model.

    With --store, show what is promoted there, and what each machine that follows it
    with --report serves.
    """
    if store is not None:
        check_only_of_a_store()
        _fleet(store, name, as_json)
        return
    if watch and as_json:
        raise click.UsageError("--watch and --json exclude each other")
    if metrics and not watch:
        raise click.UsageError("--metrics is for --watch: give that, too")
    # Only a terminal has a width that lines must fit.
    console = Console(width=None if sys.stdout.isatty() else _ANY_WIDTH)
    if watch:
        with suppress(KeyboardInterrupt):
            _Watch(console, [_Load(server, metrics) for server in servers]).run(
                lambda: status(models, name, servers), servers
            )
        return
    reports = status(models, name, servers)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(report) for report in reports], indent=2))
    else:
        if not reports:
            click.echo("there is no model", err=True)
        for part in _reports(reports, servers, console):
            console.print(part)
    if not reports or any(report.disagreements for report in reports):
        sys.exit(1)


def _fleet(store: str, name: str | None, as_json: bool) -> None:
    import msgspec

    from spikeless.store.fleet_status import fleet_status

    found = fleet_status(store, name)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2))
    else:
        click.echo("\n".join(map(str, found)) if found else "nothing is promoted")
    if not found or not all(one.agrees for one in found):
        sys.exit(1)


def _reports(
    reports: list[ModelReport], servers: tuple[str, ...], console: Console
) -> Iterator[RenderableType]:
    for report in reports:
        yield _table(report, servers, console)
        for problem in report.disagreements:
            yield Text(f"  ! {problem}", no_wrap=True, overflow="ignore")


class _Load:
    """What one server has to do: its memory, and by its metrics its requests."""

    def __init__(self, server: str, metrics: str) -> None:
        self._server = server
        self._url = metrics.replace("{host}", server.rpartition(":")[0])
        self._pid: int | None = None
        self._before: tuple[float, dict[str, Traffic]] | None = None

    def lines(self) -> list[str]:
        """A line for each model, since the last time, and one for memory."""
        parts = [*self._traffic(), *self._memory()]
        return [f"{self._server}: {part}" for part in parts]

    def _traffic(self) -> Iterator[str]:
        if not self._url:
            return
        try:
            now, traffic = time.monotonic(), server_metrics.read(self._url)
        except SpikelessError as error:
            yield str(error)
            return
        before, self._before = self._before, (now, traffic)
        if before is None:
            return
        for model, total in sorted(traffic.items()):
            recent = total.since(before[1].get(model, Traffic()))
            p99 = recent.percentile_ms(0.99)
            text = "" if p99 is None else f", p99 at most {p99:.1f} ms"
            yield f"{model} {recent.requests / (now - before[0]):.0f}/s{text}, {recent.errors:.0f} failed"

    def _memory(self) -> Iterator[str]:
        """Of a server on this machine."""
        if self._pid is None and (server := local_servers.find(self._server)):
            self._pid = server.pid
        try:
            if self._pid is not None:
                yield f"{proc.server_memory(self._pid)['RssAnon'] / 2**20:,.0f} MiB private"
        except OSError:
            self._pid = None


class _Watch:
    """Shows reports again and again, and the moment of each change."""

    def __init__(self, console: Console, loads: list[_Load]) -> None:
        self._console = console
        self._loads = loads
        self._events: deque[str] = deque(maxlen=_SHOWN_EVENTS)
        self._line_due = 0.0

    def run(self, ask: Callable[[], list[ModelReport]], servers: tuple[str, ...]) -> None:
        """Go on until interrupted."""
        before: list[ModelReport] = []
        with (
            Live(console=self._console, auto_refresh=False)
            if self._console.is_terminal
            else nullcontext() as live
        ):
            while True:
                reports = ask()
                new = [f"{datetime.datetime.now():%H:%M:%S} {change}" for change in changes(before, reports)]
                problems = [problem for one in reports for problem in one.disagreements]
                known = [problem for one in before for problem in one.disagreements]
                before = reports
                self._events += new
                load = [line for one in self._loads for line in one.lines()]
                if live is not None:
                    below = [Text(f"  {line}") for line in (*load, *self._events)]
                    live.update(Group(*_reports(reports, servers, self._console), *below), refresh=True)
                else:
                    self._print(
                        [*new, *(f"! {problem}" for problem in problems if problem not in known)], load
                    )
                time.sleep(_WATCH_SECONDS)

    def _print(self, lines: list[str], load: list[str]) -> None:
        """Lines of what is new, and every few seconds of the load."""
        if time.monotonic() >= self._line_due:
            self._line_due = time.monotonic() + _LINE_SECONDS
            lines = [*lines, *load]
        for line in lines:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(report: ModelReport, servers: tuple[str, ...], console: Console) -> RenderableType:
    """A row for each version; where the terminal is too narrow, a list for each."""
    columns = ("version", "labels", "size", "age", "carries", "journal", *servers)
    rows = [
        (
            str(version.version),
            ", ".join(version.labels),
            *_facts(version),
            *(version.servers.get(server, "") for server in servers),
        )
        for version in report.versions
    ]
    title = escape(report.name)
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE)
    for row in rows:
        table.add_row(*map(escape, row))
    if console.measure(table, options=console.options.update(width=_ANY_WIDTH)).maximum <= console.width:
        return table
    lists = Table.grid(padding=(0, 2))
    lists.title, lists.title_justify = title, "left"
    for row in rows:
        for name, cell in zip(columns, row, strict=True):
            if cell:
                lists.add_row(escape(name), escape(cell))
        lists.add_row()
    return lists


def _facts(version: VersionReport) -> list[str]:
    if not version.on_disk:
        return ["not on disk", "", "", version.checks]
    carries = ["mapped"] if version.mapped else []
    if version.warmup != 0:
        carries.append("damaged warmup" if version.warmup is None else f"warmup ({version.warmup})")
    if version.golden:
        carries.append("golden")
    return [decimal(version.size), _age(version.age), ", ".join(carries), version.checks]


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"
