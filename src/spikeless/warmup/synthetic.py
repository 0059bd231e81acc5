"""Requests from a signature alone, for models that come without samples.

In: a signature, and a size for each unknown dimension after the batch. Out: one request
of batch size 1, always the same: floats count 0, 0.1 ... 0.9, integers are 1 (which any
vocabulary has, and no divisor or length fails on), booleans true, strings ``1``. A
string input that the model parses as ``tf.Example`` gets one with all its features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from spikeless.errors import InvalidArgument
from spikeless.formats.kinds import PREDICT
from spikeless.formats.protos import example_pb2, input_pb2, prediction_log_pb2, types_pb2
from spikeless.formats.savedmodel import Signature, TensorSpec
from spikeless.formats.tensors import numpy_dtype, shape_text
from spikeless.warmup.features import FeatureSpec, to_feature
from spikeless.warmup.requests import Servable, Target, WarmupRequest, at, predict, with_examples

#: Input alias -> sizes of its unknown dimensions after the batch, in order. None is for
#: all other inputs, with one size for all of their unknown dimensions.
Dims = Mapping[str | None, tuple[int, ...]]

_Array = np.ndarray[Any, Any]


def request(servable: Servable, target: Target, dims: Dims) -> WarmupRequest:
    """One request for ``target``.

    Raises:
        InvalidArgument: an unknown dimension has no size in ``dims``; names the input
            and the remedy.
        Unimplemented: an input has a type that no request can hold.
    """
    source = f"{target} without samples"
    with at(source):
        return WarmupRequest(source, _log(servable, target, dims))


def _log(servable: Servable, target: Target, dims: Dims) -> prediction_log_pb2.PredictionLog:
    features: dict[str, FeatureSpec] = {}
    for key in target.keys:
        features.update(servable.features(key))
    example = example_pb2.Example()
    for name, feature in features.items():
        shape = [1 if dim is None else dim for dim in feature.shape or (1,)]
        example.features.feature[name].CopyFrom(to_feature(feature.dtype, values(feature.dtype, shape)))
    signature = servable.signature(target.keys[0])
    if target.kind != PREDICT or (features and _takes_one_string(signature)):
        examples = input_pb2.Input(example_list=input_pb2.ExampleList(examples=[example]))
        return with_examples(servable, target, examples)
    specs = signature.inputs.values()
    return predict(signature.key, {spec.alias: values(spec.dtype, _shape(spec, dims)) for spec in specs})


def _takes_one_string(signature: Signature) -> bool:
    inputs = [(spec.dtype, len(spec.shape or ())) for spec in signature.inputs.values()]
    return inputs == [(types_pb2.DT_STRING, 1)]


def values(dtype: int, shape: list[int]) -> _Array:
    """The generated value of this type and shape."""
    if dtype == types_pb2.DT_STRING:
        return np.full(shape, b"1", dtype=object)
    numpy = numpy_dtype(dtype)
    if numpy.kind in "iub":
        return np.ones(shape, dtype=numpy)
    return np.resize(np.arange(10) / 10, shape).astype(numpy)


def _shape(spec: TensorSpec, dims: Dims) -> list[int]:
    """The input's shape: batch size 1, other unknown dimensions from ``dims``."""
    sizes = dims.get(spec.alias)
    if spec.shape is None:
        if sizes is None:
            raise _lacking(spec, "SIZE,...")
        return [1, *sizes]
    unknown = sum(dim is None for dim in spec.shape[1:])
    if sizes is None:
        sizes = dims.get(None, ()) * unknown
    if unknown and len(sizes) != unknown:
        raise _lacking(spec, ",".join(["SIZE"] * unknown))
    rest = iter(sizes)
    return [(1 if axis == 0 else next(rest)) if dim is None else dim for axis, dim in enumerate(spec.shape)]


def _lacking(spec: TensorSpec, sizes: str) -> InvalidArgument:
    return InvalidArgument(
        f"input {spec.alias!r} has shape {shape_text(spec.shape)}: say how large it is behind the batch, as "
        f"in --dim {spec.alias}={sizes}, or give samples"
    )
