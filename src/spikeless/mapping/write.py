"""Write a mapped SavedModel, pin it to another path, and inspect its variables."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spikeless import __version__
from spikeless.disk import atomic
from spikeless.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from spikeless.formats import checkpoint, savedmodel, session_overrides
from spikeless.formats.checkpoint import Checkpoint, DataFile, Pieces
from spikeless.formats.protos import meta_graph_pb2, saved_model_pb2
from spikeless.formats.savedmodel import VARIABLES_DIRECTORY, SavedModel
from spikeless.formats.tensors import dtype_name
from spikeless.mapping import manifest as manifests
from spikeless.mapping import rewrite
from spikeless.mapping.compare import verify
from spikeless.mapping.manifest import FileRecord, Manifest, VariableRecord
from spikeless.mapping.optimize import optimize
from spikeless.mapping.plan import MappingPlan, VariableState, plan_variables
from spikeless.mapping.rewrite import FILE_ATTRIBUTE

DEFAULT_MIN_BYTES = 1 << 20
#: A constant of fewer bytes is evaluated by TensorFlow's graph optimiser when a model
#: is loaded, so that its variable gets a copy after all (``kMaxConstantSize`` in
#: ``grappler/optimizers/constant_folding.cc``).
COPIED_BYTES = 100 << 10
_VARIABLES_PREFIX = "variables/variables"
#: Graphs for devices that do not compute in the host's memory.
_DEVICE_TAGS = frozenset({"gpu", "tpu"})


@dataclass(frozen=True)
class MapSettings:
    """How to map a SavedModel."""

    #: Variables of fewer bytes are restored as before.
    min_bytes: int = DEFAULT_MIN_BYTES
    #: The absolute path at which the server sees the result, such as ``/models/ctr/3``;
    #: None: where it is here.
    serving_root: str | None = None
    #: Compare the outputs of original and mapped model; needs the memory to load the
    #: original.
    verify: bool = True
    #: Optimise the graph now, and ask the server not to do so again
    #: (`spikeless.mapping.optimize`).
    optimize: bool = False
    #: Warmup records to compare on; None: those of the model, or generated inputs.
    records: Path | None = None

    def __post_init__(self) -> None:
        if self.min_bytes < 1:
            raise InvalidArgument(
                f"min_bytes is {self.min_bytes}; an empty file cannot be mapped: give 1 or more"
            )


def map_saved_model(
    source: str | os.PathLike[str], out: str | os.PathLike[str], settings: MapSettings | None = None
) -> Manifest:
    """Write a mapped copy of the SavedModel ``source`` to ``out``.

    It appears there whole or not at all, synced to disk. ``source`` is not changed.

    Raises:
        AlreadyExists: there is something at ``out``. ResourceExhausted,
        FailedPrecondition: the file system has no room, or does not allow it.
        SpikelessError: what ``write_mapped`` raises.
    """
    source, out = Path(source), Path(out)
    if out.exists() or out.is_symlink():
        raise AlreadyExists(f"{out} exists already; give a new folder")
    settings = settings or MapSettings()
    if settings.serving_root is None:
        settings = dataclasses.replace(settings, serving_root=manifests.here(out))
    with atomic.reported_errors(f"map {source} to {out}"):
        # Not where publishers stage theirs: ``out`` may be beside versions.
        with atomic.staging(out.absolute().parent / ".spikeless" / "mapping") as staging:
            manifest = write_mapped(source, staging / "model", settings)
            atomic.make_readable(staging / "model")
            os.rename(staging / "model", out)
        atomic.sync(out.absolute().parent)
    return manifest


def write_mapped(
    source: str | os.PathLike[str], target: str | os.PathLike[str], settings: MapSettings
) -> Manifest:
    """Write a mapped copy of ``source`` to the new folder ``target``, without staging.

    ``target`` may be half-written when this raises. Everything in it is synced to disk
    when it returns.

    Raises:
        NotFound, InvalidArgument, DataLoss, Unimplemented: ``source`` is no SavedModel
        that can be read.
        FailedPrecondition: ``source`` is mapped already, or the result does not answer
            as ``source`` does.
    """
    source, target = Path(source), Path(target)
    serving_root = manifests.absolute(settings.serving_root or manifests.here(target))
    if manifests.is_mapped(source):
        raise FailedPrecondition(
            f"{source} is mapped already; map the original, or move this one with --repin"
        )
    model = savedmodel.read(source)
    plans = plan_all(model, settings.min_bytes)
    digest = manifests.sha256(source / savedmodel.SAVED_MODEL_FILE)
    target.mkdir()
    _copy_rest(source, target)
    written = _write_checkpoint(source, target, plans)
    paths = {pieces: str(file.path) for pieces, file in written.items()}
    for plan in plans:
        rewrite.apply(plan, paths)
        if settings.optimize:
            optimize(plan.meta_graph)
    _pin(model.proto, manifests.here(target))
    (target / savedmodel.SAVED_MODEL_FILE).write_bytes(model.proto.SerializeToString())
    if settings.optimize:
        session_overrides.disable_optimizer(target)
    compared = 0
    if settings.verify:
        for plan in plans:
            compared += verify(source, target, plan.meta_graph.meta_info_def.tags, settings.records)
    manifest = Manifest(
        tool=f"spikeless {__version__}",
        source=str(source),
        source_sha256=digest,
        min_bytes=settings.min_bytes,
        optimized=settings.optimize,
        files=tuple(_file_records(target, written)),
        variables=tuple(_variable_records(target, plans, written)),
        compared=compared,
    )
    _pin(model.proto, serving_root)
    (target / savedmodel.SAVED_MODEL_FILE).write_bytes(model.proto.SerializeToString())
    extra = target / savedmodel.EXTRA_DIRECTORY
    extra.mkdir(exist_ok=True)
    (extra / manifests.MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    atomic.sync_tree(target)
    return manifest


def map_in_place(saved_model: Path, settings: MapSettings | None = None) -> Manifest:
    """Replace a staged SavedModel by its mapped copy; raises as ``write_mapped``."""
    mapped = saved_model.with_name(f"{saved_model.name}-mapped")
    settings = dataclasses.replace(settings or MapSettings(), serving_root=manifests.here(saved_model))
    manifest = write_mapped(saved_model, mapped, settings)
    shutil.rmtree(saved_model)
    mapped.rename(saved_model)
    return manifest


def repin(
    saved_model: str | os.PathLike[str], serving_root: str | None = None, *, digests: bool = True
) -> Manifest:
    """Let a mapped SavedModel that was moved name its files where they are now.

    Only the graph is written, whole or not at all; a server that has loaded the model
    does not notice.

    Args:
        saved_model: a SavedModel that ``spikeless map`` wrote.
        serving_root: the absolute path at which the server sees it; None: where it is
            here.
        digests: first compare the content of every file, not only its size.

    Raises:
        NotFound, DataLoss: it is not mapped, or one of its files is missing, cut short
        or changed. ResourceExhausted, FailedPrecondition: the file system has no room,
        or does not allow it.
    """
    saved_model = Path(saved_model)
    manifest = manifests.read_manifest(saved_model)
    root = manifests.absolute(serving_root or manifests.here(saved_model))
    manifests.check_files(saved_model, manifest, digests=digests)
    proto = savedmodel.read(saved_model).proto
    _pin(proto, root)
    with atomic.reported_errors(f"repin {saved_model}"):
        atomic.write_atomically(saved_model / savedmodel.SAVED_MODEL_FILE, proto.SerializeToString())
    return manifests.check(saved_model, root, digests=False)


def pinned_graph(saved_model: str | os.PathLike[str], serving_root: str) -> bytes:
    """The ``saved_model.pb`` of a mapped SavedModel as `repin` would write it.

    The same for all copies of a SavedModel, wherever their files are.

    Raises:
        NotFound, DataLoss: it is no SavedModel that can be read.
    """
    proto = savedmodel.read(saved_model).proto
    _pin(proto, manifests.absolute(serving_root))
    return bytes(proto.SerializeToString(deterministic=True))


def inspect(
    saved_model: str | os.PathLike[str], min_bytes: int = DEFAULT_MIN_BYTES
) -> tuple[VariableRecord, ...]:
    """Every variable and what became of it, or would if the SavedModel were mapped."""
    path = Path(saved_model)
    if manifests.is_mapped(path):
        return manifests.read_manifest(path).variables
    plans = plan_all(savedmodel.read(path), min_bytes)
    return tuple(_variable_records(path, plans, {}))


def plan_all(model: SavedModel, min_bytes: int) -> list[MappingPlan]:
    """A plan for each meta graph that is served on CPUs; the others stay as they are.

    Raises:
        FailedPrecondition: there is no such graph, or nothing in it that a server could
            run.
    """
    graphs = [graph for graph in model.proto.meta_graphs if _is_served(graph)]
    if not graphs:
        tags = "; ".join(",".join(graph.meta_info_def.tags) for graph in model.proto.meta_graphs)
        raise FailedPrecondition(
            f"{model.path} has no meta graph for serving on CPUs, only those tagged {tags}"
        )
    if not all(map(savedmodel.signatures_of, graphs)):
        raise FailedPrecondition(f"{model.path} has no signature that a server could run; export it with one")
    source = _checkpoint(model.path)
    return [plan_variables(graph, source, min_bytes) for graph in graphs]


def _is_served(meta_graph: meta_graph_pb2.MetaGraphDef) -> bool:
    tags = set(meta_graph.meta_info_def.tags)
    return tags >= savedmodel.SERVE_TAGS and not tags & _DEVICE_TAGS


def _checkpoint(path: Path) -> Checkpoint | None:
    """The SavedModel's checkpoint; None for one without variables."""
    return Checkpoint.read(path / _VARIABLES_PREFIX) if (path / VARIABLES_DIRECTORY).is_dir() else None


def _copy_rest(source: Path, target: Path) -> None:
    """Copy what is neither graph nor checkpoint.

    Empty folders are left out: a server's load walks each folder.
    """
    for child in sorted(source.iterdir()):
        if child.name in (savedmodel.SAVED_MODEL_FILE, VARIABLES_DIRECTORY):
            continue
        if not child.is_dir():
            shutil.copyfile(child, target / child.name)
        elif any(child.iterdir()):
            atomic.copy_tree(child, target / child.name)


def _write_checkpoint(source: Path, target: Path, plans: Sequence[MappingPlan]) -> Mapping[Pieces, DataFile]:
    """Write the checkpoint; returns the file of each mapped variable.

    The file of everything else has the empty key.
    """
    original = _checkpoint(source)
    if original is None:
        return {}
    (target / VARIABLES_DIRECTORY).mkdir()
    pieces = {variable.pieces for plan in plans for variable in plan.mapped() if variable.pieces}
    written = checkpoint.rewrite(original, target / _VARIABLES_PREFIX, pieces)
    return {**written.apart, (): written.rest}


def _file_records(target: Path, written: Mapping[Pieces, DataFile]) -> Iterator[FileRecord]:
    mapped = {file.path: bool(pieces) for pieces, file in written.items()}
    for file in sorted({file.path: file for file in written.values()}.values(), key=lambda file: file.path):
        yield FileRecord(_relative(target, file), file.size, file.sha256, mapped[file.path])
    if written:
        index = checkpoint.index_file(target / _VARIABLES_PREFIX)
        relative = str(index.relative_to(target))
        yield FileRecord(relative, index.stat().st_size, manifests.sha256(index), mapped=False)


def _variable_records(
    target: Path, plans: Sequence[MappingPlan], written: Mapping[Pieces, DataFile]
) -> Iterator[VariableRecord]:
    for plan in plans:
        for variable in plan.variables:
            file = written.get(variable.pieces or ()) if variable.state is VariableState.MAPPED else None
            yield VariableRecord(
                tags=tuple(sorted(plan.meta_graph.meta_info_def.tags)),
                name=variable.name,
                dtype=dtype_name(variable.dtype),
                shape=variable.shape,
                bytes=variable.size,
                state=variable.state,
                reason=variable.reason,
                file=None if file is None else _relative(target, file),
                by_row=variable.by_row,
            )


def _relative(target: Path, file: DataFile) -> str:
    return file.path.relative_to(target).as_posix()


def _pin(proto: saved_model_pb2.SavedModel, root: str) -> None:
    """Let every mapping operation name its file in the version folder ``root``."""
    for node in manifests.mapping_nodes(proto):
        file = f"{VARIABLES_DIRECTORY}/{Path(manifests.mapped_path(node)).name}"
        node.attr[FILE_ATTRIBUTE].s = os.fsencode(manifests.pinned_path(root, file))
