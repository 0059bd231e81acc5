"""The options of commands that pass a version through the gates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from spikeless.cli.options import SERVER, Duration, Size
from spikeless.mapping import MapSettings
from spikeless.repository.gates import GateSettings
from spikeless.repository.golden import Tolerance
from spikeless.rollout import local_servers

_Function = TypeVar("_Function", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--no-load", is_flag=True, help="Do not load the model first and ask it, as a test."),
    click.option("--allow-cold", is_flag=True, help="It may have no warmup file, or no signature."),
    click.option("--allow-breaking", is_flag=True, help="Callers of the stable version may fail."),
    click.option(
        "--golden",
        type=click.Path(path_type=Path),
        help="PredictionLog records with the answers that they should get.",
    ),
    click.option(
        "--rtol", default=Tolerance.rtol, show_default=True, help="How far answers may be off, relatively ..."
    ),
    click.option("--atol", default=Tolerance.atol, show_default=True, help="... and absolutely."),
    click.option(
        "--server",
        type=SERVER,
        help="A server on this machine that is to load it: its flags and version count.",
    ),
    click.option("--server-flag", multiple=True, help="Or a flag that servers have; repeatable."),
    click.option("--server-version", help="Or their version, such as 2.20.0.  [default: TensorFlow's here]"),
    click.option("--memory", type=Size(), help="Memory that servers have for it.  [default: this machine's]"),
    click.option(
        "--max-first-request",
        type=Duration(),
        default="1s",
        show_default=True,
        help="How long the first request after load and warmup may take.",
    ),
    click.option("--map", "mapped", is_flag=True, help="Map its parameters from files: see `spikeless map`."),
    click.option("--min-bytes", type=Size(), default="1MiB", show_default=True, help="With --map, as there."),
    click.option("--verify/--no-verify", default=True, help="With --map: compare the outputs, as there."),
    click.option("--optimize", is_flag=True, help="With --map: also optimise the graph, as there."),
    click.option(
        "--serving-root",
        help="Absolute path of the repository on the server.  [default: that of --models here]",
    ),
)


def gate_options(function: _Function) -> _Function:
    """What a version has to pass; `gate_settings` reads it, but for --serving-root."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def gate_settings(options: dict[str, Any]) -> GateSettings:
    """Take the options of `gate_options` out of ``options``."""
    mapped, min_bytes = options.pop("mapped"), options.pop("min_bytes")
    verify, optimize = options.pop("verify"), options.pop("optimize")
    if not mapped and (optimize or not verify):
        raise click.UsageError("--optimize and --no-verify are for --map: give that, too")
    return GateSettings(
        allow_breaking=options.pop("allow_breaking"),
        allow_cold=options.pop("allow_cold"),
        golden=options.pop("golden"),
        tolerance=Tolerance(options.pop("rtol"), options.pop("atol")),
        mapping=MapSettings(min_bytes=min_bytes, verify=verify, optimize=optimize) if mapped else None,
        load=not options.pop("no_load"),
        target=local_servers.capabilities(
            options.pop("server"), options.pop("server_flag"), options.pop("server_version")
        ),
        memory=options.pop("memory"),
        max_first_request=options.pop("max_first_request"),
    )
