"""Pruning a store: old versions leave it, and none that anybody still needs.

In: a store and a model. Out: the versions that were removed, and why each of the others
stays.

A version leaves the index first; its manifest goes to ``<model>/removed/`` and stays
there for a day. Pieces are removed when no manifest names them, not even one that was
removed less than a day ago, and when they are themselves older than that. So whoever
pulls or pushes at the same time finds what it began with: a push takes half a day at
most, and writes anew what no version names and is older. What was removed today, a
prune on the next day frees.

Cut short anywhere, the next one goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from spikeless.errors import InvalidArgument
from spikeless.store import manifest as manifests
from spikeless.store import promotions
from spikeless.store.catalog import Catalog, latest
from spikeless.store.libraries import Found
from spikeless.store.manifest import VersionManifest, read_manifest
from spikeless.store.objects import Store
from spikeless.store.push import LONGEST_SECONDS
from spikeless.store.settings import StoreSettings

#: Seconds for which nothing is removed that somebody may have begun to use.
GRACE_SECONDS = 2 * LONGEST_SECONDS


@dataclass(frozen=True)
class StorePruned:
    """What was removed from a store, and what stays."""

    removed: tuple[int, ...]
    #: Each of the other versions -> why it stays.
    kept: Mapping[int, str]
    #: Bytes of pieces that are gone.
    freed: int
    #: Bytes of pieces that a prune a day later frees.
    waiting: int
    #: Nothing was removed: that is what would be.
    dry_run: bool = False


def prune(
    store: str,
    name: str,
    keep: int,
    *,
    force: bool = False,
    dry_run: bool = False,
    settings: StoreSettings | None = None,
    progress: Callable[[str], None] = lambda line: None,
    interrupted: threading.Event | None = None,
) -> StorePruned:
    """Remove all but the newest ``keep`` versions of a model from a store.

    Versions that are promoted stay, whatever their label, and so do those that were
    pushed less than a day ago. What a version has in common with one that is removed
    stays with it.

    Args:
        store: the URL of the store.
        force: remove versions that are younger than a day, too. Nothing else is forced.
        dry_run: remove nothing, only find out what would be.
        progress: called with a line of text now and then.
        interrupted: set it to end early.

    Raises:
        NotFound: the store has no version of the model.
        Unavailable, FailedPrecondition: the store fails, or refuses it.
    """
    if keep < 1:
        raise InvalidArgument(f"--keep {keep}: the newest version always stays, so 1 or more")
    opened = Store(store, settings, interrupted)
    catalog = Catalog(opened, name)
    latest(catalog.index(), opened)
    return _Prune(catalog, keep, force, dry_run, progress).run()


class _Prune:
    """One prune of one model."""

    def __init__(
        self, catalog: Catalog, keep: int, force: bool, dry_run: bool, progress: Callable[[str], None]
    ) -> None:
        self._catalog = catalog
        self._store = catalog.store
        self._keep = keep
        self._force = force
        self._dry_run = dry_run
        self._progress = progress
        self._old = time.time() - GRACE_SECONDS

    def run(self) -> StorePruned:
        """Remove versions, then pieces."""
        if not self._dry_run:
            # What a push or a prune that was cut short has left undone.
            for version in self._catalog.removed():
                self._store.remove(self._catalog.manifest_path(version))
            self._catalog.publish()
        there = {}
        for version in self._catalog.versions():
            found = self._catalog.find(version)
            if found is not None:
                there[version] = found
        kept = self._reasons(there)
        gone = [version for version in there if version not in kept]
        if not self._dry_run:
            for version in gone:
                self._progress(f"removing version {version}")
                self._catalog.remove(version, there[version].to_json())
            for version in self._promoted() & set(gone):
                # It was promoted meanwhile.
                self._catalog.restore(version)
                kept[version] = "promoted in the store"
        removed = tuple(version for version in there if version not in kept)
        freed, waiting = self._free(there, removed)
        return StorePruned(removed, dict(sorted(kept.items())), freed, waiting, self._dry_run)

    def _reasons(self, there: Mapping[int, VersionManifest]) -> dict[int, str]:
        """Why versions stay."""
        reasons = {version: f"among the newest {self._keep}" for version in sorted(there)[-self._keep :]}
        for version, manifest in there.items():
            # A clock that was set back makes a version young, not old.
            if not self._force and manifest.pushed > self._old:
                reasons[version] = "younger than a day"
        promoted = self._promoted()
        return reasons | {version: "promoted in the store" for version in there if version in promoted}

    def _promoted(self) -> set[int]:
        """What some machine may have to serve, in waves or not."""
        promoted = promotions.read(self._store)
        model = self._catalog.model
        versions = set(promotions.pinned(promoted.config, model))
        for waves in promoted.waves:
            if waves.model == model:
                versions |= {waves.version, waves.previous}
        return versions

    def _free(self, there: Mapping[int, VersionManifest], removed: tuple[int, ...]) -> tuple[int, int]:
        """Remove pieces that nobody needs; returns their bytes, and those that wait."""
        found = self._store.below(self._catalog.pieces_path)
        # Manifests are read after pieces are listed: a piece that is not listed is not
        # removed, and one that a version in the list names is older than its manifest.
        named = {
            name for version, each in there.items() if version not in removed for name in self._names(each)
        }
        for version in self._catalog.versions():
            manifest = None if version in there else self._catalog.find(version)
            named |= self._names(manifest) if manifest is not None else set()
        waiting = {name for version in removed for name in self._names(there[version])}
        over = []
        for version in self._catalog.removed():
            path = self._catalog.removed_path(version)
            status = self._store.find(path)
            if status is not None and status.written < self._old:
                over.append(path)
            elif status is not None and version not in removed:
                data = self._store.read(path, manifests.MAX_MANIFEST_BYTES)
                waiting |= self._names(
                    read_manifest(data, self._store.show(path), self._catalog.model, version)
                )
        free: dict[str, Found] = {}
        later = 0
        for name, each in found.items():
            if name in named:
                continue
            if name in waiting or each.written > self._old:
                later += each.bytes
            else:
                free[name] = each
        if not self._dry_run:
            if free:
                self._progress(f"removing {len(free)} pieces")
            with ThreadPoolExecutor(self._store.settings.workers, "prune") as pool:
                list(pool.map(self._remove_piece, free))
            for path in over:
                self._store.remove(path)
        return sum(each.bytes for each in free.values()), later

    def _remove_piece(self, path: str) -> None:
        found = self._store.find(path)
        # A push may have written it anew.
        if found is not None and found.written < self._old:
            self._store.remove(path)

    def _names(self, manifest: VersionManifest) -> set[str]:
        return {
            self._catalog.piece_path(stored)
            for file in manifest.files
            for chain in file.pieces
            for stored in chain
        }
