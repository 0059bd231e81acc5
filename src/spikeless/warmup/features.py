"""Which features a signature parses out of the ``tf.Example`` messages that it takes.

In: a meta graph and one of its signatures. Out: the features by name, read from the ParseExample operations
that the signature's outputs depend on, in the graph and in the functions that it calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spikeless.errors import InvalidArgument
from spikeless.formats.protos import (
    attr_value_pb2,
    example_pb2,
    feature_pb2,
    meta_graph_pb2,
    node_def_pb2,
    types_pb2,
)
from spikeless.formats.savedmodel import Signature
from spikeless.formats.tensors import dtype_name, shape_of, shape_text, to_numpy

#: The list of a ``Feature`` that holds values of each type; other types cannot be parsed from examples.
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


@dataclass(frozen=True)
class _Scope:
    """The nodes of the graph or of one function, by name."""

    nodes: Mapping[str, node_def_pb2.NodeDef]

    def constant(self, tensor: str) -> np.ndarray[Any, Any] | None:
        """The value of a tensor, where that is a constant."""
        node = self.nodes.get(_node_name(tensor))
        if node is None or node.op != "Const":
            return None
        return to_numpy(node.attr["value"].tensor)

    def strings(self, tensors: Sequence[str]) -> list[str]:
        """Constant strings, from a vector or from one scalar each."""
        values = [self.constant(tensor) for tensor in tensors]
        return [
            key.decode("utf-8", "replace")
            for value in values
            if value is not None
            for key in value.reshape(-1).tolist()
        ]


def parsed_features(meta_graph: meta_graph_pb2.MetaGraphDef, signature: Signature) -> dict[str, FeatureSpec]:
    """The features that ``signature`` parses, by name; empty when it parses none, or none can be told."""
    features: dict[str, FeatureSpec] = {}
    for scope, node in _reachable(meta_graph, signature):
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


def _node_name(tensor: str) -> str:
    return tensor.removeprefix("^").split(":")[0]


def _reachable(
    meta_graph: meta_graph_pb2.MetaGraphDef, signature: Signature
) -> Iterator[tuple[_Scope, node_def_pb2.NodeDef]]:
    """Every node that the outputs depend on, and every node of the functions that those call."""
    graph = meta_graph.graph_def
    main = _Scope({node.name: node for node in graph.node})
    functions = {function.signature.name: function for function in graph.library.function}
    waiting = [_node_name(spec.tensor_name) for spec in signature.outputs.values()]
    seen: set[str] = set()
    called: list[str] = []
    while waiting:
        name = waiting.pop()
        if name in seen or name not in main.nodes:
            continue
        seen.add(name)
        node = main.nodes[name]
        yield main, node
        called.extend(_functions_of(node))
        waiting.extend(map(_node_name, node.input))
    entered: set[str] = set()
    while called:
        name = called.pop()
        if name in entered or name not in functions:
            continue
        entered.add(name)
        scope = _Scope({node.name: node for node in functions[name].node_def})
        for node in scope.nodes.values():
            yield scope, node
            called.extend(_functions_of(node))


def _functions_of(node: node_def_pb2.NodeDef) -> Iterator[str]:
    for value in node.attr.values():
        if value.HasField("func"):
            yield value.func.name
        yield from (function.name for function in value.list.func)


def _parse_example_v2(scope: _Scope, node: node_def_pb2.NodeDef) -> Iterator[FeatureSpec]:
    """Inputs: serialized, names, vectors of sparse, dense and ragged keys, then a default per dense key."""
    _, _, sparse_keys, dense_keys, _, *defaults = node.input
    yield from _sparse(scope.strings([sparse_keys]), node.attr["sparse_types"])
    yield from _dense(scope, scope.strings([dense_keys]), node, defaults)


def _parse_example(scope: _Scope, node: node_def_pb2.NodeDef) -> Iterator[FeatureSpec]:
    """Inputs: serialized, names, then sparse keys, dense keys and dense defaults, one tensor each."""
    sparse, dense = node.attr["Nsparse"].i, node.attr["Ndense"].i
    inputs = list(node.input)[2:]
    yield from _sparse(scope.strings(inputs[:sparse]), node.attr["sparse_types"])
    keys = scope.strings(inputs[sparse : sparse + dense])
    yield from _dense(scope, keys, node, inputs[sparse + dense : sparse + 2 * dense])


def _parse_single_example(scope: _Scope, node: node_def_pb2.NodeDef) -> Iterator[FeatureSpec]:
    """Keys are attributes; inputs: serialized, a default per dense key."""
    yield from _sparse(_keys(node.attr["sparse_keys"]), node.attr["sparse_types"])
    yield from _dense(scope, _keys(node.attr["dense_keys"]), node, list(node.input)[1:])


def _keys(value: attr_value_pb2.AttrValue) -> list[str]:
    return [key.decode("utf-8", "replace") for key in value.list.s]


def _sparse(keys: list[str], types: attr_value_pb2.AttrValue) -> Iterator[FeatureSpec]:
    for key, dtype in zip(keys, types.list.type, strict=False):
        yield FeatureSpec(key, dtype, shape=None, required=False)


def _dense(
    scope: _Scope, keys: list[str], node: node_def_pb2.NodeDef, defaults: Sequence[str]
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
