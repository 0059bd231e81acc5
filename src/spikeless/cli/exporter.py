"""``spikeless exporter``: a server's version states and memory, for Prometheus."""

from __future__ import annotations

from pathlib import Path

import click
from prometheus_client import CollectorRegistry, start_http_server

from spikeless.cli.options import interruptible
from spikeless.errors import Unavailable
from spikeless.sidecars.exporter import Exporter, ExporterSettings


@click.command()
@click.option("--target", default="127.0.0.1:8500", show_default=True, help="The server's gRPC address.")
@click.option(
    "--models",
    type=click.Path(path_type=Path),
    default="models",
    show_default=True,
    help="The model repository: its folders are the names of the models.",
)
@click.option("--pid", type=int, help="The server's process, for its memory.")
@click.option(
    "--status-file",
    type=click.Path(path_type=Path),
    help="A copy of that process's /proc/PID/status which is kept fresh, where the process cannot be seen.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=9500, show_default=True, help="Port to listen on; 0 picks a free one.")
def command(
    target: str, models: Path, pid: int | None, status_file: Path | None, host: str, port: int
) -> None:
    """Export what a server does not: version states, load errors, reloads and memory.

    Prometheus scrapes http://HOST:PORT/metrics. SIGTERM and SIGINT end it.
    """
    if pid is not None and status_file is not None:
        raise click.UsageError("--pid and --status-file are two ways to see the same process: give one")
    exporter = Exporter(ExporterSettings(target, models, pid, status_file))
    registry = CollectorRegistry()
    with interruptible() as ended:
        exporter.start()
        registry.register(exporter)
        try:
            server, thread = start_http_server(port, host, registry)
        except OSError as error:
            raise Unavailable(f"cannot listen on {host}:{port}: {error.strerror}") from None
        print(f"exporting {target} on http://{host}:{server.server_port}/metrics", flush=True)
        ended.wait()
        server.shutdown()
        thread.join()
        exporter.stop()
