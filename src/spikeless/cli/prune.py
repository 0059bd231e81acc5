"""``spikeless prune``: remove old versions that nobody needs any more."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
from rich.filesize import decimal

from spikeless.cli.options import dry_run_option, json_option, models_option, servers_option, tell
from spikeless.rollout.fleet import FleetSettings
from spikeless.rollout.prune import prune


@click.command()
@click.argument("name")
@click.option("--keep", type=int, required=True, help="The newest versions that stay.")
@click.option("--force", is_flag=True, help="Remove versions that are younger than a day, too.")
@click.option("--offline", is_flag=True, help="No server uses this repository: ask none.")
@json_option
@dry_run_option
@models_option
@servers_option
def command(
    name: str,
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
    """
    fleet = None if offline else FleetSettings(servers)
    pruned = prune(models, name, keep, fleet, force=force, dry_run=dry_run, progress=tell)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(pruned)))
        return
    for version, reason in pruned.kept.items():
        click.echo(f"{name}: version {version} stays: {reason}")
    removed = ", ".join(map(str, pruned.removed)) or "no version"
    done = "would remove" if dry_run else "removed"
    click.echo(f"{name}: {done} {removed} ({decimal(pruned.freed)})")
