"""Publish over and over, killed with SIGKILL at every point at which the file system is touched.

    python killed_publishers.py SAVED_MODEL DIRECTORY

Version 1 is published into ``DIRECTORY/<n>``, then version 2 by a child that is killed as it is about to
touch ``DIRECTORY/<n>`` for the n-th time, for n from 0 until a child comes through. Prints one line per kill.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from spikeless.repository import CHECK_FILES, publish

_EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.copyfile"})


def main(source: str, directory: str) -> None:
    for number in range(10_000):
        models = Path(directory, str(number))
        publish(source, models, "boston", steps=[CHECK_FILES])
        child = os.fork()
        if not child:
            publish_until(number, source, models)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))


def publish_until(kill_at: int, source: str, models: Path) -> None:
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
    publish(source, models, "boston", steps=[CHECK_FILES])
    os._exit(0)


main(*sys.argv[1:])
