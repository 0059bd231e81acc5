"""Put a version together from what this disk has and what a store has.

In: the manifest of a version. Out: its files, staged where no server looks, each byte
compared with the manifest.

Content is compared by the digests of its pieces, which cover every byte of a file, so
that all workers compare at the same time. Each has one buffer of the size of a piece:
what the piece was before is read into it, differences are applied to it in place, it is
compared, and it is written. What an earlier run left is compared and used.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from spikeless.disk import atomic, pages
from spikeless.errors import DataLoss, ResourceExhausted, SpikelessError
from spikeless.repository import layout
from spikeless.store import pieces
from spikeless.store.catalog import Catalog
from spikeless.store.manifest import Entry, File, Stored, VersionManifest
from spikeless.store.receipts import Receipts

_UNFINISHED = "pulls"
#: Room that is left free.
_SPARE_BYTES = 16 << 20


@dataclass(frozen=True)
class _Place:
    """Where a piece's content is on this disk."""

    path: Path
    offset: int
    size: int

    def read(self, buffer: memoryview) -> bool:
        """Fill a buffer of this size with the content, which has to be compared."""
        try:
            with self.path.open("rb", buffering=0) as file:
                return _read(file.fileno(), buffer, self.offset)
        except OSError:
            return False

    def copy(self, target: int, offset: int) -> bool:
        """Copy it into an open file, where the kernel can; it may share blocks."""
        done = 0
        with suppress(OSError), self.path.open("rb", buffering=0) as file:
            while done < self.size:
                copied = os.copy_file_range(
                    file.fileno(), target, self.size - done, self.offset + done, offset + done
                )
                if not copied:
                    break
                done += copied
        return done == self.size


@dataclass(frozen=True)
class _Piece:
    """One piece of the version."""

    #: The staged file.
    path: Path
    offset: int
    size: int
    chain: tuple[Stored, ...]
    #: Whether an earlier run may have put it there.
    resumed: bool


class Assembly:
    """Puts one version together."""

    def __init__(
        self,
        catalog: Catalog,
        manifest: VersionManifest,
        directory: Path,
        receipts: Receipts,
        entries: tuple[Entry, ...],
    ) -> None:
        self._catalog = catalog
        self._store = catalog.store
        self._manifest = manifest
        self._unfinished = layout.state_directory(directory.parent, directory.name) / _UNFINISHED
        self._target = self._unfinished / f"{manifest.version}-{pieces.digest(manifest.to_json())[:16]}"
        self._lock = threading.Lock()
        #: Held to write: threads that wait for a file's lock in the kernel take far
        #: more of the processor.
        self._writing = threading.Lock()
        self._buffers = threading.local()
        #: Bytes that came from the store.
        self.fetched = 0
        #: Bytes of files that are links.
        self.linked = 0
        #: Digest of content -> where a version on this disk has it.
        self._places: dict[str, _Place] = {}
        #: Digest and mode of a file -> where a version on this disk has it.
        self._files: dict[tuple[str, int], Path] = {}
        named = {entry.version: entry for entry in entries}
        for version, path in layout.versions(directory.parent, directory.name).items():
            known = receipts.read(version)
            if known is None and version in named:
                # It was published here; if it is not what was pushed, that shows when
                # its content is compared.
                with suppress(SpikelessError):
                    known = catalog.manifest(named[version])
            if known is not None:
                self._learn(path, known)

    def _learn(self, version: Path, manifest: VersionManifest) -> None:
        for file in manifest.files:
            path = version / file.path
            if path.is_symlink() or not path.is_file():
                continue
            self._files[file.sha256, file.mode] = path
            for offset, size, chain in manifest.extents(file):
                self._places[chain[-1].sha256] = _Place(path, offset, size)

    def run(self) -> Path:
        """Put it together; returns where it is, complete and compared.

        What an earlier run left is used. Raises as `spikeless.store.pull.pull` does.
        """
        self._clear()
        self._target.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self._store.settings.workers, "pull") as pool:
            try:
                linked = self._link_files(pool)
                rest = [file for file in self._manifest.files if file.path not in linked]
                self._require_room(rest)
                for work in [pool.submit(self._complete, piece) for piece in self._pieces(rest)]:
                    work.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return self._target

    def _clear(self) -> None:
        """Remove what is not of this version, such as what was pulled before it."""
        if not self._unfinished.is_dir():
            return
        for path in self._unfinished.iterdir():
            if path != self._target:
                shutil.rmtree(path, ignore_errors=True)
        wanted = {self._target / file.path for file in self._manifest.files}
        for folder, folders, names in os.walk(self._target):
            for name in [*folders, *names]:
                path = Path(folder, name)
                if path.is_symlink() or (name in names and path not in wanted):
                    path.unlink()

    # Whole files ----------------------------------------------------------------------

    def _link_files(self, pool: ThreadPoolExecutor) -> set[str]:
        """Link the files that a version on this disk has; returns their paths."""
        compared: list[tuple[File, Path, list[Future[bool]]]] = []
        for file in self._manifest.files:
            (self._target / file.path).parent.mkdir(parents=True, exist_ok=True)
            known = self._files.get((file.sha256, file.mode))
            if known is not None:
                extents = self._manifest.extents(file)
                work = [pool.submit(self._is, _Place(known, *place), chain) for *place, chain in extents]
                compared.append((file, known, work))
        return {
            file.path
            for file, known, work in compared
            # The list takes all results, so that no worker reads from here on.
            if all([each.result() for each in work]) and self._link(file, known)
        }

    def _is(self, place: _Place, chain: tuple[Stored, ...]) -> bool:
        buffer = self._buffer(place.size)
        return place.read(buffer) and pieces.digest(buffer) == chain[-1].sha256

    def _link(self, file: File, known: Path) -> bool:
        target = self._target / file.path
        try:
            status = known.stat()
            if status.st_size != file.size or status.st_mode & 0o777 != file.mode:
                return False
            target.unlink(missing_ok=True)
            os.link(known, target)
        except OSError:
            return False  # another file system, or too many links: it is copied
        self.linked += file.size
        return True

    def _require_room(self, files: list[File]) -> None:
        needed = 0
        for file in files:
            path = self._target / file.path
            needed += file.size - (path.stat().st_blocks * 512 if path.is_file() else 0)
        free = shutil.disk_usage(self._target).free
        if needed + _SPARE_BYTES > free:
            raise ResourceExhausted(
                f"version {self._manifest.version} of {self._manifest.model} takes {needed:,} more bytes, "
                f"and {self._target} has {free:,}; make room and try again"
            )

    # Pieces ---------------------------------------------------------------------------

    def _pieces(self, files: list[File]) -> Iterator[_Piece]:
        """The pieces of files, each of which gets its size first."""
        for file in files:
            path = self._target / file.path
            # Never write to a file that another version links to.
            if path.exists() and (path.stat().st_nlink > 1 or path.stat().st_size != file.size):
                path.unlink()
            resumed = path.exists()
            with open(path, "ab") as handle:
                os.ftruncate(handle.fileno(), file.size)
            path.chmod(atomic.FILE_MODE)
            for offset, size, chain in self._manifest.extents(file):
                yield _Piece(path, offset, size, chain, resumed)

    def _complete(self, piece: _Piece) -> None:
        """Get one piece to its place."""
        wanted = piece.chain[-1].sha256
        buffer = self._buffer(piece.size)
        with open(piece.path, "r+b", buffering=0) as file:
            descriptor = file.fileno()
            if piece.resumed and _read(descriptor, buffer, piece.offset) and pieces.digest(buffer) == wanted:
                return
            place = self._place(piece.chain[-1], piece.size)
            if place is None or not place.read(buffer) or pieces.digest(buffer) != wanted:
                place = None
                self._make(piece, buffer)
            with self._writing:
                if place is None or not place.copy(descriptor, piece.offset):
                    _write(descriptor, buffer, piece.offset)
            pages.start_writing(descriptor, piece.offset, piece.size)

    def _make(self, piece: _Piece, buffer: memoryview) -> None:
        """Fill a buffer with a piece; raises DataLoss where it cannot be made."""
        for from_disk in (True, False):  # what is on this disk may be damaged
            self._apply(piece, buffer, from_disk)
            if pieces.digest(buffer) == piece.chain[-1].sha256:
                return
        raise DataLoss(
            f"{self._store.show(self._catalog.piece_path(piece.chain[-1]))} does not make the piece of "
            f"{piece.path.name} at {piece.offset}; push the version again"
        )

    def _apply(self, piece: _Piece, buffer: memoryview, from_disk: bool) -> None:
        """Fill a buffer by a chain, from the last of its steps that this disk has."""
        chain = piece.chain
        for number in reversed(range(len(chain) - 1 if from_disk else 0)):
            place = self._place(chain[number], piece.size)
            if place is not None and place.read(buffer):
                chain = chain[number + 1 :]
                break
        for stored in chain:
            data = self._store.fetch(self._catalog.piece_path(stored), stored.bytes, stored.object)
            with self._lock:
                self.fetched += len(data)
            pieces.apply(stored, data, buffer)

    def _place(self, stored: Stored, size: int) -> _Place | None:
        place = self._places.get(stored.sha256)
        return place if place is not None and place.size == size else None

    def _buffer(self, size: int) -> memoryview:
        """Memory of this thread, which it uses again for its next piece."""
        whole: bytearray | None = getattr(self._buffers, "whole", None)
        if whole is None:
            whole = self._buffers.whole = bytearray(self._manifest.piece_bytes)
        return memoryview(whole)[:size]


def _read(descriptor: int, buffer: memoryview, offset: int) -> bool:
    """Fill a buffer from a file; False where the file ends before."""
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if not count:
            return False
        buffer, offset = buffer[count:], offset + count
    return True


def _write(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written
