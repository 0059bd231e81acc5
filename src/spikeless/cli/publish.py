"""``spikeless publish``: make a SavedModel a version that servers pick up."""

from __future__ import annotations

from pathlib import Path

import click

from spikeless import repository
from spikeless.cli.options import Bytes
from spikeless.mapping import MapSettings


@click.command()
@click.argument("saved_model", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Name of the model.")
@click.option("--version", type=int, help="Number of the version.  [default: the next free one]")
@click.option(
    "--models",
    type=click.Path(path_type=Path),
    default="models",
    show_default=True,
    help="The model repository.",
)
@click.option("--load/--no-load", default=True, help="Load the model before it is published, as a test.")
@click.option("--map", "mapped", is_flag=True, help="Map its parameters from files: see `spikeless map`.")
@click.option("--min-bytes", type=Bytes(), default="1MiB", show_default=True, help="With --map, as there.")
@click.option("--verify/--no-verify", default=True, help="With --map: compare the outputs, as there.")
@click.option("--optimize", is_flag=True, help="With --map: also optimise the graph, as there.")
@click.option(
    "--serving-root", help="Absolute path of the repository on the server.  [default: that of --models here]"
)
def command(
    saved_model: Path,
    name: str,
    version: int | None,
    models: Path,
    load: bool,
    mapped: bool,
    min_bytes: int,
    verify: bool,
    optimize: bool,
    serving_root: str | None,
) -> None:
    """Copy SAVED_MODEL to a new version MODELS/NAME/VERSION/, which appears whole or not at all.

    The parameter files of a mapped model are checked and brought into the page cache first, and their paths
    are those that a server sees which has the repository at --serving-root.

    A version that is there is never overwritten, and nothing is published that could not be loaded. Progress
    goes to standard error, the new version's directory to standard output.
    """
    steps = [repository.CHECK_FILES, repository.CHECK_WARMUP]
    if mapped:
        steps.append(repository.map_step(MapSettings(min_bytes=min_bytes, verify=verify, optimize=optimize)))
    if load:
        steps.append(repository.CHECK_LOAD)
    published = repository.publish(
        saved_model,
        models,
        name,
        version,
        steps=steps,
        serving_root=serving_root,
        progress=lambda title: click.echo(f"{name}: {title}", err=True),
    )
    click.echo(published)
