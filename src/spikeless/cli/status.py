"""``spikeless status``: the repository and its servers side by side."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from spikeless.cli.options import models_option, servers_option
from spikeless.rollout.status import ModelReport, VersionReport, status


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@models_option
@servers_option
def command(name: str | None, as_json: bool, models: Path, servers: Any) -> None:
    """Show the versions of NAME, or of all models: on disk, configured, on each server.

    Where these disagree, or a server does not answer, it says so below the table and
    exits with 1.
    """
    reports = status(models, name, servers)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(report) for report in reports], indent=2))
    else:
        _print(reports, servers)
    if any(report.disagreements for report in reports):
        sys.exit(1)


def _print(reports: list[ModelReport], servers: tuple[str, ...]) -> None:
    if not reports:
        click.echo("there is no model", err=True)
    # Only a terminal has a width that lines must fit.
    console = Console(width=None if sys.stdout.isatty() else 10_000)
    for report in reports:
        console.print(_table(report, servers))
        for problem in report.disagreements:
            console.print(f"  ! {escape(problem)}", soft_wrap=True)


def _table(report: ModelReport, servers: tuple[str, ...]) -> Table:
    table = Table(title=escape(report.name), title_justify="left", box=box.SIMPLE)
    for column in ("version", "labels", "size", "age", "carries", "journal", *servers):
        table.add_column(column, overflow="fold")
    for version in report.versions:
        states = [escape(version.servers.get(server, "")) for server in servers]
        table.add_row(str(version.version), escape(", ".join(version.labels)), *_facts(version), *states)
    return table


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
