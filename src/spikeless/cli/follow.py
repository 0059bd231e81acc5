"""``spikeless follow``: publish what an alias of MLflow names, whenever it moves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from spikeless import registry
from spikeless.cli.gates import gate_options, gate_settings
from spikeless.cli.options import (
    Duration,
    fleet_options,
    fleet_settings,
    interruptible,
    json_option,
    label_option,
    models_option,
    tell,
)
from spikeless.cli.samples import registry_samples_option
from spikeless.errors import SpikelessError
from spikeless.rollout.promotion import PromotionSettings
from spikeless.warmup import SampleFile


@click.command("follow")
@click.argument("uri")
@click.argument("name", default="")
@models_option
@click.option(
    "--poll", type=Duration(at_least=0.05), default="10s", show_default=True, help="Time between looks."
)
@click.option("--once", is_flag=True, help="Look once, do what is to do, and exit.")
@click.option("--promote", "promoted", is_flag=True, help="Promote it on --servers, too.")
@label_option
@fleet_options
@gate_options
@registry_samples_option
@json_option
def command(
    uri: str,
    name: str,
    models: Path,
    poll: float,
    once: bool,
    promoted: bool,
    label: str,
    serving_root: str | None,
    samples: tuple[SampleFile, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Publish the version that URI names, such as models:/ctr@champion, when it moves.

    Each version is published once, through the gates of `spikeless publish`, under the
    number that it has in MLflow; with --promote, callers get it as by `spikeless
    promote`. The results are written to MLflow as tags. A version that is refused is
    not tried again while the alias stays; a rollback stands until the alias moves.
    Killed at any moment, it resumes when it is started again.

    MLFLOW_TRACKING_URI says where MLflow is.
    """
    fleet = fleet_settings(options)
    gates = gate_settings(options).pipeline()
    promotion = None
    if promoted:
        promotion = registry.Promotion(fleet, PromotionSettings(label=label, serving_root=serving_root))
    with interruptible() as stop:
        follower = registry.AliasFollower(
            registry.Registry(),
            uri,
            models,
            name,
            gates=gates,
            serving_root=serving_root,
            samples=samples,
            promotion=promotion,
            progress=tell,
            interrupted=stop,
        )
        if once:
            _print(follower.poll(), as_json)
            return
        complaint = ""
        while True:
            try:
                _print(follower.poll(), as_json)
                complaint = ""
            except SpikelessError as error:
                if str(error) != complaint:
                    tell(f"{uri}: {error}")
                complaint = str(error)
            if stop.wait(poll):
                return


def _print(followed: registry.Followed | None, as_json: bool) -> None:
    if followed is not None:
        fields = {**dataclasses.asdict(followed), "path": str(followed.path)}
        click.echo(json.dumps(fields) if as_json else followed)
