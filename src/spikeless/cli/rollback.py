"""``spikeless rollback``: give callers the version from before."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from spikeless.cli.options import (
    fleet_options,
    fleet_settings,
    interruptible,
    models_option,
    tell,
)
from spikeless.repository.models_config import STABLE
from spikeless.rollout.promotion import rollback


@click.command()
@click.argument("name")
@click.option("--to", "version", type=int, help="The version to go back to.  [default: the one before]")
@click.option("--label", default=STABLE, show_default=True, help="The label that moves.")
@click.option("--canary", is_flag=True, help="End the canary instead; the label stays.")
@click.option("--reason", default="", help="Why, for the journal.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@models_option
@fleet_options
def command(name: str, models: Path, as_json: bool, **options: Any) -> None:
    """Make the version from before the last promotion the one that callers of NAME get again.

    One step when that version is still loaded. After a promotion that was cut short, everything becomes what
    it was before it. Repeated, it changes nothing more; --to goes further back. All servers are told,
    whichever of them fail.
    """
    fleet = fleet_settings(options)
    with interruptible() as interrupted:
        outcome = rollback(models, name, fleet, progress=tell, interrupted=interrupted, **options)
    click.echo(json.dumps(dataclasses.asdict(outcome)) if as_json else outcome)
