"""Files in the page cache: read them in, measure how much is there, keep them there.

In: paths. Out: bytes. Linux's ``posix_fadvise``, ``mincore``, ``mlock``, ``madvise``
and ``sync_file_range`` (see their manual pages, section 2), all but the first through
the C library.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import resource
from collections.abc import Iterable
from contextlib import AbstractContextManager
from ctypes import c_int, c_int64, c_long, c_size_t, c_ubyte, c_uint, c_void_p
from pathlib import Path
from typing import Any

from spikeless.disk import proc
from spikeless.errors import FailedPrecondition, ResourceExhausted

_CHUNK_BYTES = 8 << 20
_MAP_FAILED = c_void_p(-1).value
_SYNC_FILE_RANGE_WRITE = 2


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = c_void_p, [c_void_p, c_size_t, c_int, c_int, c_int, c_long]
    libc.munmap.restype, libc.munmap.argtypes = c_int, [c_void_p, c_size_t]
    libc.mincore.restype, libc.mincore.argtypes = c_int, [c_void_p, c_size_t, ctypes.POINTER(c_ubyte)]
    libc.mlock.restype, libc.mlock.argtypes = c_int, [c_void_p, c_size_t]
    libc.madvise.restype, libc.madvise.argtypes = c_int, [c_void_p, c_size_t, c_int]
    libc.sync_file_range.restype = c_int
    libc.sync_file_range.argtypes = [c_int, c_int64, c_int64, c_uint]
    return libc


class Mapping(AbstractContextManager["Mapping"]):
    """A file's memory, mapped for reading; a context manager that unmaps it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if not self.size:
                raise FailedPrecondition(f"{self.path} is empty and cannot be mapped")
            address = _libc().mmap(None, self.size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(self.path))
        self._address: int | None = address

    def resident(self) -> int:
        """How many of its bytes are in the page cache now, to the page."""
        pages = -(-self.size // mmap.PAGESIZE)
        present = (c_ubyte * pages)()
        if _libc().mincore(self._address, self.size, present):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(self.path))
        count = sum(flag & 1 for flag in bytes(present))
        return min(count * mmap.PAGESIZE, self.size)

    def lock(self) -> None:
        """Read all of it, and keep it in memory until this is closed.

        Raises:
            ResourceExhausted: more than this process may lock.
        """
        if _libc().mlock(self._address, self.size):
            code = ctypes.get_errno()
            if code in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
                raise ResourceExhausted(
                    f"{self.path} ({self.size} bytes) cannot be locked: {os.strerror(code)}; raise the "
                    f"memlock limit (now {lock_limit()}) or give the process CAP_IPC_LOCK"
                )
            raise OSError(code, os.strerror(code), str(self.path))

    def close(self) -> None:
        address, self._address = self._address, None
        if address is not None:
            _libc().munmap(address, self.size)

    def __exit__(self, *_: object) -> None:
        self.close()


def resident(path: str | os.PathLike[str]) -> int:
    """How many of a file's bytes are in the page cache now.

    The kernel tells only those who own the file or may write to it; to others
    everything seems resident.
    """
    if not os.path.getsize(path):
        return 0
    with Mapping(path) as mapping:
        return mapping.resident()


def prefetch(path: str | os.PathLike[str]) -> None:
    """Read a whole file into the page cache, as far as there is memory for it."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_SEQUENTIAL)
        os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_WILLNEED)
        # The advice only starts reading, and the kernel may cut it short: reading makes
        # sure.
        buffer = bytearray(_CHUNK_BYTES)
        while file.readinto(buffer):
            pass


def start_writing(descriptor: int, offset: int, size: int) -> None:
    """Let the kernel begin to bring a part of an open file to its disk.

    The ``fsync`` that has to follow waits for less then. It is also what reports
    errors.
    """
    _libc().sync_file_range(descriptor, offset, size, _SYNC_FILE_RANGE_WRITE)


def expect_single_pages(paths: Iterable[str | os.PathLike[str]]) -> int:
    """Tell the kernel that this process reads single pages of these mapped files.

    A page that was dropped then comes back alone (``MADV_RANDOM``). Otherwise the
    kernel reads its neighbourhood with it, as much as ``read_ahead_kb`` of the disk
    says (128 KiB to some MiB), and where memory is short that pushes out the pages that
    the next request needs.

    Returns:
        How many mappings were found.
    """
    wanted = {proc.file_key(path) for path in paths}
    found = [file for file in proc.mapped_files() if file.key in wanted] if wanted else []
    for file in found:
        if _libc().madvise(file.start, file.end - file.start, mmap.MADV_RANDOM):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), file.path)
    return len(found)


def lock_limit() -> str:
    """How much memory this process may lock, for people."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} bytes"
