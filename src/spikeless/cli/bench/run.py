"""``spikeless bench run``."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

from spikeless import bench
from spikeless.bench import report
from spikeless.cli.bench.measuring import measured
from spikeless.cli.bench.options import RunOptions, run_options
from spikeless.cli.options import json_option


@click.command("run")
@click.argument("name")
@run_options(publishes=1, duration="30s")
@json_option
def run_command(as_json: bool, **options: Any) -> None:
    """Drive load against a server and write one raw result.

    Without --server a server is started on MODELS/NAME and stopped afterwards;
    SPIKELESS_SERVER names its engine. With --publish or --publish-command the next
    version is published while the load runs, with --publishes several. By default the
    requests are those of the newest version's warmup file.
    """
    path, result = measured(RunOptions.of(options))
    summary = bench.analyse(result)
    if as_json:
        click.echo(json.dumps({"result": str(path), **dataclasses.asdict(summary)}, indent=1))
    else:
        report.show(report.group([result]))
        click.echo(path)
