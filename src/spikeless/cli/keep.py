"""``spikeless keep``: hold the mapped parameters of served versions in memory."""

from __future__ import annotations

import json
from pathlib import Path

import click

from spikeless.cli.options import Duration, Size, interruptible, json_option, models_option
from spikeless.errors import SpikelessError
from spikeless.sidecars.keep import Keeper, Kept, served_versions


@click.command("keep")
@models_option
@click.option("--budget", type=Size(), required=True, help="How much to lock at most, such as 4GiB.")
@click.option(
    "--poll", type=Duration(at_least=0.05), default="1s", show_default=True, help="Time between looks."
)
@click.option("--once", is_flag=True, help="Look once, say what would be kept, and exit.")
@json_option
def command(models: Path, budget: int, poll: float, once: bool, as_json: bool) -> None:
    """Keep the parameters of the versions that are served in memory.

    Run it beside the server, on the same machine and files: the kernel then keeps the
    pages that the server maps. It follows models.config and the version folders. It
    prints a line whenever something changes, and goes on with what it has when it can
    lock no more or models.config cannot be read.
    """
    complaint = ""
    with interruptible() as stop, Keeper(lambda: served_versions(models), budget) as keeper:
        kept = keeper.poll()  # what is wrong at the start ends it
        _report(kept, budget, as_json)
        while not once and not stop.wait(poll):
            before = kept.left_out
            try:
                kept = keeper.poll()
            except SpikelessError as error:
                if str(error) != complaint:
                    click.echo(f"what is locked stays locked: {error}", err=True)
                complaint = str(error)
                continue
            complaint = ""
            if kept.locked or kept.released or kept.left_out != before:
                _report(kept, budget, as_json)


def _report(kept: Kept, budget: int, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({**vars(kept), "budget": budget}, default=str))
        return
    for what, paths in (("locked", kept.locked), ("released", kept.released), ("over budget", kept.left_out)):
        for path in paths:
            click.echo(f"{what}: {path}")
    click.echo(f"keeping {kept.bytes:,} of {budget:,} bytes")
    if not kept.bytes and not kept.left_out:
        click.echo("no version that is served has mapped parameters: see `spikeless map`")
