"""What ``spikeless map`` writes about its result: ``assets.extra/spikeless.json``.

In: a mapped SavedModel. Out: its files with sizes and digests, its variables and what
became of each, and the check that a server which sees the version at a given path will
find every file there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from spikeless.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from spikeless.formats import savedmodel
from spikeless.formats.graph import all_nodes, attribute
from spikeless.formats.protos import node_def_pb2, saved_model_pb2
from spikeless.mapping.plan import VariableState
from spikeless.mapping.rewrite import FILE_ATTRIBUTE, MAPPED_OPERATION

MANIFEST_FILE = "spikeless.json"
#: Changes when a reader of the old form would misread the new one.
FORMAT = 1
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class FileRecord:
    """One file of the model's checkpoint."""

    #: Relative to the SavedModel, with ``/``.
    path: str
    size: int
    sha256: str
    #: Whether the graph maps it.
    mapped: bool


@dataclass(frozen=True)
class VariableRecord:
    """One variable of one meta graph."""

    tags: tuple[str, ...]
    name: str
    #: As in ``DT_FLOAT``.
    dtype: str
    #: None if it is not known from the file.
    shape: tuple[int, ...] | None
    #: Bytes in the checkpoint; None if it is not from there.
    bytes: int | None
    state: VariableState
    #: Why it is not mapped.
    reason: str
    #: The mapped file, relative to the SavedModel.
    file: str | None = None
    #: Whether nothing ever reads more of it than single rows, as of an embedding.
    by_row: bool = False


@dataclass(frozen=True)
class Manifest:
    """What was done to a SavedModel."""

    #: Version of this package.
    tool: str
    #: The SavedModel that was mapped, as given.
    source: str
    #: Digest of its ``saved_model.pb``.
    source_sha256: str
    min_bytes: int
    #: Whether the graph was optimised too.
    optimized: bool
    files: tuple[FileRecord, ...]
    variables: tuple[VariableRecord, ...]
    #: Requests to which original and mapped model gave the same answers; 0: they were
    #: not compared.
    compared: int = 0

    def to_json(self) -> str:
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(content, indent=2, ensure_ascii=False, default=lambda state: state.value) + "\n"

    def mapped_files(self) -> list[FileRecord]:
        return [file for file in self.files if file.mapped]

    def files_read_by_row(self) -> list[str]:
        """The mapped files that are read by row, relative to the SavedModel."""
        whole = {variable.file for variable in self.variables if not variable.by_row}
        return [file.path for file in self.mapped_files() if file.path not in whole]


def manifest_path(saved_model: str | os.PathLike[str]) -> Path:
    return Path(saved_model) / savedmodel.EXTRA_DIRECTORY / MANIFEST_FILE


def is_mapped(saved_model: str | os.PathLike[str]) -> bool:
    """Whether ``spikeless map`` wrote this SavedModel."""
    return manifest_path(saved_model).is_file()


def read_manifest(saved_model: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of a mapped SavedModel.

    Raises:
        NotFound: it has none: it is not mapped.
        DataLoss: it is damaged, or of a later format.
    """
    path = manifest_path(saved_model)
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("a later version of this tool wrote it")
        content["files"] = tuple(FileRecord(**file) for file in content["files"])
        content["variables"] = tuple(
            VariableRecord(
                **{
                    **variable,
                    "tags": tuple(variable["tags"]),
                    "shape": None if variable["shape"] is None else tuple(variable["shape"]),
                    "state": VariableState(variable["state"]),
                }
            )
            for variable in content["variables"]
        )
        manifest = Manifest(**content)
        _check_paths(manifest)
        return manifest
    except FileNotFoundError:
        raise NotFound(f"{saved_model} is not mapped: it has no {path.name}; run `spikeless map`") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataLoss(f"{path} cannot be read ({error}); map the model again") from error


def _check_paths(manifest: Manifest) -> None:
    """Every file is one inside the SavedModel, and has a size."""
    for file in manifest.files:
        path = PurePosixPath(file.path)
        if path.is_absolute() or ".." in path.parts or not isinstance(file.size, int):
            raise ValueError(f"{file.path!r} is no file of it, or has no size")
    known = {None, *(file.path for file in manifest.files)}
    for variable in manifest.variables:
        if variable.file not in known:
            raise ValueError(f"{variable.file!r} is no file of it")


def mapping_nodes(proto: saved_model_pb2.SavedModel) -> Iterator[node_def_pb2.NodeDef]:
    """The operations that map a file, in the main graphs and their functions."""
    for meta_graph in proto.meta_graphs:
        yield from (node for node in all_nodes(meta_graph.graph_def) if node.op == MAPPED_OPERATION)


def mapped_path(node: node_def_pb2.NodeDef) -> str:
    """The file that an operation maps."""
    return str(attribute(node, FILE_ATTRIBUTE).s.decode("utf-8", "surrogateescape"))


def pinned_path(serving_root: str, file: str) -> str:
    """Where a server that sees the version at ``serving_root`` finds a file of it."""
    return str(PurePosixPath(serving_root) / file)


def check(saved_model: str | os.PathLike[str], serving_root: str, *, digests: bool = True) -> Manifest:
    """Check that a server which sees the model at ``serving_root`` can load it.

    Args:
        saved_model: the SavedModel, here.
        serving_root: the absolute path of the same folder on the server.
        digests: also read every file and compare its SHA-256.

    Raises:
        NotFound: a file is missing.
        DataLoss: a file is too short or too long, or its content has changed.
        FailedPrecondition: the graph names a file at another path.
    """
    manifest = read_manifest(saved_model)
    check_files(saved_model, manifest, digests=digests)
    expected = {pinned_path(serving_root, record.path) for record in manifest.mapped_files()}
    actual = {mapped_path(node) for node in mapping_nodes(savedmodel.read(saved_model).proto)}
    for path in sorted(actual - expected):
        raise FailedPrecondition(
            f"{saved_model} maps {path}, which a server that sees the model at {serving_root} does not have; "
            f"run `spikeless map --repin {saved_model} --serving-root {serving_root}`"
        )
    for path in sorted(expected - actual):
        raise FailedPrecondition(f"{saved_model}: the graph does not map {path}; map the model again")
    return manifest


def check_files(saved_model: str | os.PathLike[str], manifest: Manifest, *, digests: bool = True) -> None:
    """Check that the files are those that were written; raises as ``check`` does."""
    for record in manifest.files:
        path = Path(saved_model) / record.path
        if not path.is_file():
            raise NotFound(f"{path} is missing; map the model again")
        size = path.stat().st_size
        if size != record.size:
            raise DataLoss(f"{path} has {size} bytes instead of {record.size}; map the model again")
        if digests and sha256(path) != record.sha256:
            raise DataLoss(f"{path} has changed since it was mapped; map the model again")


def here(path: Path) -> str:
    """The absolute path of something on this machine, without ``..``."""
    return str(path.resolve() if ".." in path.parts else path.absolute())


def absolute(serving_root: str) -> str:
    """The root as it goes into paths; it must be absolute and plain."""
    root = PurePosixPath(serving_root)
    if not root.is_absolute() or ".." in root.parts:
        raise InvalidArgument(f"--serving-root {serving_root!r} must be an absolute path without '..'")
    return str(root)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
