"""``spikeless publish``: make a SavedModel a version that servers pick up."""

from __future__ import annotations

from pathlib import Path

import click

from spikeless import repository


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
def command(saved_model: Path, name: str, version: int | None, models: Path, load: bool) -> None:
    """Copy SAVED_MODEL to a new version MODELS/NAME/VERSION/, which appears whole or not at all.

    A version that is there is never overwritten, and nothing is published that could not be loaded. Progress
    goes to standard error, the new version's directory to standard output.
    """
    published = repository.publish(
        saved_model,
        models,
        name,
        version,
        steps=[step for step in repository.STEPS if load or step is not repository.CHECK_LOAD],
        progress=lambda title: click.echo(f"{name}: {title}", err=True),
    )
    click.echo(published)
