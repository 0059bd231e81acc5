"""Child processes that end with the process that started them.

In: a command line. Out: the same, run by setpriv(1) of util-linux, which asks the
kernel to send it SIGTERM when its parent dies, even of SIGKILL. The process id is that
of the command. Without setpriv, a command is run as it is.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from spikeless.errors import Unavailable

_SETPRIV = ("setpriv", "--pdeathsig", "TERM", "--")


def tied(command: Sequence[str]) -> list[str]:
    """The command line that ends with this process.

    The kernel means the thread that starts it, so a thread that ends earlier than the
    command gets the command as it is.
    """
    if threading.current_thread() is not threading.main_thread() or shutil.which(_SETPRIV[0]) is None:
        return list(command)
    return [*_SETPRIV, *command]


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
    """``subprocess.run`` of a command that ends with this process."""
    return subprocess.run(tied(command), **options)


@contextmanager
def serving(command: Sequence[str]) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Run a server that prints its port first, in a session of its own, for the block.

    Gives the port and the process, which is ended with SIGTERM and waited for.

    Raises:
        Unavailable: it printed none.
    """
    process = subprocess.Popen(
        tied(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port:
                raise Unavailable(f"{' '.join(command)} did not start; its error is above")
            yield int(port), process
        finally:
            process.terminate()
