"""``spikeless push``: a version goes into a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from spikeless.cli.options import (
    interruptible,
    json_option,
    print_result,
    store_options,
    store_settings,
    tell,
)
from spikeless.store.push import push


@click.command()
@click.argument("version_dir", type=click.Path(path_type=Path))
@click.argument("store")
@click.argument("name", required=False)
@click.option("--version", type=int, help="Its version, for a SavedModel from elsewhere.")
@click.option(
    "--models",
    type=click.Path(path_type=Path),
    help="For a SavedModel from elsewhere: the repository whose stable version it is compared with.",
)
@store_options
@json_option
def command(
    version_dir: Path,
    store: str,
    name: str | None,
    version: int | None,
    models: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Put VERSION_DIR, such as models/ctr/7, into STORE, such as s3://bucket/models.

    A version that was published has passed its gates; a SavedModel from elsewhere
    passes them first, under NAME. Only what earlier versions do not have is sent. The
    version shows when all of it is there; it is never overwritten. Credentials are
    those that the store's library finds.
    """
    with interruptible() as interrupted:
        result = push(
            version_dir,
            store,
            name=name,
            number=version,
            models=models,
            settings=store_settings(options),
            progress=tell,
            interrupted=interrupted,
        )
    print_result(result, as_json)
