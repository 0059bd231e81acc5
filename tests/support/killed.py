"""Repeat something, killed with SIGKILL at every point that touches the file system.

In: what prepares a folder, and what is done in a child. Out: one line per kill, and the
child's exit code.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

_EVENTS = frozenset(
    {
        "open",
        "os.mkdir",
        "os.link",
        "os.rename",
        "os.remove",
        "os.rmdir",
        "os.chmod",
        "os.truncate",
        "shutil.copyfile",
    }
)


def at_every_touch(directory: str, prepare: Callable[[Path], object], act: Callable[[Path], object]) -> None:
    """``prepare`` makes ``directory/<n>``, and ``act`` works on it in a child.

    It is killed as it is about to touch the folder for the n-th time, n from 0 until
    one comes through.
    """
    for number in range(10_000):
        folder = Path(directory, str(number))
        prepare(folder)
        child = os.fork()
        if not child:
            _kill_at(number, folder)
            act(folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))


def _kill_at(number: int, folder: Path) -> None:
    touched = 0
    lock = threading.Lock()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal touched
        if event not in _EVENTS:
            return
        # The mode of an open is text as well.
        given = arguments[:1] if event == "open" else arguments
        paths = [os.fspath(path) for path in given if isinstance(path, (str, os.PathLike))]
        # Removal of a tree goes by names relative to open directories.
        if not any(path.startswith(str(folder)) or "/" not in path for path in paths):
            return
        # Of threads that get here at once, only one says so.
        with lock:
            if touched == number:
                os.write(1, f"{event} {' '.join(paths)}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)
            touched += 1

    sys.addaudithook(hook)
