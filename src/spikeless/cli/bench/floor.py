"""``spikeless bench floor``."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from spikeless import bench
from spikeless.bench import report
from spikeless.bench.load.generator_floor import built_in_requests
from spikeless.cli.bench.measuring import checked_settings
from spikeless.cli.bench.options import duration_option, load_options
from spikeless.cli.options import json_option


@click.command("floor")
@load_options
@duration_option(f"{bench.FLOOR_SECONDS:g}s")
@json_option
def floor_command(requests: Path | None, duration: float, as_json: bool, **load: Any) -> None:
    """Measure the load generator's own latency on a server that answers at once."""
    with ExitStack() as stack:
        settings = checked_settings(
            requests=str(requests or stack.enter_context(built_in_requests())),
            model_name="floor",
            seconds=duration,
            warm_seconds=0.0,
            **load,
        )
        progress = stack.enter_context(bench.progress_bar("floor", duration))
        measured = bench.measure_floor(settings, duration, progress)
    click.echo(json.dumps(dataclasses.asdict(measured), indent=1) if as_json else report.floor_text(measured))
