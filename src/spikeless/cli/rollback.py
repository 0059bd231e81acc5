"""``spikeless rollback``: give callers the version from before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from spikeless.cli.options import (
    change_options,
    fleet_settings,
    interruptible,
    label_option,
    print_result,
    tell,
)
from spikeless.rollout.promotion import rollback


@click.command()
@click.argument("name")
@click.option("--to", "version", type=int, help="The version to go back to.  [default: the one before]")
@label_option
@click.option("--canary", is_flag=True, help="End the canary instead; the label stays.")
@change_options
def command(name: str, models: Path, as_json: bool, **options: Any) -> None:
    """Give callers of NAME the version from before the last promotion again.

    One step when that version is still loaded. After a promotion that was cut short,
    everything becomes what it was before it. Repeated, it changes nothing more; --to
    goes further back. All servers are reloaded, even when some fail.
    """
    fleet = fleet_settings(options)
    with interruptible() as interrupted:
        outcome = rollback(models, name, fleet, progress=tell, interrupted=interrupted, **options)
    print_result(outcome, as_json)
