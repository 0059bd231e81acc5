"""The manifest of a version in a store, and the index of a model's versions.

In: JSON from a store, which may hold anything. Out: what it says, checked: sizes are
within limits, digests are digests, and no path leaves the version's folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Annotated, Literal

import msgspec

from spikeless.errors import DataLoss
from spikeless.formats.savedmodel import SAVED_MODEL_FILE
from spikeless.formats.versions import MAX_VERSION
from spikeless.store.documents import Reader

#: Changes when a reader of the old form would misread the new one.
FORMAT = 1
_REMEDY = "push the version again"
#: Bytes of a piece. Smaller ones would make manifests larger, larger ones would make
#: each worker's memory larger.
PIECE_BYTES = 8 << 20
MAX_PIECE_BYTES = 16 << 20
#: Differences on top of a whole piece, at most.
MAX_DIFFERENCES = 12
MAX_MANIFEST_BYTES = 64 << 20
MAX_INDEX_BYTES = 4 << 20
_MAX_FILES = 100_000
_MAX_PATH_BYTES = 1024
_MAX_NAME_BYTES = 255
_MAX_FILE_BYTES = 1 << 44
_ALLOWED_MODE = 0o755
_READABLE = 0o444
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Count = Annotated[int, msgspec.Meta(ge=0, le=_MAX_FILE_BYTES)]
_Version = Annotated[int, msgspec.Meta(ge=0, le=MAX_VERSION)]
_Name = Annotated[str, msgspec.Meta(max_length=128)]
_Text = Annotated[str, msgspec.Meta(max_length=1024)]


class Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One object of a store, and the content that a piece has once it is applied."""

    #: Of the content.
    sha256: Digest
    #: ``raw``: the content; ``zstd``: the content, compressed; ``xor``: the exclusive
    #: or with the content before it, compressed.
    encoding: Literal["raw", "zstd", "xor"]
    #: SHA-256 of the object, which is its name.
    object: Digest
    #: Of the object.
    bytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_PIECE_BYTES + (MAX_PIECE_BYTES >> 6))]


#: How a piece comes about: a whole one, then differences. Whoever has the content of
#: one of them fetches only those after it.
Chain = Annotated[tuple[Stored, ...], msgspec.Meta(min_length=1, max_length=1 + MAX_DIFFERENCES)]


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a version."""

    #: Relative to the version's folder, with ``/``.
    path: Annotated[str, msgspec.Meta(min_length=1, max_length=_MAX_PATH_BYTES)]
    mode: Annotated[int, msgspec.Meta(ge=0, le=0o777)]
    size: _Count
    sha256: Digest
    #: All of the same size but the last.
    pieces: tuple[Chain, ...]


class VersionManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One version of a model, whole."""

    format: int
    #: What wrote it.
    tool: _Text
    model: _Name
    version: _Version
    #: The version that the differences are from; None where all pieces are whole.
    base: _Version | None
    #: When it was exported, or when a registry got it, in seconds since 1970.
    trained: Annotated[float, msgspec.Meta(ge=0, le=1e11)]
    #: When it was pushed.
    pushed: Annotated[float, msgspec.Meta(ge=0, le=1e11)]
    #: Whether it has a warmup file.
    warmup: bool
    #: The files that its graph maps. Its ``saved_model.pb`` names them below
    #: ``/models/<model>/<version>``; a puller puts its own path there.
    mapped: tuple[str, ...]
    piece_bytes: Annotated[int, msgspec.Meta(ge=1 << 12, le=MAX_PIECE_BYTES)]
    files: Annotated[tuple[File, ...], msgspec.Meta(min_length=1, max_length=_MAX_FILES)]

    def to_json(self) -> bytes:
        return msgspec.json.encode(self) + b"\n"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def content(self) -> dict[str, tuple[int, str]]:
        """What makes versions the same: path -> mode and digest."""
        return {file.path: (file.mode, file.sha256) for file in self.files}

    def extents(self, file: File) -> Iterator[tuple[int, int, tuple[Stored, ...]]]:
        """Offset, size and chain of each piece of a file."""
        for number, chain in enumerate(file.pieces):
            offset = number * self.piece_bytes
            yield offset, min(self.piece_bytes, file.size - offset), chain


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One version in an index."""

    version: _Version
    #: SHA-256 of its manifest.
    manifest: Digest
    #: Of its manifest.
    bytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_MANIFEST_BYTES)]


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The versions of a model in a store, lowest first."""

    format: int
    model: _Name
    versions: Annotated[tuple[Entry, ...], msgspec.Meta(max_length=10_000)]

    def to_json(self) -> bytes:
        return msgspec.json.encode(self) + b"\n"


_MANIFEST = Reader(VersionManifest, FORMAT, _REMEDY)
_INDEX = Reader(Index, FORMAT, _REMEDY)


def read_manifest(data: bytes, where: str, model: str, version: int) -> VersionManifest:
    """Read and check a manifest.

    Args:
        where: what it is called in messages.
        model, version: what it must be of.

    Raises:
        DataLoss: it is damaged, or says what no manifest may say.
        FailedPrecondition: a newer Spikeless wrote it.
    """
    manifest = _MANIFEST.read(data, where)
    try:
        _check_owner(manifest.model, model)
        if manifest.version != version:
            raise ValueError(f"it is of version {manifest.version}")
        _check_paths([file.path for file in manifest.files])
        for file in manifest.files:
            _check_file(manifest, file)
    except ValueError as error:
        raise DataLoss(f"{where} cannot be used: {error}; {_REMEDY}") from None
    return manifest


def read_index(data: bytes, where: str, model: str) -> Index:
    """Read and check an index; raises as `read_manifest` does."""
    index = _INDEX.read(data, where)
    try:
        _check_owner(index.model, model)
        numbers = [entry.version for entry in index.versions]
        if numbers != sorted(set(numbers)):
            raise ValueError("its versions are not in order")
    except ValueError as error:
        raise DataLoss(f"{where} cannot be used: {error}; push a version again") from None
    return index


def _check_owner(found: str, model: str) -> None:
    if found != model:
        raise ValueError(f"it is of model {found!r}")


def _check_paths(paths: list[str]) -> None:
    folders: set[str] = set()
    for path in paths:
        parts = path.split("/")
        if (
            any(part in ("", ".", "..") for part in parts)
            or _CONTROL.search(path)
            or "\\" in path
            or any(len(part.encode()) > _MAX_NAME_BYTES for part in parts)
        ):
            raise ValueError(f"{path!r} is no path inside a version")
        folders |= {str(parent) for parent in PurePosixPath(path).parents}
    if len(set(paths)) != len(paths) or folders & set(paths):
        raise ValueError("it names a path twice")
    if SAVED_MODEL_FILE not in paths:
        raise ValueError(f"it has no {SAVED_MODEL_FILE}")


def _check_file(manifest: VersionManifest, file: File) -> None:
    if len(file.pieces) != -(-file.size // manifest.piece_bytes):
        raise ValueError(f"{file.path} has {file.size} bytes in {len(file.pieces)} pieces")
    if file.mode & ~_ALLOWED_MODE or file.mode & _READABLE != _READABLE:
        raise ValueError(f"{file.path} has mode {file.mode:o}")
    for chain in file.pieces:
        first, *rest = (stored.encoding for stored in chain)
        if first == "xor" or any(encoding != "xor" for encoding in rest):
            raise ValueError(f"a piece of {file.path} does not begin with a whole one")
