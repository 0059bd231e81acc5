"""``spikeless rollback``: give callers the version from before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from spikeless.cli.options import (
    change_options,
    check_only_of_a_store,
    fleet_settings,
    interruptible,
    label_option,
    print_result,
    store_option,
    tell,
)
from spikeless.rollout.promotion import rollback


@click.command()
@click.argument("name")
@click.option("--to", "version", type=int, help="The version to go back to.  [default: the one before]")
@label_option
@store_option
@click.option("--canary", is_flag=True, help="End the canary instead; the label stays.")
@change_options
def command(name: str, models: Path, store: str | None, as_json: bool, **options: Any) -> None:
    """Give callers of NAME the version from before the last promotion again.

    One step when that version is still loaded. After a promotion that was cut short,
    everything becomes what it was before it. Repeated, it changes nothing more; --to
    goes further back. All servers are reloaded, even when some fail.

    With --store, the store says so from now on, and each machine that follows it does
    it.
    """
    if store is not None:
        from spikeless.store import promotions

        check_only_of_a_store()
        chosen = {key: options[key] for key in ("version", "label", "reason", "dry_run")}
        with interruptible() as interrupted:
            outcome = promotions.rollback(store, name, **chosen, interrupted=interrupted)
        print_result(outcome, as_json)
        return
    fleet = fleet_settings(options)
    with interruptible() as interrupted:
        outcome = rollback(models, name, fleet, progress=tell, interrupted=interrupted, **options)
    print_result(outcome, as_json)
