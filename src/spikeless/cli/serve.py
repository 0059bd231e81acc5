"""``spikeless serve``: run the embedded engine with TensorFlow Serving's flags."""

from __future__ import annotations

import contextlib
import difflib
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import click

from spikeless import __version__, runtime
from spikeless.engine.flags import FLAGS, Flag, ServerFlags
from spikeless.engine.server import Server
from spikeless.engine.workers.pool import WORKER_MARK
from spikeless.engine.workers.supervisor import Supervisor
from spikeless.errors import InvalidArgument

_log = logging.getLogger(__name__)
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
#: Seconds that stopping may take where ``--grace`` leaves less.
_MIN_STOP_SECONDS = 2.0
#: Seconds in which a server that does not stop may tell what it was doing.
_TELLING_SECONDS = 1.0
#: The part of the grace that calls in progress have; unloading has the rest.
_DRAINING = 0.9


def _boolean(value: str | bool) -> bool:
    """What TensorFlow takes for a boolean: nothing that would fail there."""
    if isinstance(value, bool):
        return value
    if (word := value.lower()) not in _BOOLEANS:
        raise click.BadParameter(f"{value!r} is not true, false, 1 or 0")
    return _BOOLEANS[word]


def _option(flag: Flag) -> click.Option:
    """An option spelt as TensorFlow's: ``--name=value``; ``--name`` for booleans."""
    kind: Any = _boolean if flag.kind is bool else flag.kind
    if flag.minimum is not None:
        kind = click.IntRange(flag.minimum, flag.maximum)
    switch: dict[str, Any] = {}
    if flag.kind is bool or not flag.has_effect:
        switch = {"is_flag": False, "flag_value": "true", "metavar": "BOOLEAN"}
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


def _name_unknown(arguments: list[str]) -> None:
    """Say what is ignored, as TensorFlow Serving does, and what may have been meant."""
    names = [f"--{flag.name}" for flag in FLAGS]
    for argument in arguments:
        meant = difflib.get_close_matches(argument.partition("=")[0], names, n=1)
        hint = f": did you mean {meant[0]}?" if meant else ""
        print(f"unknown argument: {argument} is ignored{hint}", file=sys.stderr)


@click.command(
    params=[_option(flag) for flag in FLAGS],
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version)
@click.pass_context
def command(context: click.Context, /, **values: Any) -> None:
    """Serve models with the embedded engine; flags are TensorFlow Serving's.

    The gRPC port opens when the first version of every model is loaded and warm.
    SIGTERM and SIGINT let the requests in progress end; with --drain it goes on
    answering before that, not ready any more. A second signal ends the server at once.
    """
    try:
        flags = ServerFlags(**values)
    except InvalidArgument as error:
        raise click.UsageError(str(error)) from None
    _name_unknown(context.args)
    for flag in flags.ignored():
        print(f"--{flag.name} is ignored: {flag.ignored}", file=sys.stderr)
    worker, is_worker, descriptor = os.environ.pop(WORKER_MARK, "").partition(":")
    tag = f"worker {worker} " if is_worker else ""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format=f"%(asctime)s.%(msecs)03d {tag}%(levelname).1s %(name)s: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    server: Server | Supervisor
    if is_worker:
        server = Server(flags, socket.socket(fileno=int(descriptor)))
    else:
        server = Supervisor(flags) if flags.workers > 1 else Server(flags)
    if is_worker:
        # Ctrl-C goes to all processes; the one that leads tells the others.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _stopping_on_signals(server, flags.drain, flags.grace, _STOP_SIGNALS[: 1 if is_worker else 2]):
        ports = server.start()
        if ports is not None and not is_worker:
            print(f"serving gRPC on {flags.host}:{ports.grpc}", flush=True)
            if ports.rest is not None:
                print(f"serving REST on http://{flags.host}:{ports.rest}", flush=True)
        server.wait()


@contextlib.contextmanager
def _stopping_on_signals(
    server: Server | Supervisor, drain: float, grace: float, signals: Sequence[signal.Signals]
) -> Iterator[None]:
    """Stop the server at these signals.

    Whatever that gets stuck in, the process ends with code 1 when the grace is over,
    or of SIGALRM a second later, and at once at a second signal.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def stop(name: str) -> None:
        if drain:
            _log.info("%s: answering for %g s more", name, drain)
            server.drain(drain)
        _log.info("%s: calls in progress have %g s to end", name, _DRAINING * grace)
        server.stop(_DRAINING * grace)

    def obey() -> None:
        received = os.read(reader, 1)
        if not received:
            return
        seconds = drain + max(grace, _MIN_STOP_SECONDS)
        # A thread that needs none of the interpreter's locks, and that tells what all
        # others were doing. Where nobody reads what it writes, the kernel's alarm ends
        # the process.
        faulthandler.dump_traceback_later(seconds, exit=True)
        signal.setitimer(signal.ITIMER_REAL, seconds + _TELLING_SECONDS)
        name = signal.Signals(received[0]).name
        threading.Thread(target=stop, args=(name,), name="stop", daemon=True).start()
        if received := os.read(reader, 1):
            os._exit(128 + received[0])

    # Handlers in Python run on the main thread, which may miss that there is one to
    # run, when it is about to wait. The pipe is written by the signal itself.
    handlers = {number: signal.signal(number, lambda *_: None) for number in signals}
    old_writer = signal.set_wakeup_fd(writer)
    threading.Thread(target=obey, name="signals", daemon=True).start()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_writer)
        os.close(writer)
