"""Pull: a version comes from a store into a model repository on this machine's disk.

In: the URL of a store and a repository. Out: the version there, by one rename, and a
line in the journal.

A version is put together in ``<models>/<name>/.spikeless/pulls/``, where no server
looks. A file that a version on this disk has becomes a second link to it, so both share
the page cache. A piece that one has is copied from there. For what changed a little,
the difference is fetched. Every byte is compared with the manifest before the version
gets its name. What a kill or an error leaves behind is compared too, and kept: the next
pull goes on from there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from spikeless.disk import atomic, locks, pages
from spikeless.errors import (
    AlreadyExists,
    DataLoss,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SpikelessError,
)
from spikeless.formats import savedmodel
from spikeless.mapping import pinned_graph, repin
from spikeless.mapping.manifest import absolute, here
from spikeless.repository import layout
from spikeless.repository.journal import CameFromStore, Journal
from spikeless.repository.models_config import ModelsConfig
from spikeless.rollout.fleet import FleetSettings
from spikeless.rollout.prune import prune
from spikeless.store import pieces, promotions
from spikeless.store.applying import apply
from spikeless.store.catalog import Catalog, latest, models_in, of_version
from spikeless.store.changes import check_node, this_node
from spikeless.store.manifest import (
    MAX_MANIFEST_BYTES,
    Entry,
    File,
    Index,
    Stored,
    VersionManifest,
    read_manifest,
)
from spikeless.store.objects import Store
from spikeless.store.push import SERVING_ROOT
from spikeless.store.settings import StoreSettings

_LOCK = "pull.lock"
_UNFINISHED = "pulls"
#: One manifest for each version that was pulled, named by it and its folder's inode.
_RECEIPTS = "pulled"
_CHUNK_BYTES = 4 << 20
#: Room that is left free.
_SPARE_BYTES = 16 << 20


@dataclass(frozen=True)
class Pulled:
    """A version of a store that is on this disk."""

    name: str
    version: int
    #: Its directory.
    path: str
    #: The store, without credentials.
    store: str
    #: Bytes of its files.
    bytes: int
    #: Bytes that came from the store, its manifest included.
    fetched: int
    #: Bytes of files that are links to another version's.
    linked: int
    #: When it was trained, as far as is known, in seconds since 1970.
    trained: float
    #: Whether it was on this disk before.
    already: bool

    def __str__(self) -> str:
        if self.already:
            return f"{self.name}: version {self.version} is there already"
        share = 100 * self.fetched / max(self.bytes, 1)
        return (
            f"{self.name}: version {self.version} is in {self.path}: fetched {self.fetched:,} bytes "
            f"({share:.1f} %), linked {self.linked:,}"
        )


@dataclass(frozen=True)
class PullSettings:
    """How versions are pulled."""

    #: The absolute path at which servers see the repository; where it is here by
    #: default. A mapped version names its files by it.
    serving_root: str | None = None
    #: The newest versions that stay, by the rules of `spikeless.rollout.prune` whatever
    #: their age; None: all stay.
    keep: int | None = None
    #: The running servers of this machine, on which a version that is promoted in the
    #: store is promoted, too. None: ``models.config`` is written for servers that start
    #: afterwards.
    servers: FleetSettings | None = None
    store: StoreSettings = field(default_factory=StoreSettings)
    #: What this machine is called, where a promotion goes on in waves.
    node: str = field(default_factory=this_node)

    def __post_init__(self) -> None:
        check_node(self.node)
        if self.keep is not None and self.keep < 1:
            raise InvalidArgument(f"--keep {self.keep}: the newest version always stays, so 1 or more")
        if self.serving_root is not None:
            absolute(self.serving_root)


def pull(
    store: str,
    models: str | os.PathLike[str],
    name: str | None = None,
    version: int | None = None,
    *,
    settings: PullSettings | None = None,
    progress: Callable[[str], None] = lambda line: None,
    interrupted: threading.Event | None = None,
) -> list[Pulled]:
    """Pull the newest version, or a given one, of one model or of all in the store.

    Where versions are promoted in the store, they are pulled, too, and served: see
    `spikeless.store.applying`. A given version is only pulled.

    Args:
        store: the URL of the store.
        models: the repository; created when it is not there.
        name: the model; all models of the store by default.
        version: its version; the newest by default.
        progress: called with a line of text now and then.
        interrupted: set it to end early.

    Raises:
        NotFound: the store has no such model or version.
        AlreadyExists: this disk has the version with other content.
        DataLoss: the store has not what its manifest says.
        ResourceExhausted: there is no room.
        PromotionError: a server refused a promoted version; everything was put back.
        SpikelessError: the store failed. In all these cases no version shows that is
            not whole.
    """
    settings = settings or PullSettings()
    opened = Store(store, settings.store, interrupted)
    names = [name] if name is not None else models_in(opened)
    if not names:
        raise NotFound(f"{opened.shown} has no models: push one first, or give a model's name")
    fleet = promotions.read(opened).of(settings.node)
    pulled = []
    for each in names:
        catalog = Catalog(opened, each)
        pulled += pull_model(catalog, catalog.index(), Path(models), fleet, settings, progress, version)
    for each in names if version is None else ():
        apply(
            Path(models),
            each,
            fleet,
            store=opened.shown,
            servers=settings.servers,
            serving_root=settings.serving_root,
            progress=progress,
            interrupted=interrupted,
        )
    return pulled


def pull_model(
    catalog: Catalog,
    index: Index,
    models: Path,
    fleet: ModelsConfig,
    settings: PullSettings,
    progress: Callable[[str], None] = lambda line: None,
    version: int | None = None,
) -> list[Pulled]:
    """Pull the versions of one model that are promoted, and the newest, which is last.

    Args:
        fleet: the ``models.config`` in the store.
        version: pull only this one.

    Other arguments and errors are those of `pull`.
    """
    shown = catalog.store.shown
    pinned = promotions.pinned(fleet, catalog.model)
    if version is not None:
        entries = [of_version(index, version, shown)]
    else:
        newest = latest(index, catalog.store)
        entries = [of_version(index, each, shown) for each in pinned if each != newest.version]
        entries.append(newest)
    pulled = [_pull_one(catalog, index, models, entry, settings, progress) for entry in entries]
    if settings.keep is not None and not all(one.already for one in pulled):
        prune(models, catalog.model, settings.keep, None, force=True, pinned=pinned, progress=progress)
    return pulled


def _pull_one(
    catalog: Catalog,
    index: Index,
    models: Path,
    entry: Entry,
    settings: PullSettings,
    progress: Callable[[str], None],
) -> Pulled:
    directory = layout.model_directory(models, catalog.model)
    state = layout.state_directory(models, catalog.model)
    with atomic.reported_errors(f"pull to {directory}"):
        atomic.make_directory(directory)
        state.mkdir(exist_ok=True)
        with locks.acquire(state / _LOCK):
            return _pull(catalog, index, entry, directory, settings, progress)


def _pull(
    catalog: Catalog,
    index: Index,
    entry: Entry,
    directory: Path,
    settings: PullSettings,
    progress: Callable[[str], None],
) -> Pulled:
    """What `pull_model` does while no other pull of this model does."""
    models, model, version = directory.parent, catalog.model, entry.version
    shown = catalog.store.shown
    receipts = _Receipts(directory)
    target = directory / str(version)
    known = target.exists() and receipts.digest(version) == entry.manifest
    manifest = (receipts.read(version) if known else None) or catalog.manifest(entry)
    if target.exists():
        if not known:
            progress(f"{model}: comparing version {version} with the store's")
            _require_same(target, manifest, shown)
            receipts.write(version, target, manifest.to_json())
        return Pulled(model, version, str(target), shown, manifest.size, 0, 0, manifest.trained, already=True)
    progress(f"{model}: pulling version {version} from {shown}")
    puller = _Puller(catalog, manifest, directory, receipts, index.versions)
    staged = puller.run()
    progress(f"{model}: writing version {version} to disk")
    _finish(staged, manifest, f"{settings.serving_root or here(models)}/{model}/{version}")
    receipts.write(version, staged, manifest.to_json())
    _rename(staged, target)
    fetched = puller.fetched + entry.bytes
    Journal(models, model).append(CameFromStore(version, manifest.size, fetched, shown, entry.manifest))
    return Pulled(
        model,
        version,
        str(target),
        shown,
        manifest.size,
        fetched,
        puller.linked,
        manifest.trained,
        already=False,
    )


def _finish(staged: Path, manifest: VersionManifest, serving_root: str) -> None:
    """Make a version that is complete one that servers can load, and sync it."""
    if manifest.mapped:
        record = repin(staged, absolute(serving_root), digests=False)
        if {file.path for file in record.mapped_files()} != set(manifest.mapped):
            raise DataLoss(f"{staged} maps other files than its manifest says; push the version again")
        for path in manifest.mapped:
            pages.prefetch(staged / path)
    for file in manifest.files:
        if (staged / file.path).stat().st_mode & 0o777 != file.mode:
            (staged / file.path).chmod(file.mode)
    for folder, _, _ in os.walk(staged):
        os.chmod(folder, atomic.DIRECTORY_MODE)
    atomic.sync_tree(staged)


def _rename(staged: Path, target: Path) -> None:
    try:
        # Fails where anything but an empty directory is in the way.
        staged.rename(target)
    except OSError:
        if target.exists():
            raise AlreadyExists(f"{target} appeared meanwhile; versions are never overwritten") from None
        raise
    atomic.sync(target.parent)


def _require_same(version: Path, manifest: VersionManifest, store: str) -> None:
    """Compare a version that something else put on this disk.

    Raises:
        AlreadyExists: it is another one.
    """
    for file in manifest.files:
        path = version / file.path
        with suppress(OSError, SpikelessError):
            if file.path == savedmodel.SAVED_MODEL_FILE and manifest.mapped:
                root = f"{SERVING_ROOT}/{manifest.model}/{manifest.version}"
                found = pieces.digest(pinned_graph(version, root))
            else:
                found = _sha256(path)
            if found == file.sha256:
                continue
        raise AlreadyExists(
            f"{path} differs from version {manifest.version} in {store}; versions are never overwritten: "
            "move yours away, or push it under another number"
        )


class _Receipts:
    """What was pulled into a model's folder: hints, which are checked before use."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._folder = layout.state_directory(directory.parent, directory.name) / _RECEIPTS

    def _file(self, version: int, folder: Path) -> Path:
        # Another folder under the same number has another inode.
        return self._folder / f"{version}-{folder.stat().st_ino}.json"

    def read(self, version: int) -> VersionManifest | None:
        """The manifest of a version that was pulled and is there."""
        try:
            file = self._file(version, self._directory / str(version))
            if file.stat().st_size > MAX_MANIFEST_BYTES:
                return None
            return read_manifest(file.read_bytes(), str(file), self._directory.name, version)
        except (OSError, SpikelessError):
            return None

    def digest(self, version: int) -> str | None:
        """Of the manifest of a version that was pulled and is there."""
        with suppress(OSError):
            return _sha256(self._file(version, self._directory / str(version)))
        return None

    def write(self, version: int, folder: Path, manifest: bytes) -> None:
        self._folder.mkdir(exist_ok=True)
        kept = {
            self._file(number, path).name
            for number, path in layout.versions(self._directory.parent, self._directory.name).items()
        }
        for old in self._folder.iterdir():
            if old.name not in kept:
                old.unlink(missing_ok=True)
        atomic.write_atomically(self._file(version, folder), manifest)


@dataclass(frozen=True)
class _Place:
    """Where a piece's content is on this disk."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The content, which has to be compared; empty where it is gone."""
        try:
            with self.path.open("rb", buffering=0) as file:
                return os.pread(file.fileno(), self.size, self.offset)
        except OSError:
            return b""

    def copy(self, target: int, offset: int) -> None:
        """Copy it into an open file, without copying where the file system can."""
        with self.path.open("rb", buffering=0) as file:
            done = 0
            with suppress(OSError):
                while done < self.size:
                    done += os.copy_file_range(
                        file.fileno(), target, self.size - done, self.offset + done, offset + done
                    )
            if done < self.size:
                _write(target, os.pread(file.fileno(), self.size, self.offset), offset)


class _Puller:
    """Puts one version together."""

    def __init__(
        self,
        catalog: Catalog,
        manifest: VersionManifest,
        directory: Path,
        receipts: _Receipts,
        entries: tuple[Entry, ...],
    ) -> None:
        self._catalog = catalog
        self._store = catalog.store
        self._manifest = manifest
        self._unfinished = layout.state_directory(directory.parent, directory.name) / _UNFINISHED
        self._target = self._unfinished / f"{manifest.version}-{pieces.digest(manifest.to_json())[:16]}"
        self._lock = threading.Lock()
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

        What an earlier run left is used. Raises as `pull` does.
        """
        self._clear()
        self._target.mkdir(parents=True, exist_ok=True)
        rest = [file for file in self._manifest.files if not self._link(file)]
        self._require_room(rest)
        with ThreadPoolExecutor(self._store.settings.workers, "pull") as pool:
            try:
                for work in [pool.submit(self._piece, *piece) for piece in self._pieces(rest)]:
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

    def _link(self, file: File) -> bool:
        """Give a file that a version on this disk has a second name."""
        known = self._files.get((file.sha256, file.mode))
        target = self._target / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if known is None:
            return False
        try:
            status = known.stat()
            if status.st_size != file.size or status.st_mode & 0o777 != file.mode:
                return False
            if _sha256(known) != file.sha256:
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

    def _pieces(self, files: list[File]) -> Iterator[tuple[Path, int, int, tuple[Stored, ...], bool]]:
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
                yield path, offset, size, chain, resumed

    def _piece(self, path: Path, offset: int, size: int, chain: tuple[Stored, ...], resumed: bool) -> None:
        """Get one piece to its place."""
        wanted = chain[-1].sha256
        with open(path, "r+b", buffering=0) as file:
            if resumed and pieces.digest(os.pread(file.fileno(), size, offset)) == wanted:
                return
            place = self._places.get(wanted)
            if place is not None and pieces.digest(place.read()) == wanted:
                place.copy(file.fileno(), offset)
                return
            for from_disk in (True, False):  # what is on this disk may be damaged
                content = self._content(chain, size, from_disk)
                if pieces.digest(content) == wanted:
                    _write(file.fileno(), content, offset)
                    return
        raise DataLoss(
            f"{self._store.show(self._catalog.piece_path(chain[-1]))} does not make the piece of {path.name} "
            f"at {offset}; push the version again"
        )

    def _content(self, chain: tuple[Stored, ...], size: int, from_disk: bool) -> bytes:
        """What a chain makes, from the last of its steps that this disk has."""
        content = b""
        for number in reversed(range(len(chain) - 1 if from_disk else 0)):
            place = self._places.get(chain[number].sha256)
            if place is not None and (content := place.read()):
                chain = chain[number + 1 :]
                break
        for stored in chain:
            data = self._store.fetch(self._catalog.piece_path(stored), stored.bytes, stored.object)
            with self._lock:
                self.fetched += len(data)
            content = pieces.apply(stored, data, size, content)
        return content


def _write(descriptor: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _sha256(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb", buffering=0) as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()
