"""``spikeless publish``: make a SavedModel a version that servers pick up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from spikeless.cli.gates import gate_options, gate_settings
from spikeless.cli.options import (
    dry_run_option,
    json_option,
    models_option,
    tell,
)
from spikeless.cli.samples import registry_samples_option
from spikeless.repository import models_config, publishing
from spikeless.repository.candidate import Candidate
from spikeless.warmup import SampleFile


@click.command()
@click.argument("saved_model", type=click.Path())
@click.argument("name", default="")
@click.option("--version", type=int, help="Number of the version.  [default: the next free one]")
@models_option
@gate_options
@registry_samples_option
@dry_run_option
@json_option
def command(
    saved_model: str,
    name: str,
    version: int | None,
    models: Path,
    serving_root: str | None,
    samples: tuple[SampleFile, ...],
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Copy SAVED_MODEL to MODELS/NAME/VERSION/, which appears whole or not at all.

    SAVED_MODEL is a folder, or a model in MLflow: models:/NAME@ALIAS,
    models:/NAME/VERSION, runs:/RUN/PATH. A version of MLflow keeps its number, and gets
    the result as tags.

    A version that is there is never overwritten, and nothing is published that could
    not be loaded, fails on its warmup records or golden requests, or would fail callers
    of the stable version. The parameter files of a mapped model are checked and brought
    into the page cache first, and their paths are those that a server sees which has
    the repository at --serving-root. Progress goes to standard error, the new version's
    directory to standard output.
    """
    gates = gate_settings(options).pipeline()
    if saved_model.startswith(("models:/", "runs:/")):
        candidate = _from_registry(saved_model, models, name, version, gates, serving_root, samples, dry_run)
    else:
        if not name:
            raise click.MissingParameter(param_hint="'NAME'", param_type="argument")
        if samples:
            raise click.UsageError("--samples is for models in MLflow: run `spikeless warmup build` first")
        staged = publishing.stage(
            saved_model,
            models,
            name,
            version,
            gates=gates,
            serving_root=serving_root,
            progress=lambda title: tell(f"{name}: {title}"),
        )
        with staged as candidate:
            tell(f"{name}: {'it could be published' if dry_run else 'publishing'}")
            if not dry_run:
                candidate.publish()
    if not dry_run and (missing := _next_step(models, candidate.name, candidate.version)):
        tell(f"{candidate.name}: {missing}")
    click.echo(json.dumps(_result(candidate, dry_run)) if as_json else candidate.target)


def _from_registry(
    uri: str,
    models: Path,
    name: str,
    version: int | None,
    gates: Any,
    serving_root: str | None,
    samples: tuple[SampleFile, ...],
    dry_run: bool,
) -> Candidate:
    from spikeless import registry

    server = registry.Registry()
    release = server.resolve(uri)
    title = name or release.name
    return registry.publish(
        server,
        release,
        models,
        name,
        version,
        gates=gates,
        serving_root=serving_root,
        samples=samples,
        progress=lambda line: tell(f"{title}: {line}"),
        dry_run=dry_run,
    )


def _result(candidate: Candidate, dry_run: bool) -> dict[str, Any]:
    return {
        "path": str(candidate.target),
        "name": candidate.name,
        "version": candidate.version,
        "source": candidate.origin.source,
        "run": candidate.origin.run,
        "bytes": candidate.size,
        "gates": candidate.passed,
        "warnings": candidate.warnings,
        "findings": dataclasses.asdict(candidate.findings),
        "dry_run": dry_run,
    }


def _next_step(models: Path, name: str, version: int) -> str:
    """What servers that read ``models.config`` still need to serve it, or nothing."""
    file, config = models / models_config.FILE_NAME, models_config.read(models)
    if not config.names:
        return ""
    model = config.model(name)
    if model is None:
        return f"{file} does not list it: `spikeless promote {name} {version}` adds it, and servers load it"
    if model.model_version_policy.HasField("specific"):
        return f"{file} says which versions are served: `spikeless promote {name} {version}` is next"
    return ""
