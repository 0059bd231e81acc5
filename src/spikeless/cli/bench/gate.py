"""``spikeless bench gate``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from spikeless import bench
from spikeless.bench import gate
from spikeless.bench.report.judgement import judgement_junit, judgement_markdown, show_judgement
from spikeless.cli.bench.measuring import measured
from spikeless.cli.bench.options import PATH, POSITIVE, RunOptions, Slo, run_options
from spikeless.cli.options import json_option
from spikeless.disk.atomic import write_atomically
from spikeless.errors import InvalidArgument


@click.command("gate")
@click.argument("name", required=False)
@click.option(
    "--slo",
    "slos",
    type=Slo(),
    multiple=True,
    help="Limit of p50, p99, p99.9 or max during reloads, such as p99.9=20ms; repeatable.",
)
@click.option("--spike-ratio", type=POSITIVE, help="Limit of p99.9 during reloads relative to quiet time.")
@click.option(
    "--errors",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="How many requests may fail.",
)
@click.option("--baseline", type=PATH, multiple=True, help="Earlier result to compare with; repeatable.")
@click.option(
    "--baseline-ratio",
    type=POSITIVE,
    default=1.25,
    show_default=True,
    help="Limit of the same figures relative to those of the baseline.",
)
@click.option("--run", "runs", type=PATH, multiple=True, help="Judge this result instead; repeatable.")
@click.option("--junit", type=PATH, help="Write the verdict to this file as JUnit XML.")
@click.option("--markdown", type=PATH, help="Write it to this file as Markdown, for a pull request.")
@run_options(publishes=12, duration="60s")
@json_option
def gate_command(
    name: str | None,
    slos: tuple[tuple[str, float], ...],
    spike_ratio: float | None,
    errors: int,
    baseline: tuple[Path, ...],
    baseline_ratio: float,
    runs: tuple[Path, ...],
    junit: Path | None,
    markdown: Path | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Judge swaps under load by limits, for CI.

    Exits with 0 when every limit is held, with 1 when one is broken, and with 3 when it
    is too noisy to tell, which is no pass. The swaps of NAME are measured as by `bench
    run`, with --publish or --publish-command; with --run earlier results of one
    scenario are read instead. Figures are those of all reloads together, with 95 %
    intervals.
    """
    swaps = bool(options["saved_models"]) or options["publish_command"] is not None
    if swaps == bool(runs):
        raise click.UsageError("give --publish or --publish-command to measure swaps, or --run to read them")
    if swaps == (name is None):
        raise click.UsageError("NAME is the model to measure: give it with --publish, and not with --run")
    limits = gate.Limits(dict(slos), spike_ratio, errors, baseline_ratio)
    for path in (junit, markdown):
        if path is not None and not path.absolute().parent.is_dir():
            raise InvalidArgument(f"{path} cannot be written: its directory does not exist")
    before = _read(baseline)
    results = _read(runs)
    if name is not None:
        path, result = measured(RunOptions.of({"name": name, **options}))
        click.echo(path, err=True)
        results = [result]
    judgement = gate.judge(results, limits, before)
    if junit is not None:
        write_atomically(junit, judgement_junit(judgement))
    if markdown is not None:
        write_atomically(markdown, judgement_markdown(judgement).encode())
    if as_json:
        told = {"outcome": judgement.outcome, **dataclasses.asdict(judgement)}
        click.echo(json.dumps(told, indent=1))
    else:
        show_judgement(judgement, Console(width=None if sys.stdout.isatty() else 10_000))
    return judgement.outcome.exit_code


def _read(results: Sequence[Path]) -> list[bench.Run]:
    return [bench.read_run(file) for result in results for file in bench.result_files(result)]
