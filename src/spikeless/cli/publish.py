"""``spikeless publish``: make a SavedModel a version that servers pick up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from spikeless.cli.options import (
    Duration,
    Size,
    dry_run_option,
    json_option,
    models_option,
    tell,
)
from spikeless.mapping import MapSettings
from spikeless.repository import models_config, publishing
from spikeless.repository.gates import GateSettings
from spikeless.repository.golden import Tolerance
from spikeless.rollout import local_servers


@click.command()
@click.argument("saved_model", type=click.Path(path_type=Path))
@click.argument("name")
@click.option("--version", type=int, help="Number of the version.  [default: the next free one]")
@models_option
@click.option("--no-load", is_flag=True, help="Do not load the model first and ask it, as a test.")
@click.option("--allow-cold", is_flag=True, help="It may have no warmup file, or no signature.")
@click.option("--allow-breaking", is_flag=True, help="Callers of the stable version may fail.")
@click.option(
    "--golden",
    type=click.Path(path_type=Path),
    help="PredictionLog records with the answers that they should get.",
)
@click.option(
    "--rtol", default=Tolerance.rtol, show_default=True, help="How far answers may be off, relatively ..."
)
@click.option("--atol", default=Tolerance.atol, show_default=True, help="... and absolutely.")
@click.option("--server", help="A server on this machine that is to load it: its flags and version count.")
@click.option("--server-flag", multiple=True, help="Or a flag that servers have; repeatable.")
@click.option("--server-version", help="Or their version, such as 2.20.0.  [default: TensorFlow's here]")
@click.option("--memory", type=Size(), help="Memory that servers have for it.  [default: this machine's]")
@click.option(
    "--max-first-request",
    type=Duration(),
    default="1s",
    show_default=True,
    help="How long the first request after load and warmup may take.",
)
@click.option("--map", "mapped", is_flag=True, help="Map its parameters from files: see `spikeless map`.")
@click.option("--min-bytes", type=Size(), default="1MiB", show_default=True, help="With --map, as there.")
@click.option("--verify/--no-verify", default=True, help="With --map: compare the outputs, as there.")
@click.option("--optimize", is_flag=True, help="With --map: also optimise the graph, as there.")
@click.option(
    "--serving-root", help="Absolute path of the repository on the server.  [default: that of --models here]"
)
@dry_run_option
@json_option
def command(
    saved_model: Path,
    name: str,
    version: int | None,
    models: Path,
    no_load: bool,
    allow_cold: bool,
    allow_breaking: bool,
    golden: Path | None,
    rtol: float,
    atol: float,
    server: str | None,
    server_flag: tuple[str, ...],
    server_version: str | None,
    memory: int | None,
    max_first_request: float,
    mapped: bool,
    min_bytes: int,
    verify: bool,
    optimize: bool,
    serving_root: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Copy SAVED_MODEL to MODELS/NAME/VERSION/, which appears whole or not at all.

    A version that is there is never overwritten, and nothing is published that could
    not be loaded, fails on its warmup records or golden requests, or would fail callers
    of the stable version. The parameter files of a mapped model are checked and brought
    into the page cache first, and their paths are those that a server sees which has
    the repository at --serving-root. Progress goes to standard error, the new version's
    directory to standard output.
    """
    if not mapped and (optimize or not verify):
        raise click.UsageError("--optimize and --no-verify are for --map: give that, too")
    settings = GateSettings(
        allow_breaking=allow_breaking,
        allow_cold=allow_cold,
        golden=golden,
        tolerance=Tolerance(rtol, atol),
        mapping=MapSettings(min_bytes=min_bytes, verify=verify, optimize=optimize) if mapped else None,
        load=not no_load,
        target=local_servers.capabilities(server, server_flag, server_version),
        memory=memory,
        max_first_request=max_first_request,
    )
    staged = publishing.stage(
        saved_model,
        models,
        name,
        version,
        gates=settings.pipeline(),
        serving_root=serving_root,
        progress=lambda title: tell(f"{name}: {title}"),
    )
    with staged as candidate:
        tell(f"{name}: {'it could be published' if dry_run else 'publishing'}")
        path = candidate.target if dry_run else candidate.publish()
    if not dry_run and (missing := _next_step(models, name, candidate.version)):
        tell(f"{name}: {missing}")
    if as_json:
        click.echo(
            json.dumps(
                {
                    "path": str(path),
                    "name": name,
                    "version": candidate.version,
                    "bytes": candidate.size,
                    "gates": candidate.passed,
                    "warnings": candidate.warnings,
                    "findings": dataclasses.asdict(candidate.findings),
                    "dry_run": dry_run,
                }
            )
        )
    else:
        click.echo(path)


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
