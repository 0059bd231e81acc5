"""``spikeless exporter``: a server's version states and memory, for Prometheus."""

from __future__ import annotations

from pathlib import Path

import click
from prometheus_client import CollectorRegistry, start_http_server

from spikeless.cli.options import PORT, interruptible, models_option, server_option
from spikeless.errors import Unavailable
from spikeless.repository import layout
from spikeless.sidecars.exporter import Exporter, ExporterSettings


@click.command()
@server_option
@models_option
@click.option("--pid", type=int, help="The server's process, for its memory.")
@click.option(
    "--status-file",
    type=click.Path(path_type=Path),
    help="A copy of that process's /proc/PID/status which is kept fresh, where the process cannot be seen.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=PORT, default=9500, show_default=True, help="Port to listen on; 0 picks a free one."
)
def command(
    server: str, models: Path, pid: int | None, status_file: Path | None, host: str, port: int
) -> None:
    """Export what a server does not: version states, load errors, reloads and memory.

    Prometheus scrapes http://HOST:PORT/metrics. SIGTERM and SIGINT end it.
    """
    if pid is not None and status_file is not None:
        raise click.UsageError("--pid and --status-file are two ways to see the same process: give one")
    layout.require_repository(models)
    exporter = Exporter(ExporterSettings(server, models, pid, status_file))
    registry = CollectorRegistry()
    with interruptible() as ended:
        exporter.start()
        registry.register(exporter)
        try:
            listening, thread = start_http_server(port, host, registry)
        except OSError as error:
            raise Unavailable(f"cannot listen on {host}:{port}: {error.strerror}") from None
        print(f"exporting {server} on http://{host}:{listening.server_port}/metrics", flush=True)
        ended.wait()
        listening.shutdown()
        thread.join()
        exporter.stop()
