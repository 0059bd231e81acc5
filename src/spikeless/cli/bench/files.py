"""``spikeless bench merge`` and ``bench hdr``: other files from raw results."""

from __future__ import annotations

from pathlib import Path

import click

from spikeless import bench
from spikeless.cli.bench.options import PATH
from spikeless.errors import InvalidArgument


@click.command("merge")
@click.argument("merged", type=PATH)
@click.argument("parts", type=PATH, nargs=-1, required=True)
def merge_command(merged: Path, parts: tuple[Path, ...]) -> None:
    """Merge the files that the workers of one run wrote into MERGED."""
    if merged.exists():
        raise InvalidArgument(f"{merged} is there already and is not overwritten")
    bench.merge([bench.read_run(part) for part in parts]).save(merged)
    click.echo(merged)


@click.command("hdr")
@click.argument("results", type=PATH, nargs=-1, required=True)
def hdr_command(results: tuple[Path, ...]) -> None:
    """Write an HdrHistogram log beside each of the raw RESULTS.

    It has a histogram of latencies in nanoseconds for each second, tagged "reload"
    inside the windows of reloads, for tools that read such logs.
    """
    from spikeless.bench.hdr import SUFFIX, write_hdr

    for file in (file for result in results for file in bench.result_files(result)):
        log = file.with_suffix(SUFFIX)
        write_hdr(bench.read_run(file), log)
        click.echo(log)
