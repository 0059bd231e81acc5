"""Prune over and over, killed with SIGKILL at every point at which the file system is touched.

    python killed_prunes.py MODELS DIRECTORY

A copy of MODELS in ``DIRECTORY/<n>`` is pruned by a child that is killed as it is about to touch the copy for
the n-th time, for n from 0 until a child comes through. Prints one line per kill.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from spikeless.pruning import prune

_EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"})


def main(source: str, directory: str) -> None:
    for number in range(10_000):
        models = Path(directory, str(number))
        shutil.copytree(source, models)
        child = os.fork()
        if not child:
            prune_until(number, models)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))


def prune_until(kill_at: int, models: Path) -> None:
    touched = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal touched
        if event not in _EVENTS:
            return
        paths = [os.fspath(path) for path in arguments if isinstance(path, (str, os.PathLike))]
        # Removal of a tree goes by names relative to open directories.
        if not any(path.startswith(str(models)) or "/" not in path for path in paths):
            return
        if touched == kill_at:
            os.write(1, f"{event} {' '.join(paths)}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        touched += 1

    sys.addaudithook(hook)
    prune(models, "scale", 1, None)
    os._exit(0)


main(*sys.argv[1:])
