"""``spikeless bench``: measure latency under load while versions are swapped.

One module for each sub-command, and what they share: `options`, and `measuring`.
"""

from __future__ import annotations

import click

from spikeless.cli.bench.files import hdr_command, merge_command
from spikeless.cli.bench.floor import floor_command
from spikeless.cli.bench.gate import gate_command
from spikeless.cli.bench.ladder import ladder_command
from spikeless.cli.bench.run import run_command


@click.group()
def command() -> None:
    """Measure latency under open-loop load while versions are swapped."""


for _command in (run_command, gate_command, floor_command, ladder_command, merge_command, hdr_command):
    command.add_command(_command)
