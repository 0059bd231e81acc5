"""``spikeless train``: run one of the training scripts.

In: the name of a script, ``training/train_<name>.py``, and its options. Out: what that
script writes: a run directory (`spikeless.training.export`).
"""

from __future__ import annotations

import ast
import runpy
import signal
import sys
from pathlib import Path

import click

from spikeless.errors import NotFound, nearest

_PREFIX = "train_"


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--training",
    "folder",
    type=click.Path(path_type=Path),
    default="training",
    show_default=True,
    help="Folder of the training scripts.",
)
@click.argument("name", required=False)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def command(folder: Path, name: str | None, options: tuple[str, ...]) -> None:
    """Train the model NAME and export it. Without NAME, list the models there are.

    OPTIONS go to the training script: `spikeless train NAME --help` shows them.
    """
    scripts = {
        path.stem.removeprefix(_PREFIX): path
        for path in sorted(folder.glob(f"{_PREFIX}*.py"))
        if path.is_file()
    }
    if not scripts:
        raise NotFound(f"there are no training scripts in {folder}/; name their folder with --training")
    if name is None:
        width = max(map(len, scripts))
        for key, path in scripts.items():
            click.echo(f"{key:{width}}  {_summary(path)}")
        return
    if name not in scripts:
        there = nearest(name, scripts) or f"; there is: {', '.join(scripts)}"
        raise NotFound(f"{folder}/ has no training script for {name!r}{there}")
    # SIGTERM (`docker stop`, a batch system) ends a training as Ctrl-C does: what was
    # staged is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # As `python training/train_<name>.py` would have it, but with this command's
    # handling of errors.
    script = str(scripts[name])
    sys.argv = [script, *options]
    sys.path.insert(0, str(folder.resolve()))
    runpy.run_path(script, run_name="__main__")


def _summary(path: Path) -> str:
    documentation = ast.get_docstring(ast.parse(path.read_text())) or ""
    return documentation.partition("\n")[0]
