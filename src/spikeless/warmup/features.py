"""Which features a signature parses out of the ``tf.Example`` messages that it takes.

In: a meta graph and one of its signatures. Out: the features by name, read from the
ParseExample operations that the signature's outputs depend on, in the graph and in the
functions that it calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spikeless.errors import InvalidArgument
from spikeless.formats.graph import Scope, needed
from spikeless.formats.protos import (
    attr_value_pb2,
    example_pb2,
    feature_pb2,
    meta_graph_pb2,
    node_def_pb2,
    types_pb2,
)
from spikeless.formats.savedmodel import Signature
from spikeless.formats.tensors import dtype_name, shape_of, shape_text

#: The list of a ``Feature`` that holds values of each type; other types cannot be
#: parsed from examples.
_LISTS = {
    types_pb2.DT_FLOAT: "float_list",
    types_pb2.DT_INT64: "int64_list",
    types_pb2.DT_STRING: "bytes_list",
}


@dataclass(frozen=True)
class FeatureSpec:
    """One feature that a signature parses."""

    name: str
    #: TensorFlow DataType number.
    dtype: int
    #: None for a feature of any length.
    shape: tuple[int | None, ...] | None
    #: An example without it is refused.
    required: bool

    @property
    def size(self) -> int | None:
        """How many values an example has to hold, or None where any number goes."""
        if self.shape is None:
            return None
        known = [dim for dim in self.shape if dim is not None]
        return math.prod(known) if len(known) == len(self.shape) else None

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} {shape_text(self.shape)}"


def parsed_features(meta_graph: meta_graph_pb2.MetaGraphDef, signature: Signature) -> dict[str, FeatureSpec]:
    """The features that ``signature`` parses, by name, as far as the graph tells."""
    features: dict[str, FeatureSpec] = {}
    tensors = [spec.tensor_name for spec in signature.outputs.values()]
    for scope, node in needed(meta_graph.graph_def, tensors):
        read = _READERS.get(node.op)
        if read is not None:
            features.update((feature.name, feature) for feature in read(scope, node))
    return dict(sorted(features.items()))


def check_example(example: example_pb2.Example, features: Mapping[str, FeatureSpec]) -> None:
    """Raise ``InvalidArgument`` where the model would refuse to parse ``example``."""
    for name, spec in features.items():
        feature = example.features.feature.get(name)
        kind = feature.WhichOneof("kind") if feature is not None else None
        if feature is None or kind is None:
            if spec.required:
                raise InvalidArgument(f"an example lacks feature {name!r}, {spec}")
            continue
        if kind != _LISTS[spec.dtype]:
            raise InvalidArgument(f"feature {name!r} is a {kind}, but the model parses {spec}")
        count = len(getattr(feature, kind).value)
        if spec.size is not None and count != spec.size:
            raise InvalidArgument(f"feature {name!r} has {count} values, but the model parses {spec}")


def to_feature(dtype: int, values: np.ndarray[Any, Any]) -> feature_pb2.Feature:
    """The values as a feature of the given type."""
    feature = feature_pb2.Feature()
    getattr(feature, _LISTS[dtype]).value.extend(values.reshape(-1).tolist())
    return feature


def _strings(scope: Scope, tensors: Sequence[str]) -> list[str]:
    """Constant strings, from a vector or from one scalar each."""
    values = [value for tensor in tensors if (value := scope.constant(tensor)) is not None]
    return [key.decode("utf-8", "replace") for value in values for key in value.reshape(-1).tolist()]


def _parse_example_v2(scope: Scope, node: node_def_pb2.NodeDef) -> Iterator[FeatureSpec]:
    """Inputs: serialized, names, sparse, dense and ragged keys, then dense defaults."""
    _, _, sparse_keys, dense_keys, _, *defaults = node.input
    yield from _sparse(_strings(scope, [sparse_keys]), node.attr["sparse_types"])
    yield from _dense(scope, _strings(scope, [dense_keys]), node, defaults)


def _parse_example(scope: Scope, node: node_def_pb2.NodeDef) -> Iterator[FeatureSpec]:
    """Inputs: serialized, names, sparse keys, dense keys, defaults: one tensor each."""
    sparse, dense = node.attr["Nsparse"].i, node.attr["Ndense"].i
    inputs = list(node.input)[2:]
    yield from _sparse(_strings(scope, inputs[:sparse]), node.attr["sparse_types"])
    keys = _strings(scope, inputs[sparse : sparse + dense])
    yield from _dense(scope, keys, node, inputs[sparse + dense : sparse + 2 * dense])


def _parse_single_example(scope: Scope, node: node_def_pb2.NodeDef) -> Iterator[FeatureSpec]:
    """Keys are attributes; inputs: serialized, a default per dense key."""
    yield from _sparse(_keys(node.attr["sparse_keys"]), node.attr["sparse_types"])
    yield from _dense(scope, _keys(node.attr["dense_keys"]), node, list(node.input)[1:])


def _keys(value: attr_value_pb2.AttrValue) -> list[str]:
    return [key.decode("utf-8", "replace") for key in value.list.s]


def _sparse(keys: list[str], types: attr_value_pb2.AttrValue) -> Iterator[FeatureSpec]:
    for key, dtype in zip(keys, types.list.type, strict=False):
        yield FeatureSpec(key, dtype, shape=None, required=False)


def _dense(
    scope: Scope, keys: list[str], node: node_def_pb2.NodeDef, defaults: Sequence[str]
) -> Iterator[FeatureSpec]:
    """Dense features; an empty default means that there is none."""
    types, shapes = node.attr["Tdense"].list.type, node.attr["dense_shapes"].list.shape
    for key, dtype, shape, default in zip(keys, types, shapes, defaults, strict=False):
        value = scope.constant(default)
        dims = shape_of(shape)
        variable = dims is None or None in dims
        required = value is not None and value.size == 0 and not variable
        yield FeatureSpec(key, dtype, dims, required)


_READERS = {
    "ParseExampleV2": _parse_example_v2,
    "ParseExample": _parse_example,
    "ParseSingleExample": _parse_single_example,
}
