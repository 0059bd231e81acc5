"""``spikeless serve``: run the embedded engine with TensorFlow Serving's flags."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from typing import Any

import click

from spikeless import __version__, runtime
from spikeless.engine.flags import FLAGS, Flag, ServerFlags
from spikeless.engine.server import Server
from spikeless.errors import InvalidArgument

_log = logging.getLogger(__name__)
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _option(flag: Flag) -> click.Option:
    """An option spelt as TensorFlow's: ``--name=value``; ``--name`` for booleans."""
    kind: Any = flag.kind
    if flag.minimum is not None:
        kind = click.IntRange(flag.minimum, flag.maximum)
    switch: dict[str, Any] = {}
    if flag.kind is bool or not flag.has_effect:
        switch = {"is_flag": False, "flag_value": "true"}
    return click.Option(
        [f"--{flag.name}", flag.name],
        type=kind,
        default=flag.default,
        show_default=True,
        help=flag.help,
        hidden=not flag.has_effect,
        **switch,
    )


def _show_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"TensorFlow ModelServer: embedded, spikeless {__version__}")
        click.echo(f"TensorFlow Library: {runtime.version()}")
        context.exit()


@click.command(params=[_option(flag) for flag in FLAGS])
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version)
def command(**values: Any) -> None:
    """Serve models with the embedded engine; flags are TensorFlow Serving's.

    The gRPC port opens when the first version of every model is loaded and warm.
    SIGTERM and SIGINT let the requests in progress end.
    """
    try:
        flags = ServerFlags(**values)
    except InvalidArgument as error:
        raise click.UsageError(str(error)) from None
    for flag in flags.ignored():
        print(f"--{flag.name} is ignored: {flag.ignored}", file=sys.stderr)
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s.%(msecs)03d %(levelname).1s %(name)s: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    server = Server(flags)
    _stop_on_signal(server, flags.grace)
    ports = server.start()
    if ports is not None:
        print(f"serving gRPC on {flags.host}:{ports.grpc}", flush=True)
        if ports.rest is not None:
            print(f"serving REST on http://{flags.host}:{ports.rest}", flush=True)
        server.wait()
    # A second signal must not kill the interpreter while it exits.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _stop_on_signal(server: Server, grace: float) -> None:
    """Stop at SIGTERM or SIGINT, on a thread of its own: handlers must not wait."""

    def handle(received: int, _: object) -> None:
        _log.info("%s: draining", signal.Signals(received).name)
        threading.Thread(target=server.stop, args=(grace,), name="stop").start()

    for number in _STOP_SIGNALS:
        signal.signal(number, handle)
