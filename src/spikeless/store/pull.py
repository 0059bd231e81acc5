"""Pull: a version comes from a store into a model repository on this machine's disk.

In: the URL of a store and a repository. Out: the version there, by one rename, and a
line in the journal.

A version is put together in ``<models>/<name>/.spikeless/pulls/``, where no server
looks (`spikeless.store.assembly`). A file that a version on this disk has becomes a
second link to it, so both share the page cache. A piece that one has is copied from
there. For what changed a little, the difference is fetched. Every byte is compared with
the manifest before the version gets its name. What a kill or an error leaves behind is
compared too, and kept: the next pull goes on from there.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from spikeless.disk import atomic, locks, pages
from spikeless.errors import (
    AlreadyExists,
    DataLoss,
    InvalidArgument,
    NotFound,
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
from spikeless.store.assembly import Assembly
from spikeless.store.catalog import Catalog, latest, models_in, of_version
from spikeless.store.changes import check_node, this_node
from spikeless.store.manifest import Entry, Index, VersionManifest
from spikeless.store.objects import Store
from spikeless.store.push import SERVING_ROOT
from spikeless.store.receipts import Receipts
from spikeless.store.settings import StoreSettings

_LOCK = "pull.lock"
_CHUNK_BYTES = 4 << 20


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
    receipts = Receipts(directory)
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
    assembly = Assembly(catalog, manifest, directory, receipts, index.versions)
    staged = assembly.run()
    progress(f"{model}: writing version {version} to disk")
    _finish(staged, manifest, f"{settings.serving_root or here(models)}/{model}/{version}")
    receipts.write(version, staged, manifest.to_json())
    _rename(staged, target)
    fetched = assembly.fetched + entry.bytes
    Journal(models, model).append(CameFromStore(version, manifest.size, fetched, shown, entry.manifest))
    return Pulled(
        model,
        version,
        str(target),
        shown,
        manifest.size,
        fetched,
        assembly.linked,
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
            # What was read and written just now is there, where there is memory for it.
            if pages.resident(staged / path) < (staged / path).stat().st_size:
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


def _sha256(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb", buffering=0) as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()
