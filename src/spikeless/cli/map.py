"""``spikeless map``: memory-map the parameters of a SavedModel."""

from __future__ import annotations

from pathlib import Path

import click

from spikeless.cli.options import Size, json_option
from spikeless.mapping import Manifest, MapSettings, VariableState, map_saved_model, repin


@click.command("map")
@click.argument("saved_model", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option(
    "--min-bytes",
    type=Size(),
    default="1MiB",
    show_default=True,
    help="Smaller variables are restored; TensorFlow copies those under 100KiB anyway.",
)
@click.option(
    "--serving-root", help="Absolute path of the version on the server; where it is here by default."
)
@click.option(
    "--records", type=click.Path(path_type=Path), help="Warmup records to compare on; the model's by default."
)
@click.option("--verify/--no-verify", default=True, help="Compare the outputs of original and mapped model.")
@click.option("--optimize", is_flag=True, help="Also optimise the graph, so that the server need not.")
@click.option(
    "--repin", "repin_only", is_flag=True, help="Correct the paths in a mapped model that was moved."
)
@json_option
def command(
    saved_model: Path,
    out: Path | None,
    min_bytes: int,
    serving_root: str | None,
    records: Path | None,
    verify: bool,
    optimize: bool,
    repin_only: bool,
    as_json: bool,
) -> None:
    """Write to OUT a copy of SAVED_MODEL whose large variables are mapped from files.

    The copy serves the same answers, which is checked bit by bit. It loads in the time
    that its graph needs, and its parameters take no private memory. The paths of its
    files are written into it: where the server sees the version at another path, say so
    with --serving-root, and when it is moved, run --repin.
    """
    if repin_only:
        if out is not None:
            raise click.UsageError("--repin changes SAVED_MODEL itself: leave OUT away")
        if not verify or optimize or records is not None:
            raise click.UsageError("--repin maps nothing: leave --no-verify, --optimize and --records away")
        manifest = repin(saved_model, serving_root)
    else:
        if out is None:
            raise click.UsageError("Missing argument 'OUT'.")
        settings = MapSettings(min_bytes, serving_root, verify, optimize, records)
        manifest = map_saved_model(saved_model, out, settings)
    if as_json:
        click.echo(manifest.to_json(), nl=False)
        return
    click.echo(summary(manifest))


def summary(manifest: Manifest) -> str:
    """How many variables are in each state, and how many requests were compared."""
    lines = []
    for state in VariableState:
        chosen = [variable for variable in manifest.variables if variable.state is state]
        total = sum(variable.bytes or 0 for variable in chosen)
        noun = "variable" if len(chosen) == 1 else "variables"
        lines.append(f"{state.value:<9} {len(chosen):>5} {noun:<9} {total / 2**20:>12,.1f} MiB")
    requests = "request" if manifest.compared == 1 else "requests"
    lines.append(
        f"compared  {manifest.compared:>5} {requests}, all answers the same"
        if manifest.compared
        else "not compared"
    )
    if not any(variable.state is VariableState.MAPPED for variable in manifest.variables):
        lines.append(
            "nothing is mapped: `spikeless inspect` says why of each variable; smaller ones are with "
            "--min-bytes, though TensorFlow copies those under 100KiB"
        )
    return "\n".join(lines)
