"""``spikeless prune``: remove old versions that nobody needs any more."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.filesize import decimal

from spikeless.cli.options import (
    check_only_of_a_store,
    dry_run_option,
    interruptible,
    json_option,
    models_option,
    servers_option,
    store_option,
    tell,
)
from spikeless.rollout.fleet import FleetSettings
from spikeless.rollout.prune import prune


@click.command()
@click.argument("name")
@store_option
@click.option("--keep", type=int, required=True, help="The newest versions that stay.")
@click.option("--force", is_flag=True, help="Remove versions that are younger than a day, too.")
@click.option("--offline", is_flag=True, help="No server uses this repository: ask none.")
@json_option
@dry_run_option
@models_option
@servers_option
def command(
    name: str,
    store: str | None,
    keep: int,
    force: bool,
    offline: bool,
    as_json: bool,
    dry_run: bool,
    models: Path,
    servers: Any,
) -> None:
    """Remove all versions of NAME but the newest.

    What is labelled, named in models.config, loaded by a server, mapped by a process on
    this machine, or younger than a day stays as well. When a server does not answer,
    nothing is removed.

    With --store, versions leave the store: all but the newest, those that are promoted,
    and those that were pushed less than a day ago. Somebody may be pulling what leaves,
    so its space is freed by a prune on the next day.
    """
    if store is not None:
        _prune_store(store, name, keep, force, dry_run, as_json)
        return
    fleet = None if offline else FleetSettings(servers)
    pruned = prune(models, name, keep, fleet, force=force, dry_run=dry_run, progress=tell)
    if not as_json:
        _tell(name, pruned.kept, pruned.removed, dry_run, decimal(pruned.freed))
    else:
        click.echo(json.dumps(dataclasses.asdict(pruned)))


def _prune_store(store: str, name: str, keep: int, force: bool, dry_run: bool, as_json: bool) -> None:
    from spikeless.store import prune as stores

    check_only_of_a_store("keep", "force")
    with interruptible() as interrupted:
        pruned = stores.prune(
            store, name, keep, force=force, dry_run=dry_run, progress=tell, interrupted=interrupted
        )
    if not as_json:
        space = f"{decimal(pruned.freed)}; {decimal(pruned.waiting)} from tomorrow on"
        _tell(name, pruned.kept, pruned.removed, dry_run, space)
    else:
        click.echo(json.dumps(dataclasses.asdict(pruned)))


def _tell(name: str, kept: Mapping[int, str], removed: tuple[int, ...], dry_run: bool, space: str) -> None:
    for version, reason in kept.items():
        click.echo(f"{name}: version {version} stays: {reason}")
    done = "would remove" if dry_run else "removed"
    click.echo(f"{name}: {done} {', '.join(map(str, removed)) or 'no version'} ({space})")
