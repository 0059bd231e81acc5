"""The files that captured calls are written to: one, or a folder of them.

In: framed records. Out: TFRecord files. A record is in them whole or not at all: what
a full disk or a kill left behind half written is cut off. Functions raise OSError when
the disk does not take something; a later record may fit again.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from spikeless.disk import atomic
from spikeless.errors import DataLoss, FailedPrecondition, InvalidArgument
from spikeless.formats import tfrecord
from spikeless.formats.captures import SUFFIX
from spikeless.warmup.records import Record, read

#: Ends the hidden name of the file of a folder that records are added to.
_UNFINISHED = ".unfinished"
_LOCK = ".lock"


class CapturedFile:
    """One file that records are added to; an existing one is continued.

    Raises:
        FailedPrecondition: it is something else, or cannot be written.
    """

    def __init__(
        self, path: Path, found: Callable[[Record], None] = lambda record: None, *, is_ours: bool = False
    ) -> None:
        """Args:
        path: the file.
        found: called with each record that is in the file already.
        is_ours: whatever is in it was written here, so that it may hold no record.
        """
        self.path = path
        self._is_ours = is_ours
        #: Records in it.
        self.records = 0
        try:
            if path.exists():
                self._recover(found)
            # Without a buffer, in which bytes that did not fit onto the disk would
            # stay.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise FailedPrecondition(f"{path} cannot be written: {error.strerror}") from None
        #: Bytes of the records in it.
        self.size = self._file.seek(0, os.SEEK_END)

    def _recover(self, found: Callable[[Record], None]) -> None:
        """Count the records, and cut off an unfinished one."""
        whole = []
        try:
            for record in read(self.path):
                found(record)
                whole.append(record.log.SerializeToString())
        except DataLoss as error:
            if not whole and not self._is_ours:
                raise FailedPrecondition(f"{error}; name another file with --out") from None
            tfrecord.write(self.path, whole)
        self.records = len(whole)

    def append(self, framed: bytes) -> None:
        """Add a record."""
        # Where the last write failed half way, its part is still there.
        self._file.truncate(self.size)
        left = memoryview(framed)
        while left:
            left = left[self._file.write(left) :]
        self.size += len(framed)
        self.records += 1

    def close(self) -> None:
        """Have all of it on the disk."""
        with self._file:
            self._file.truncate(self.size)
            os.fsync(self._file.fileno())


@dataclass(frozen=True)
class Rotation:
    """When a folder of captures gets its next file."""

    #: Bytes of one file at most, but for a record that is larger.
    file_bytes: int = 64 << 20
    #: Seconds after the first record of a file at which it is closed.
    file_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.file_bytes < 1 or self.file_seconds <= 0:
            raise InvalidArgument("--file-bytes must be 1 or more, and --file-time more than 0")


class CapturedFolder:
    """Files that appear one after another, each when it is whole.

    A file is named by the time at which it was begun. A folder has one writer.

    Raises:
        FailedPrecondition: another process writes there, or it cannot be written.
    """

    def __init__(
        self, path: Path, rotation: Rotation, max_bytes: int, rotated: Callable[[], None] = lambda: None
    ) -> None:
        """Args:
        path: the folder; it is made where its parent is there.
        rotation: when a file is whole.
        max_bytes: of the folder; the oldest files are deleted for new ones.
        rotated: called after each file that has become whole.
        """
        self.path = path
        self._rotation = rotation
        self._max_bytes = max_bytes
        self._rotated = rotated
        self._current: CapturedFile | None = None
        self._began = 0.0
        try:
            path.mkdir(exist_ok=True)
            self._lock = open(path / _LOCK, "a")  # noqa: SIM115 (closed by close)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for unfinished in path.glob(f".*{_UNFINISHED}"):
                self._finish(CapturedFile(unfinished, is_ours=True))
        except BlockingIOError:
            raise FailedPrecondition(f"another capture writes to {path}: name another folder") from None
        except OSError as error:
            raise FailedPrecondition(f"{path} cannot be written: {error.strerror}") from None

    def append(self, framed: bytes) -> None:
        """Add a record to the newest file, or begin one."""
        if self._current is not None and self._current.size + len(framed) > self._rotation.file_bytes:
            self.rotate()
        if self._current is None:
            self._make_room(len(framed))
            now = datetime.now(timezone.utc)
            self._current = CapturedFile(self.path / f".{now:%Y%m%dT%H%M%S.%fZ}{_UNFINISHED}")
            self._began = time.monotonic()
        self._current.append(framed)

    def seconds_left(self) -> float | None:
        """Until the newest file should be closed; None without one."""
        if self._current is None:
            return None
        return max(0.0, self._began + self._rotation.file_seconds - time.monotonic())

    def rotate(self) -> None:
        """Let the newest file appear."""
        if self._current is not None:
            current, self._current = self._current, None
            self._finish(current)
            self._rotated()

    def close(self) -> None:
        try:
            self.rotate()
        finally:
            self._lock.close()

    def _finish(self, file: CapturedFile) -> None:
        file.close()
        if not file.records:
            file.path.unlink()
            return
        name = file.path.name.removeprefix(".").removesuffix(_UNFINISHED)
        os.replace(file.path, self.path / f"{name}{SUFFIX}")
        atomic.sync(self.path)

    def _make_room(self, size: int) -> None:
        """Delete the oldest files, so that one more may be filled."""
        whole = sorted(self.path.glob(f"[!.]*{SUFFIX}"))
        room = self._max_bytes - max(size, self._rotation.file_bytes)
        sizes = [file.stat().st_size for file in whole]
        total = sum(sizes)
        for file, bytes_in_it in zip(whole, sizes, strict=True):
            if total <= room:
                break
            file.unlink(missing_ok=True)
            total -= bytes_in_it
