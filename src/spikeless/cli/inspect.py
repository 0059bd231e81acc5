"""``spikeless inspect``: the variables of a SavedModel and where their memory is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spikeless.cli.options import Size, json_option
from spikeless.disk import pages
from spikeless.formats.tensors import shape_text
from spikeless.mapping import COPIED_BYTES, VariableState, inspect, is_mapped
from spikeless.mapping.manifest import VariableRecord


@click.command("inspect")
@click.argument("saved_model", type=click.Path(path_type=Path))
@click.option(
    "--min-bytes",
    type=Size(),
    default="1MiB",
    show_default=True,
    help="For a model that is not mapped: as in `spikeless map`.",
)
@json_option
def command(saved_model: Path, min_bytes: int, as_json: bool) -> None:
    """Show which variables of SAVED_MODEL are mapped, restored (and why) or dropped.

    For a SavedModel that is not mapped, it shows what `spikeless map` would do. The
    resident share of a mapped file is what the page cache holds of it now.
    """
    mapped = is_mapped(saved_model)
    variables = inspect(saved_model, min_bytes)
    shares = {
        variable.file: pages.resident(file) / (variable.bytes or 1)
        for variable in variables
        if variable.file and (file := saved_model / variable.file).is_file()
    }
    if as_json:
        rows = [
            {
                **dataclasses.asdict(variable),
                "state": variable.state.value,
                "resident": shares.get(variable.file or ""),
            }
            for variable in variables
        ]
        click.echo(json.dumps({"mapped": mapped, "variables": rows}, indent=2, ensure_ascii=False))
        return
    Console(width=None if Console().is_terminal else 200).print(_table(mapped, variables, shares))


_COLUMNS = ("variable", "type", "shape", "bytes", "state", "file", "resident", "why")


def _table(mapped: bool, variables: tuple[VariableRecord, ...], shares: dict[str, float]) -> Table:
    several = len({variable.tags for variable in variables}) > 1
    rows: list[tuple[str, ...]] = []
    for variable in variables:
        share = shares.get(variable.file or "")
        missing = "missing" if variable.file else ""
        state = variable.state.value if mapped else f"to be {variable.state.value}"
        cells: tuple[str, ...] = (
            f"{variable.name} ({','.join(variable.tags)})" if several else variable.name,
            variable.dtype.removeprefix("DT_").lower(),
            "[...]" if variable.shape is None else shape_text(variable.shape),
            "" if variable.bytes is None else f"{variable.bytes:,}",
            state,
            (variable.file or "").rpartition("/")[2],
            missing if share is None else f"{share:.0%}",
            _why(variable),
        )
        rows.append(cells)
    table = Table(box=None)
    filled = [any(row[number] for row in rows) for number in range(len(_COLUMNS))]
    # A narrow terminal folds cells, and shows no column that has nothing to say.
    for number, name in enumerate(_COLUMNS):
        if filled[number]:
            right = name in ("bytes", "resident")
            table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        table.add_row(*(escape(cell) for number, cell in enumerate(row) if filled[number]))
    return table


def _why(variable: VariableRecord) -> str:
    if variable.state is VariableState.DROPPED:
        return "no signature reaches it"
    if variable.state is VariableState.MAPPED and (variable.bytes or 0) < COPIED_BYTES:
        return f"TensorFlow copies it: smaller than {COPIED_BYTES:,} bytes"
    if variable.state is VariableState.MAPPED and variable.by_row:
        return "looked up row by row"
    return variable.reason
