"""``spikeless demo``: the whole pipeline, in a few minutes."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from spikeless import demo
from spikeless.cli.options import Duration


@click.command()
@click.option("--reports", type=click.Path(path_type=Path), default="reports", show_default=True)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    default=demo.DemoSettings.rate,
    show_default=True,
    help="Requests/s.",
)
@click.option(
    "--duration",
    type=Duration(at_least=demo.SHORTEST_SECONDS),
    default=f"{demo.DemoSettings.seconds:g}s",
    show_default=True,
    help="How long requests are sent in each run.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=demo.DemoSettings.repeats,
    show_default=True,
    help="Runs of each scenario.",
)
def command(reports: Path, rate: float, duration: float, repeats: int) -> None:
    """Train, publish, serve, swap under load, report; with and without a warmup file.

    Run it in a clone of the project.
    """
    settings = demo.DemoSettings(
        reports=reports, rate=rate, seconds=duration, publish_at=duration * 5 / 9, repeats=repeats
    )
    demo.run(settings, Console())
