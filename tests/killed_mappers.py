"""Map over and over, killed with SIGKILL at every point at which the file system is touched.

    python killed_mappers.py SAVED_MODEL DIRECTORY

A child maps to ``DIRECTORY/<n>/mapped`` and is killed as it is about to touch ``DIRECTORY/<n>`` for the n-th
time, for n from 0 until a child comes through. Prints one line per kill.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from spikeless.mapping import MapSettings, map_saved_model

_EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.copyfile"})
#: Without the comparison: TensorFlow's threads would not live on in a child.
_SETTINGS = MapSettings(min_bytes=4096, verify=False)


def main(source: str, directory: str) -> None:
    for number in range(10_000):
        out = Path(directory, str(number), "mapped")
        out.parent.mkdir()
        child = os.fork()
        if not child:
            map_until(number, source, out)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))


def map_until(kill_at: int, source: str, out: Path) -> None:
    touched = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal touched
        if event not in _EVENTS:
            return
        paths = [os.fspath(path) for path in arguments if isinstance(path, (str, os.PathLike))]
        # Removal of a tree goes by names relative to open directories.
        if not any(path.startswith(str(out.parent)) or "/" not in path for path in paths):
            return
        if touched == kill_at:
            os.write(1, f"{event} {' '.join(paths)}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        touched += 1

    sys.addaudithook(hook)
    map_saved_model(source, out, _SETTINGS)
    os._exit(0)


main(*sys.argv[1:])
