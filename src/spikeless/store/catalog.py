"""The versions of a model in a store.

In: a store and a model's name. Out: its index, its manifests, and its objects' places.
"""

from __future__ import annotations

from contextlib import suppress

from spikeless.errors import AlreadyExists, InvalidArgument, NotFound, SpikelessError, Unavailable, nearest
from spikeless.formats.versions import parse_version
from spikeless.repository import layout, models_config
from spikeless.store import manifest as manifests
from spikeless.store.manifest import Entry, Index, Stored, VersionManifest
from spikeless.store.objects import Store
from spikeless.store.pieces import digest

_INDEX = "index.json"
_MANIFEST_SUFFIX = ".json"
#: Times that an index is written before others are said to be in the way.
_ROUNDS = 20


class Catalog:
    """What a store has of one model.

    Raises:
        InvalidArgument: the name is none.
    """

    def __init__(self, store: Store, model: str) -> None:
        layout.model_directory("", model)
        self.store = store
        self.model = model

    @property
    def index_path(self) -> str:
        """The object that changes whenever a version is added."""
        return f"{self.model}/{_INDEX}"

    def manifest_path(self, version: int) -> str:
        return f"{self.model}/versions/{version}{_MANIFEST_SUFFIX}"

    def removed_path(self, version: int) -> str:
        """The manifest of a version that was removed, whose pieces are still there."""
        return f"{self.model}/removed/{version}{_MANIFEST_SUFFIX}"

    @property
    def pieces_path(self) -> str:
        return f"{self.model}/pieces"

    def piece_path(self, stored: Stored) -> str:
        return f"{self.pieces_path}/{stored.object[:2]}/{stored.object}"

    def index(self) -> Index:
        """The index; an empty one where the store has nothing of the model.

        Raises:
            DataLoss, FailedPrecondition: it cannot be used. Unavailable: the store does
            not answer.
        """
        try:
            data = self.store.read(self.index_path, manifests.MAX_INDEX_BYTES)
        except NotFound:
            return Index(manifests.FORMAT, self.model, ())
        return manifests.read_index(data, self.store.show(self.index_path), self.model)

    def manifest(self, entry: Entry) -> VersionManifest:
        """The manifest of a version in the index; raises as `index` does."""
        path = self.manifest_path(entry.version)
        data = self.store.fetch(path, entry.bytes, entry.manifest)
        return manifests.read_manifest(data, self.store.show(path), self.model, entry.version)

    def find(self, version: int) -> VersionManifest | None:
        """The manifest of a version, whether an index names it or not."""
        path = self.manifest_path(version)
        try:
            data = self.store.read(path, manifests.MAX_MANIFEST_BYTES)
        except NotFound:
            return None
        return manifests.read_manifest(data, self.store.show(path), self.model, version)

    def versions(self) -> list[int]:
        """The versions that have a manifest, whether an index names them or not."""
        return self._numbers("versions")

    def removed(self) -> list[int]:
        """The versions that were removed, and whose pieces are still there."""
        return self._numbers("removed")

    def add(self, manifest: VersionManifest) -> bool:
        """Add a version whose pieces are all there.

        Returns:
            Whether it was not there before.

        Raises:
            AlreadyExists: the version is there with other content, or was removed.
            Unavailable: others add versions all the time.
        """
        path = self.manifest_path(manifest.version)
        self._require_not_removed(manifest.version)
        there = self.find(manifest.version)
        if there is None:
            with suppress(AlreadyExists):
                self.store.create(path, manifest.to_json())
            # Stores without an exclusive write let the last of two win: see who did.
            there = self.find(manifest.version)
        if there is None or there.content != manifest.content:
            raise AlreadyExists(
                f"{self.store.show(path)} is there already with other content; versions are never "
                "overwritten: push it under another number"
            )
        self.publish(there.version)
        self._require_not_removed(manifest.version)
        return there == manifest

    def _require_not_removed(self, version: int) -> None:
        path = self.removed_path(version)
        if self.store.find(path) is not None:
            raise AlreadyExists(
                f"version {version} was removed from {self.store.shown} ({self.store.show(path)}): push it "
                "under another number"
            )

    def remove(self, version: int, manifest: bytes) -> None:
        """Take a version out of the index; its pieces stay, and so does its manifest.

        Cut short anywhere, it is completed by doing it again.
        """
        self.store.write(self.removed_path(version), manifest)
        self.publish()
        self.store.remove(self.manifest_path(version))

    def restore(self, version: int) -> None:
        """Undo `remove`, where it was done."""
        try:
            manifest = self.store.read(self.removed_path(version), manifests.MAX_MANIFEST_BYTES)
        except NotFound:
            return
        self.store.write(self.manifest_path(version), manifest)
        self.store.remove(self.removed_path(version))
        self.publish(version)

    def publish(self, *added: int) -> None:
        """Write the index until it names what is there.

        Whoever adds or removes a version at the same time does the same, and the one
        who writes last has seen what all of them did.
        """
        known: dict[int, Entry] = {}
        for _ in range(_ROUNDS):
            entries = {entry.version: entry for entry in self.index().versions}
            known |= entries
            for version in {*self.versions(), *added} - known.keys():
                entry = self._entry(version)
                if entry is not None:
                    known[version] = entry
            for version in self.removed():
                known.pop(version, None)
            if known == entries:
                return
            ordered = tuple(known[version] for version in sorted(known))
            self.store.write(self.index_path, Index(manifests.FORMAT, self.model, ordered).to_json())
        raise Unavailable(f"{self.store.show(self.index_path)} changes all the time; repeat the command")

    def _numbers(self, folder: str) -> list[int]:
        names = self.store.names(f"{self.model}/{folder}")
        found = (parse_version(name.removesuffix(_MANIFEST_SUFFIX)) for name in names)
        return sorted(version for version in found if version is not None)

    def _entry(self, version: int) -> Entry | None:
        try:
            data = self.store.read(self.manifest_path(version), manifests.MAX_MANIFEST_BYTES)
        except NotFound:  # listed early
            return None
        return Entry(version, digest(data), len(data))


def models_in(store: Store) -> list[str]:
    """The models of a store."""
    found = []
    for name in store.names(""):
        if name == models_config.FILE_NAME:
            continue
        try:
            layout.model_directory("", name)
        except InvalidArgument:
            continue
        found.append(name)
    return found


def latest(index: Index, store: Store) -> Entry:
    """The newest version.

    Raises:
        NotFound: there is none.
    """
    if not index.versions:
        try:
            similar = nearest(index.model, [name for name in models_in(store) if name != index.model])
        except SpikelessError:  # a store that cannot be listed
            similar = ""
        raise NotFound(f"{store.shown} has no version of {index.model}{similar or ': push one first'}")
    return index.versions[-1]


def of_version(index: Index, version: int, where: str) -> Entry:
    """One version.

    Raises:
        NotFound: it is not there.
    """
    for entry in index.versions:
        if entry.version == version:
            return entry
    known = ", ".join(str(entry.version) for entry in index.versions) or "none"
    raise NotFound(f"{where} has no version {version} of {index.model}, only {known}")
