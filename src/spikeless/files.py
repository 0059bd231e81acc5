"""Writing files so that a crash at any point leaves the old content or the new, never half of it.

In: a path and what goes there. Out: the file, flushed to the disk before it got its name.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from spikeless import directories

#: Ends the name of every file that is still being written.
UNFINISHED_SUFFIX = ".tmp"


@contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write to that takes the place of ``path`` when the block ends well.

    It is written beside ``path`` under a hidden name, fsynced, renamed, and its directory fsynced. When the
    block raises, it is removed and what was at ``path`` stays. The directory must exist.
    """
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(8)}{UNFINISHED_SUFFIX}")
    try:
        # "x" never follows a planted link; the mode is the umask's, so that other users may read it.
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    directories.sync(target.parent)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path`` as `atomic_writer` does."""
    with atomic_writer(path) as file:
        file.write(content)
