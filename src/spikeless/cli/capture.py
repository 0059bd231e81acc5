"""``spikeless capture``: relay calls to a server and record a sample of them."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click

from spikeless.cli.options import Duration, Size, interruptible, server_option, tell
from spikeless.sidecars.capture import Capture, CaptureSettings
from spikeless.sidecars.captured_files import Rotation
from spikeless.sidecars.recording import RecorderSettings


@click.command()
@server_option
@click.option(
    "--listen", default="127.0.0.1:8600", show_default=True, help="Where callers come; port 0: any."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="File of records to write; with --stream a folder.",
)
@click.option("--sample", default=0.01, show_default=True, help="Share of the calls that is recorded.")
@click.option("--limit", type=int, help="Records at most; then calls are only relayed.  [default: 1000]")
@click.option(
    "--per-shape",
    type=int,
    help="Records of one signature and shape at most.  [default: 1; all with --stream]",
)
@click.option(
    "--max-bytes",
    type=Size(),
    help="Size of the file or folder at most.  [default: 256MiB; 1GiB with --stream]",
)
@click.option("--redact", multiple=True, help="Input or feature whose values are left out; may be repeated.")
@click.option("--stream", is_flag=True, help="Go on for ever, in files of a folder; the oldest are deleted.")
@click.option("--file-bytes", type=Size(), help="With --stream, size of one file.  [default: 64MiB]")
@click.option(
    "--file-time",
    type=Duration(positive=True),
    help="With --stream, how long one file is added to before it appears.  [default: 60s]",
)
def command(server: str, listen: str, sample: float, **recording: Any) -> None:
    """Relay gRPC calls to a server and record a sample of the requests and answers.

    Callers use the address of --listen instead of the server's. The file holds
    PredictionLog records, each with the time at which its request arrived, for
    `spikeless warmup build` and for `spikeless publish --golden`. When it cannot be
    written, calls go on all the same. Ctrl-C ends it; the same command again goes on
    with the file.
    """
    settings = _recorder_settings(**recording)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    with interruptible() as asked:
        capture = Capture(CaptureSettings(server, listen, settings, sample))
        port = capture.start()
        host = listen.rpartition(":")[0]
        click.echo(f"relaying {host}:{port} to {server}")
        asked.wait()
        capture.stop()
    counts = capture.recorder.counts
    tell(
        f"relayed {capture.relayed} calls; recorded {counts.recorded} in {settings.out}, "
        f"{counts.alike} more were alike, {counts.dropped} did not fit, "
        f"{counts.unwritten} could not be written"
    )


def _recorder_settings(
    out: Path,
    limit: int | None,
    per_shape: int | None,
    max_bytes: int | None,
    redact: tuple[str, ...],
    stream: bool,
    file_bytes: int | None,
    file_time: float | None,
) -> RecorderSettings:
    if not stream:
        if file_bytes is not None or file_time is not None:
            raise click.UsageError("--file-bytes and --file-time have no meaning without --stream")
        default = RecorderSettings(out)
        return RecorderSettings(
            out,
            default.limit if limit is None else limit,
            default.per_shape if per_shape is None else per_shape,
            default.max_bytes if max_bytes is None else max_bytes,
            redact,
        )
    if limit is not None:
        raise click.UsageError("--limit has no meaning with --stream: --max-bytes bounds the folder")
    max_bytes = 1 << 30 if max_bytes is None else max_bytes
    rotation = Rotation(
        min(Rotation.file_bytes, max_bytes) if file_bytes is None else file_bytes,
        Rotation.file_seconds if file_time is None else file_time,
    )
    return RecorderSettings(out, None, per_shape, max_bytes, redact, rotation)
