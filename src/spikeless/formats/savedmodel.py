"""Read SavedModels as protocol messages, without building a graph.

In: a directory with ``saved_model.pb``. Out: its meta graphs and signatures.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from spikeless.errors import InvalidArgument, NotFound
from spikeless.formats.protos import meta_graph_pb2, saved_model_pb2
from spikeless.formats.tensors import dtype_name, shape_of, shape_text

SAVED_MODEL_FILE = "saved_model.pb"
VARIABLES_DIRECTORY = "variables"
ASSETS_DIRECTORY = "assets"
EXTRA_DIRECTORY = "assets.extra"
SERVE_TAGS = frozenset({"serve"})
#: What callers that name no signature get, in TensorFlow and in TensorFlow Serving.
DEFAULT_SIGNATURE = "serving_default"
#: A signature of TF2 exports that only initialises; it is never served.
INIT_SIGNATURE = "__saved_model_init_op"

PREDICT_METHOD = "tensorflow/serving/predict"
CLASSIFY_METHOD = "tensorflow/serving/classify"
REGRESS_METHOD = "tensorflow/serving/regress"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a signature."""

    #: The alias that callers use.
    alias: str
    #: The tensor's name in the graph, such as ``serving_default_x:0``.
    tensor_name: str
    #: TensorFlow DataType number.
    dtype: int
    #: None for an unknown rank; None inside for an unknown dimension.
    shape: tuple[int | None, ...] | None

    def allows(self, shape: tuple[int | None, ...] | None) -> bool:
        """Whether whatever has this shape has one that fits."""
        if self.shape is None or shape is None:
            return self.shape is None
        return len(self.shape) == len(shape) and all(
            wanted is None or wanted == size for wanted, size in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.alias}: {dtype_name(self.dtype)} {shape_text(self.shape)}"


@dataclass(frozen=True)
class Signature:
    """A named entry point of a model: method name, inputs and outputs by alias."""

    key: str
    method_name: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]


@dataclass(frozen=True)
class SavedModel:
    """A SavedModel as read from disk."""

    path: Path
    proto: saved_model_pb2.SavedModel

    def meta_graph(self, tags: Collection[str] = SERVE_TAGS) -> meta_graph_pb2.MetaGraphDef:
        """The meta graph with exactly these tags; ``NotFound`` lists all others."""
        for meta_graph in self.proto.meta_graphs:
            if set(meta_graph.meta_info_def.tags) == set(tags):
                return meta_graph
        have = "; ".join(",".join(sorted(graph.meta_info_def.tags)) for graph in self.proto.meta_graphs)
        raise NotFound(
            f"{self.path}: no meta graph is tagged {','.join(sorted(tags))}; there is: {have or 'none'}"
        )

    def signatures(self, tags: Collection[str] = SERVE_TAGS) -> dict[str, Signature]:
        """The signatures by key, in key order, without the initialiser."""
        return signatures_of(self.meta_graph(tags))


def read(path: str | os.PathLike[str]) -> SavedModel:
    """Read ``saved_model.pb`` in the directory ``path``.

    Raises:
        NotFound: the directory or the file is not there.
        InvalidArgument: the file is not a SavedModel.
    """
    directory = Path(path)
    file = directory / SAVED_MODEL_FILE
    if not file.is_file():
        if directory.is_dir():
            what = "is no SavedModel: it has no saved_model.pb"
        else:
            what = "is a file, not a SavedModel" if directory.exists() else "does not exist"
        raise NotFound(f"{directory} {what}; give the folder that an export wrote")
    proto = saved_model_pb2.SavedModel()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise InvalidArgument(f"{file} cannot be read as a SavedModel ({error}); export it again") from None
    if not proto.meta_graphs:
        raise InvalidArgument(f"{file} holds no meta graph; export the model again")
    return SavedModel(directory, proto)


def signatures_of(meta_graph: meta_graph_pb2.MetaGraphDef) -> dict[str, Signature]:
    """The signatures of a meta graph by key, in key order, without the initialiser."""
    return {
        key: Signature(
            key=key,
            method_name=definition.method_name,
            inputs=_specs(definition.inputs),
            outputs=_specs(definition.outputs),
        )
        for key, definition in sorted(meta_graph.signature_def.items())
        if key != INIT_SIGNATURE
    }


def _specs(infos: Mapping[str, meta_graph_pb2.TensorInfo]) -> dict[str, TensorSpec]:
    return {
        alias: TensorSpec(alias, info.name, info.dtype, shape_of(info.tensor_shape))
        for alias, info in sorted(infos.items())
    }
