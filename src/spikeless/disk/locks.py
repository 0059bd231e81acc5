"""One change of a model at a time.

In: a model's ``.spikeless`` directory. Out: its lock, held until the block ends; the kernel lets go of it
when its holder dies, however it dies.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spikeless.errors import Cancelled, FailedPrecondition

_LOCK = "promotion.lock"
_POLL_SECONDS = 0.1


@contextmanager
def alone(
    state: Path,
    name: str,
    *,
    wait: bool,
    progress: Callable[[str], None] = lambda line: None,
    interrupted: threading.Event | None = None,
) -> Iterator[None]:
    """Hold the lock of the model ``name``, whose ``.spikeless`` directory is ``state``.

    Raises:
        FailedPrecondition: somebody else holds it, and ``wait`` is False; or there can be no lock.
        Cancelled: ``interrupted`` was set while waiting.
    """
    interrupted = interrupted or threading.Event()
    try:
        state.mkdir(exist_ok=True)
        lock = open(state / _LOCK, "a+")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise FailedPrecondition(f"cannot lock {name} in {state}: {error.strerror}") from None
    with lock:
        if not _try(lock.fileno()):
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            if not wait:
                raise FailedPrecondition(
                    f"{name} is being changed by {holder}: wait for it, or stop it with Ctrl-C, "
                    "which puts everything back"
                )
            progress(f"waiting for {holder}, which is changing {name}")
            while not _try(lock.fileno()):
                if interrupted.wait(_POLL_SECONDS):
                    raise Cancelled("interrupted")
        _note_holder(lock.fileno())
        yield


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _note_holder(descriptor: int) -> None:
    """For those who have to wait; on a full disk they are not told."""
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError:
        return
