"""The option ``--samples`` of commands that build warmup files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from spikeless.warmup import SampleFile


def samples_option(text: str) -> Callable[[Any], Any]:
    """``--samples``, with ``text`` as its help."""
    return click.option("--samples", metavar="[SIGNATURE=]FILE", callback=_parse, multiple=True, help=text)


def _parse(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[SampleFile, ...]:
    """``FILE`` or ``SIGNATURE=FILE``."""
    files = []
    for value in values:
        signature, equals, file = value.partition("=")
        named = equals and not Path(value).exists()
        files.append(SampleFile(Path(file), signature) if named else SampleFile(Path(value)))
    return tuple(files)


#: Of commands that take models from a registry.
registry_samples_option = samples_option(
    "Build warmup from these, where a model in MLflow brings none; as `spikeless warmup build` does."
)
