"""``spikeless report``: raw results become an HTML page."""

from __future__ import annotations

import datetime
from pathlib import Path

import click

from spikeless.bench import report
from spikeless.errors import NotFound

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("results", type=_PATH, nargs=-1, required=True)
@click.option("--out", type=_PATH, help="Directory of the report.  [default: reports/<time>]")
def command(results: tuple[Path, ...], out: Path | None) -> None:
    """Turn the raw RESULTS of `spikeless bench` into OUT/index.html.

    RESULTS are files, or directories of them. The page needs no network. Its table is
    also written to OUT/summary.md and to standard output.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    directory = out or Path("reports") / now.strftime("%Y%m%dT%H%M%SZ")
    page = report.write(_files(results), directory)
    click.echo((directory / "summary.md").read_text())
    click.echo(page)


def _files(results: tuple[Path, ...]) -> list[Path]:
    files: list[Path] = []
    for result in results:
        found = sorted(result.glob("*.npz")) if result.is_dir() else [result]
        if not found:
            raise NotFound(f"{result} holds no raw results (*.npz)")
        files += found
    return files
