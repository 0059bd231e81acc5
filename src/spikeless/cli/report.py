"""``spikeless report``: raw results become an HTML page."""

from __future__ import annotations

import datetime
from pathlib import Path

import click

from spikeless.bench import read_run, report, result_files

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("results", type=_PATH, nargs=-1)
@click.option(
    "--compare", type=_PATH, nargs=2, metavar="BEFORE AFTER", help="Two results, and what changed between."
)
@click.option("--force", is_flag=True, help="Compare even if they are from different machines.")
@click.option("--out", type=_PATH, help="Directory of the report.  [default: reports/<time>]")
def command(
    results: tuple[Path, ...], compare: tuple[Path, Path] | None, force: bool, out: Path | None
) -> None:
    """Turn the raw RESULTS of `spikeless bench` into OUT/index.html.

    RESULTS are files, or directories of them. The page needs no network. Verdict and
    table are also printed, and OUT/summary.md has them for a pull request.
    """
    if bool(results) == bool(compare):
        raise click.UsageError("give RESULTS, or two of them with --compare BEFORE AFTER")
    if force and not compare:
        raise click.UsageError("--force belongs to --compare")
    now = datetime.datetime.now(datetime.timezone.utc)
    directory = out or Path("reports") / now.strftime("%Y%m%dT%H%M%SZ")
    comparison = None
    if compare:
        before, after = map(result_files, compare)
        files = [*before, *after]
        old, new = ([read_run(path) for path in paths] for paths in (before, after))
        names = _names(*compare)
        comparison = report.compare((names[0], old), (names[1], new), force)
        scenarios = comparison.scenarios
    else:
        files = [file for result in results for file in result_files(result)]
        scenarios = report.group([read_run(path) for path in files])
    page = report.write(files, directory, comparison)
    report.show(scenarios, comparison=comparison)
    click.echo(page)


def _names(before: Path, after: Path) -> tuple[str, str]:
    """Short names of two results: those of their files, or their whole paths."""
    if before.stem != after.stem:
        return before.stem, after.stem
    return str(before), str(after)
