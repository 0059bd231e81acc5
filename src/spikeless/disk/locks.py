"""Locks between processes.

In: a file that is used for nothing but its lock. Out: the lock, as a context manager.
The kernel releases a lock when its holder dies, however it dies.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from spikeless.errors import Cancelled, FailedPrecondition

_MODEL_LOCK = "promotion.lock"
_POLL_SECONDS = 0.1


def acquire(file: Path, *, shared: bool = False) -> IO[str]:
    """Lock a file, which is created when it is missing; waits until the lock is free.

    Returns:
        A context manager; closing it releases the lock.
    """
    handle = open(file, "a")  # noqa: SIM115 (the caller closes it)
    fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    return handle


def is_held(file: Path) -> bool:
    """Whether a file is locked exclusively; another user's file counts as locked."""
    try:
        with open(file, "rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except FileNotFoundError:
        return False
    return False


@contextmanager
def model_lock(
    state: Path,
    name: str,
    *,
    wait: bool,
    progress: Callable[[str], None] = lambda line: None,
    interrupted: threading.Event | None = None,
) -> Iterator[None]:
    """Hold the lock that allows one change at a time to the model ``name``.

    The lock is in the model's ``.spikeless`` directory, ``state``. It contains a note
    of who holds it.

    Raises:
        FailedPrecondition: another process holds it, and ``wait`` is False; or it
            cannot be created.
        Cancelled: ``interrupted`` was set while waiting.
    """
    interrupted = interrupted or threading.Event()
    try:
        state.mkdir(exist_ok=True)
        lock = open(state / _MODEL_LOCK, "a+")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise FailedPrecondition(f"cannot lock {name} in {state}: {error.strerror}") from None
    with lock:
        if not _try_exclusive(lock):
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            if not wait:
                raise FailedPrecondition(
                    f"{name} is being changed by {holder}: wait for it, or stop it with Ctrl-C, "
                    "which puts everything back"
                )
            progress(f"waiting for {holder}, which is changing {name}")
            while not _try_exclusive(lock):
                if interrupted.wait(_POLL_SECONDS):
                    raise Cancelled("interrupted")
        _note_holder(lock.fileno())
        yield


def _try_exclusive(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _note_holder(descriptor: int) -> None:
    """Say who holds the lock; on a full disk the note stays empty."""
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError:
        return
