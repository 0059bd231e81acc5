"""What was pulled into a model's folder.

In: a version on this disk. Out: the manifest that it was pulled by. These are hints:
whoever uses the content that they name compares it first.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from spikeless.disk import atomic
from spikeless.errors import SpikelessError
from spikeless.repository import layout
from spikeless.store.manifest import MAX_MANIFEST_BYTES, VersionManifest, read_manifest

#: One manifest for each version that was pulled, named by it and its folder's inode.
_FOLDER = "pulled"


class Receipts:
    """The receipts of one model's folder."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._folder = layout.state_directory(directory.parent, directory.name) / _FOLDER

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
        """SHA-256 of the manifest of a version that was pulled and is there."""
        with suppress(OSError):
            return hashlib.sha256(
                self._file(version, self._directory / str(version)).read_bytes()
            ).hexdigest()
        return None

    def write(self, version: int, folder: Path, manifest: bytes) -> None:
        """Note the manifest of a version, whose folder may still be staged."""
        self._folder.mkdir(exist_ok=True)
        kept = {
            self._file(number, path).name
            for number, path in layout.versions(self._directory.parent, self._directory.name).items()
        }
        for old in self._folder.iterdir():
            if old.name not in kept:
                old.unlink(missing_ok=True)
        atomic.write_atomically(self._file(version, folder), manifest)
