"""Push: a version goes from this machine's disk into a store.

In: a version of a model repository, which has passed its gates, or a SavedModel from
anywhere, which passes them now. Out: the same in the store, and a line in the journal.

Whatever ends it early, the version does not show in the store: its manifest is written
after everything that it names. The next push finds the pieces that are there and goes
on. Nothing that is in a store is ever changed but the index.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from spikeless import __version__
from spikeless.disk import atomic
from spikeless.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from spikeless.formats import savedmodel
from spikeless.formats.versions import MAX_VERSION, parse_version
from spikeless.mapping import is_mapped, pinned_graph, read_manifest
from spikeless.repository import layout, publishing
from spikeless.repository.gates import GATES, Gate
from spikeless.repository.journal import CameFromStore, Journal, Published, SentToStore
from spikeless.repository.origin import read as read_origin
from spikeless.store import manifest as manifests
from spikeless.store import pieces
from spikeless.store.catalog import Catalog
from spikeless.store.manifest import File, Stored, VersionManifest
from spikeless.store.objects import Store
from spikeless.store.settings import StoreSettings
from spikeless.warmup.records import warmup_file

#: Below it, a pushed graph names its mapped files: where containers have them.
SERVING_ROOT = "/models"
_CHUNK_BYTES = 4 << 20
#: A push may take so long. `spikeless.store.prune` leaves what it uses alone for twice
#: that.
LONGEST_SECONDS = 43_200.0


@dataclass(frozen=True)
class Pushed:
    """A version that is in a store."""

    name: str
    version: int
    #: The store, without credentials.
    store: str
    #: The version that differences are from; None where all pieces are whole.
    base: int | None
    #: Bytes of its files.
    bytes: int
    #: Bytes that went to the store.
    sent: int
    #: Whether the store had it before.
    already: bool

    def __str__(self) -> str:
        if self.already:
            return f"{self.name}: version {self.version} is in {self.store} already"
        share = 100 * self.sent / max(self.bytes, 1)
        return (
            f"{self.name}: version {self.version} is in {self.store}: sent {self.sent:,} bytes "
            f"({share:.1f} %)"
        )


def push(
    version: str | os.PathLike[str],
    store: str,
    *,
    name: str | None = None,
    number: int | None = None,
    models: str | os.PathLike[str] | None = None,
    gates: tuple[Gate, ...] = GATES,
    settings: StoreSettings | None = None,
    piece_bytes: int = manifests.PIECE_BYTES,
    progress: Callable[[str], None] = lambda line: None,
    interrupted: threading.Event | None = None,
) -> Pushed:
    """Push a version, ``<models>/<name>/<number>``, or a SavedModel from elsewhere.

    A SavedModel that no repository has published passes ``gates`` first. Where it is in
    a folder named by a number, its name and number are those of its path.

    Args:
        version: the directory.
        store: the URL of the store.
        name: the model's name, for a SavedModel from elsewhere.
        number: its version, for a SavedModel from elsewhere; by default one more than
            the highest in the store.
        models: for a SavedModel from elsewhere, the repository with whose stable
            version it is compared.
        gates: what a SavedModel from elsewhere has to pass.
        piece_bytes: bytes of a piece.
        progress: called with a line of text now and then.
        interrupted: set it to end early.

    Raises:
        AlreadyExists: the store has this version with other content.
        SpikelessError: a gate refused it, the store failed, it is no SavedModel. The
            version does not show in the store then.
    """
    opened = Store(store, settings, interrupted)
    began = time.monotonic()
    with ExitStack() as stack:
        source = stack.enter_context(_source(Path(version), opened, name, number, models, gates, progress))
        catalog = Catalog(opened, source.name)
        index = catalog.index()
        others = [entry for entry in index.versions if entry.version != source.number]
        base = catalog.manifest(others[-1]) if others else None
        there = catalog.find(source.number)
        with atomic.reported_errors(f"push {version}"):
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spikeless-push-")))
            pusher = _Pusher(catalog, source, base, there, piece_bytes, scratch)
            progress(f"{source.name}: pushing version {source.number} to {opened.shown}")
            written, sent = pusher.run()
        if time.monotonic() - began > LONGEST_SECONDS:
            raise Unavailable(f"pushing version {source.number} took more than half a day; push it again")
        already = not catalog.add(written)
    result = Pushed(source.name, source.number, opened.shown, written.base, written.size, sent, already)
    if source.journal is not None and not already:
        source.journal.append(SentToStore(source.number, written.size, sent, opened.shown, written.base))
    return result


@dataclass(frozen=True)
class _Source:
    """What is pushed."""

    path: Path
    name: str
    number: int
    #: The folder that may have the versions before it; None for none.
    siblings: Path | None
    #: Where the push is noted; None for a SavedModel of no repository.
    journal: Journal | None


@contextmanager
def _source(
    path: Path,
    store: Store,
    name: str | None,
    number: int | None,
    models: str | os.PathLike[str] | None,
    gates: tuple[Gate, ...],
    progress: Callable[[str], None],
) -> Iterator[_Source]:
    """A version that has passed its gates."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise NotFound(f"{path} {what}; give the folder of a version or a SavedModel")
    path = path.absolute()
    in_path = parse_version(path.name)
    if in_path is not None and name is None and number is None and _is_published(path, in_path):
        journal = Journal(path.parents[1], path.parent.name)
        yield _Source(path, path.parent.name, in_path, path.parent, journal)
        return
    name = name or (path.parent.name if in_path is not None else None)
    if name is None:
        raise InvalidArgument(f"{path} is in no model repository: give the model's name, too")
    if number is None:
        number = in_path if in_path is not None else _next_number(Catalog(store, name))
    with ExitStack() as stack:
        if models is None:
            # Beside it, so that links take the place of copies.
            beside = path.parent if os.access(path.parent, os.W_OK) else None
            models = stack.enter_context(tempfile.TemporaryDirectory(prefix=".spikeless-push-", dir=beside))
        candidate = stack.enter_context(
            publishing.stage(
                path,
                models,
                name,
                number,
                gates=gates,
                serving_root=SERVING_ROOT,
                link=True,
                progress=lambda title: progress(f"{name}: {title}"),
            )
        )
        yield _Source(candidate.path, name, number, layout.model_directory(models, name), None)


def _is_published(path: Path, number: int) -> bool:
    """Whether a repository's gates have let it through, here or where it was pushed."""
    entries = Journal(path.parents[1], path.parent.name).entries()
    return any(isinstance(entry, (Published, CameFromStore)) and entry.version == number for entry in entries)


def _next_number(catalog: Catalog) -> int:
    number = max((entry.version for entry in catalog.index().versions), default=0) + 1
    if number > MAX_VERSION:
        raise InvalidArgument(f"{catalog.store.shown} has the highest version there is; give a free one")
    return number


@dataclass(frozen=True)
class _Origin:
    """A file of the version, and where its content is read."""

    path: str
    source: Path
    mode: int
    size: int


class _Pusher:
    """Sends the pieces of one version that a store does not have."""

    def __init__(
        self,
        catalog: Catalog,
        source: _Source,
        base: VersionManifest | None,
        there: VersionManifest | None,
        piece_bytes: int,
        scratch: Path,
    ) -> None:
        self._catalog = catalog
        self._store = catalog.store
        self._source = source
        self._base = base
        self._piece_bytes = piece_bytes
        self._scratch = scratch
        self._lock = threading.Lock()
        self._sent = 0
        self._differs = False
        #: Objects that were there, but old.
        self._renewed: list[str] = []
        #: Digest of content -> how it comes about.
        self._known: dict[str, tuple[Stored, ...]] = {}
        #: Path and offset -> the piece that was there.
        self._before: dict[tuple[str, int], tuple[Stored, ...]] = {}
        for manifest in (there, base):
            for file in manifest.files if manifest is not None else ():
                for chain in file.pieces:
                    self._known[chain[-1].sha256] = chain
        if base is not None and base.piece_bytes == piece_bytes:
            for file in base.files:
                for offset, _, chain in base.extents(file):
                    self._before[file.path, offset] = chain

    def run(self) -> tuple[VersionManifest, int]:
        """Send everything that is missing; returns the manifest and the bytes sent."""
        path, name, number = self._source.path, self._source.name, self._source.number
        origins = list(self._origins())
        with ThreadPoolExecutor(self._store.settings.workers, "push") as pool:
            digests = {origin.path: pool.submit(_sha256, origin.source) for origin in origins}
            chains = {
                origin.path: [
                    pool.submit(self._piece, origin, offset)
                    for offset in range(0, origin.size, self._piece_bytes)
                ]
                for origin in origins
            }
            try:
                files = tuple(
                    File(
                        origin.path,
                        origin.mode,
                        origin.size,
                        digests[origin.path].result(),
                        tuple(chain.result() for chain in chains[origin.path]),
                    )
                    for origin in origins
                )
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if not all(self._store.find(each) for each in self._renewed):
            raise Unavailable(f"a prune of {self._store.shown} was in the way; push it again")
        mapped = read_manifest(path).mapped_files() if is_mapped(path) else []
        written = VersionManifest(
            format=manifests.FORMAT,
            tool=f"spikeless {__version__}",
            model=name,
            version=number,
            base=self._base.version if self._base is not None and self._differs else None,
            trained=_trained(path),
            pushed=time.time(),
            warmup=warmup_file(path).is_file(),
            mapped=tuple(record.path for record in mapped),
            piece_bytes=self._piece_bytes,
            files=files,
        )
        data = written.to_json()
        # What is written is what can be read.
        manifests.read_manifest(data, "the manifest", name, number)
        return written, self._sent + len(data)

    def _origins(self) -> Iterator[_Origin]:
        root = self._source.path
        for folder, folders, names in os.walk(root):
            folders.sort()
            for each in sorted(names):
                file = Path(folder, each)
                status = file.lstat()
                if not stat.S_ISREG(status.st_mode):
                    raise FailedPrecondition(f"{file} is no plain file: publish the version first")
                path = file.relative_to(root).as_posix()
                mode = stat.S_IMODE(status.st_mode) & 0o755 | 0o444
                if path == savedmodel.SAVED_MODEL_FILE and is_mapped(root):
                    # The paths in it are this machine's.
                    file = self._scratch / each
                    serving_root = f"{SERVING_ROOT}/{self._source.name}/{self._source.number}"
                    file.write_bytes(pinned_graph(root, serving_root))
                yield _Origin(path, file, mode, file.stat().st_size)

    def _piece(self, origin: _Origin, offset: int) -> tuple[Stored, ...]:
        """Store one piece where it is not stored yet; returns how it comes about."""
        content = _read(origin.source, offset, min(self._piece_bytes, origin.size - offset))
        known = self._known.get(pieces.digest(content))
        if known is not None:
            return known
        chain = self._before.get((origin.path, offset))
        made = self._difference(content, origin, offset, chain) if chain is not None else None
        if chain is None or made is None:
            chain, made = (), pieces.whole(content)
        else:
            self._differs = True
        stored, data = made
        path = self._catalog.piece_path(stored)
        found = self._store.find(path)
        # One that no version names may be about to be removed, unless it is new.
        old = found is not None and time.time() - found.written > LONGEST_SECONDS
        if found is None or found.bytes != stored.bytes or old:
            self._store.write(path, data)
            if old:
                self._renewed.append(path)
            with self._lock:
                self._sent += len(data)
        return (*chain, stored)

    def _difference(
        self, content: bytes, origin: _Origin, offset: int, chain: tuple[Stored, ...]
    ) -> tuple[Stored, bytes] | None:
        """The piece as a difference; None where what it is from is not on this disk."""
        if self._base is None or self._source.siblings is None:
            return None
        before = self._source.siblings / str(self._base.version) / origin.path
        try:
            base = _read(before, offset, self._piece_bytes, whole=False)
        except OSError:
            return None
        return pieces.difference(content, base, chain) if pieces.digest(base) == chain[-1].sha256 else None


def _trained(version: Path) -> float:
    """When a version was exported, or when a registry got it."""
    taken = read_origin(version)
    if taken is not None and taken.origin.created:
        return taken.origin.created / 1000
    return (version / savedmodel.SAVED_MODEL_FILE).stat().st_mtime


def _read(file: Path, offset: int, size: int, *, whole: bool = True) -> bytes:
    with file.open("rb", buffering=0) as handle:
        content = os.pread(handle.fileno(), size, offset)
    if whole and len(content) != size:
        raise FailedPrecondition(f"{file} changed while it was pushed; push a version that nobody writes to")
    return content


def _sha256(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb", buffering=0) as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()
