"""Child processes that end with the process that started them.

In: a command line. Out: the same, run by setpriv(1) of util-linux, which asks the
kernel to send it SIGTERM when its parent dies, even of SIGKILL. The process id is that
of the command. Without setpriv, a command is run as it is.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

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
