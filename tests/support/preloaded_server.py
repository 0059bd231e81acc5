"""Servers that a fork server starts: it imports and loads what they need once for all.

They stand here because the fork server finds this module by its bare name, and test
modules not by theirs.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import spikeless.cli.serve
import spikeless.engine.rest_api  # loaded once for all
from spikeless import runtime
from spikeless.cli import main
from spikeless.engine.rest_server import RestServer

runtime.version()
# On a busy machine, a server may take long to tell what it was doing.
spikeless.cli.serve._TELLING_SECONDS = 60.0
#: A server that writes without end must not fill the disk.
MAX_LOG_BYTES = 16 << 20


def serve(flags: list[str], output: Connection, log: Path) -> None:
    """``spikeless serve``; its standard output goes into the connection."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_LOG_BYTES, MAX_LOG_BYTES))
    os.dup2(output.fileno(), 1)
    output.close()
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    main(["serve", *flags])


def serve_and_hang(flags: list[str], output: Connection, log: Path) -> None:
    """The same with a REST server that never stops."""
    RestServer.stop = lambda *_: threading.Event().wait()  # type: ignore[assignment]
    serve(flags, output, log)


def serve_and_fail(flags: list[str], output: Connection, log: Path) -> None:
    """The same with a REST server that fails while it stops."""
    stop = RestServer.stop

    def fail(self: RestServer, grace: float) -> None:
        stop(self, grace)
        raise OSError(9, "Bad file descriptor")

    RestServer.stop = fail  # type: ignore[method-assign]
    serve(flags, output, log)


def serve_and_break(flags: list[str], output: Connection, log: Path) -> None:
    """The same with a loop of connections that fails when there is one."""
    poll = RestServer._poll

    def fail(self: RestServer) -> None:
        poll(self)
        if self._listener.active_channels:
            raise OSError(9, "Bad file descriptor")

    RestServer._poll = fail  # type: ignore[method-assign]
    serve(flags, output, log)


def serve_unread(flags: list[str], output: Connection, log: Path) -> None:
    """A server whose log nobody reads any more once it is to stop."""
    tell_later = faulthandler.dump_traceback_later

    def stop_reading(seconds: float, exit: bool) -> None:
        _, writer = os.pipe()
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while os.write(writer, bytes(1 << 16)):
                pass
        os.set_blocking(writer, True)
        os.dup2(writer, 2)
        tell_later(seconds, exit=exit)

    faulthandler.dump_traceback_later = stop_reading  # type: ignore[assignment]
    spikeless.cli.serve._TELLING_SECONDS = 1.0
    serve(flags, output, log)
