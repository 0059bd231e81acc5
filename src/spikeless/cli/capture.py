"""``spikeless capture``: relay calls to a server and record a sample of them."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click

from spikeless.cli.options import Size, interruptible, server_option, tell
from spikeless.sidecars.capture import Capture, CaptureSettings
from spikeless.sidecars.recording import RecorderSettings


@click.command()
@server_option
@click.option(
    "--listen", default="127.0.0.1:8600", show_default=True, help="Where callers come; port 0: any."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File of records to write.")
@click.option("--sample", default=0.01, show_default=True, help="Share of the calls that is recorded.")
@click.option(
    "--limit", default=1000, show_default=True, help="Records at most; then calls are only relayed."
)
@click.option("--per-shape", default=1, show_default=True, help="Records of one signature and shape at most.")
@click.option(
    "--max-bytes", type=Size(), default="256MiB", show_default=True, help="Size of the file at most."
)
@click.option("--redact", multiple=True, help="Input or feature whose values are left out; may be repeated.")
def command(
    server: str,
    listen: str,
    out: Path,
    sample: float,
    limit: int,
    per_shape: int,
    max_bytes: int,
    redact: tuple[str, ...],
) -> None:
    """Relay gRPC calls to a server and record a sample of the requests and answers.

    Callers use the address of --listen instead of the server's. The file holds
    PredictionLog records, for `spikeless warmup build` and for `spikeless publish
    --golden`. When it cannot be written, calls go on all the same. Ctrl-C ends it; the
    same command again goes on with the file.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    settings = RecorderSettings(out, limit, per_shape, max_bytes, redact)
    with interruptible() as asked:
        capture = Capture(CaptureSettings(server, listen, settings, sample))
        port = capture.start()
        host = listen.rpartition(":")[0]
        click.echo(f"relaying {host}:{port} to {server}")
        asked.wait()
        capture.stop()
    counts = capture.recorder.counts
    tell(
        f"relayed {capture.relayed} calls; recorded {counts.recorded} in {out}, {counts.alike} more were "
        f"alike, {counts.dropped} did not fit, {counts.unwritten} could not be written"
    )
