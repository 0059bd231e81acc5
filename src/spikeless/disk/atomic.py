"""Files and directories that appear whole or not at all.

In: a path and what goes there. Out: the old content or the new, never half of it, and
on the disk before its name shows; for directories, private staging space beside them
and copies that depend on nothing outside.

Only the standard library is used, so that training environments of their own can import
this module.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from spikeless.disk import locks
from spikeless.errors import FailedPrecondition, InvalidArgument, ResourceExhausted

#: What a server of another user needs in order to read.
DIRECTORY_MODE = 0o755
FILE_MODE = 0o644
_READABLE = 0o444

_LOCK = "lock"
_OWNER = "owner"
#: Ends the name of every file that is still being written.
UNFINISHED_SUFFIX = ".tmp"


@contextmanager
def reported_errors(what: str) -> Iterator[None]:
    """Report the block's OSErrors as errors that say what was being done.

    Raises:
        ResourceExhausted: no space is left.
        FailedPrecondition: anything else, such as a missing right.
    """
    try:
        yield
    except OSError as error:
        message = f"cannot {what}: {error.strerror or error}"
        if error.filename is not None:
            message += f" ({error.filename})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted(f"{message}; make room and try again") from error
        raise FailedPrecondition(message) from error


@contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that replaces ``path`` when the block ends without an error.

    It is written beside ``path`` under a hidden name, fsynced, renamed, and its
    directory fsynced. When the block raises, it is removed and what was at ``path``
    stays. The directory must exist.
    """
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(8)}{UNFINISHED_SUFFIX}")
    try:
        # "x" never follows a planted link; the mode is the umask's, so that other users
        # may read it.
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(target.parent)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path`` as `atomic_writer` does."""
    with atomic_writer(path) as file:
        file.write(content)


@contextmanager
def staging(directory: Path, prefix: str = "") -> Iterator[Path]:
    """A new private directory below ``directory``, removed at the end whatever happens.

    It is locked while its owner lives. Whoever stages next in the same place removes
    what a killed process left behind, and nothing that is still in use.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # The lock keeps others from removing the new directory before it has its owner.
    with locks.acquire(directory / _LOCK):
        _remove_stale(directory)
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=directory))
        owner = locks.acquire(path / _OWNER)
    with owner:
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def staged(directory: Path) -> list[Path]:
    """The staging directories in use; what killed processes left is removed."""
    if not directory.is_dir():
        return []
    with locks.acquire(directory / _LOCK):
        _remove_stale(directory)
        return [path for path in directory.iterdir() if path.is_dir()]


def _remove_stale(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not locks.is_held(path / _OWNER):
            shutil.rmtree(path, ignore_errors=True)


def make_directory(path: Path) -> None:
    """Create a directory that every user can list, and its parents, durably."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(exist_ok=True)
    path.chmod(DIRECTORY_MODE)
    sync(path.parent)


def copy_tree(source: Path, target: Path, *, link: bool = False) -> None:
    """Copy a directory to ``target``, which must not exist, readable by every user.

    Links are followed: the copy holds what they point at and depends on nothing outside
    itself. With ``link`` the copy's files are hard links to the source's wherever their
    modes and the file system allow it: it costs no space, and nobody may write to
    either from then on.

    Raises:
        InvalidArgument: a link that leads nowhere or back into itself, a pipe, a socket
            or a device.
        OSError: what the file system says, such as no space left.
    """
    _copy_directory(source, target, _link_file if link else _copy_file, ())


def _copy_directory(
    source: Path, target: Path, copy: Callable[[Path, Path], None], inside: tuple[Path, ...]
) -> None:
    real = source.resolve()
    if real in inside:
        raise InvalidArgument(f"{source} is a link to a folder that contains it; remove the link")
    target.mkdir()
    target.chmod(DIRECTORY_MODE)
    for child in sorted(source.iterdir()):
        try:
            mode = child.stat().st_mode
        except OSError as error:
            raise InvalidArgument(
                f"{child} cannot be read ({error.strerror}); is it a broken link?"
            ) from None
        if stat.S_ISDIR(mode):
            _copy_directory(child, target / child.name, copy, (*inside, real))
        elif stat.S_ISREG(mode):
            copy(child, target / child.name)
        else:
            raise InvalidArgument(f"{child} is neither a file nor a folder; remove it")


def _copy_file(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    target.chmod(FILE_MODE)


def _link_file(source: Path, target: Path) -> None:
    """A second name for the file, or a copy where its mode has to change."""
    real = source.resolve()
    mode = stat.S_IMODE(real.stat().st_mode)
    if mode == _allowed(mode, _READABLE):
        try:
            os.link(real, target)
            return
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                raise
    _copy_file(source, target)


def size_of(path: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(
        os.path.getsize(os.path.join(folder, file)) for folder, _, files in os.walk(path) for file in files
    )


def make_readable(root: Path) -> None:
    """Let every user read a directory and its content, and only its owner write."""
    for directory, _, names in os.walk(root):
        _allow(Path(directory), DIRECTORY_MODE)
        for name in names:
            _allow(Path(directory, name), _READABLE)


def _allow(path: Path, bits: int) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode != _allowed(mode, bits):
        path.chmod(_allowed(mode, bits))


def _allowed(mode: int, bits: int) -> int:
    return mode & 0o755 | bits


def sync(path: Path) -> None:
    """Wait until a file's data, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Wait until a directory and everything in it are on the disk."""
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            sync(Path(directory, name))
        sync(Path(directory))
