"""TensorProto as TensorFlow reads it: the same values, the same protos refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeless.errors import SpikelessError
from spikeless.formats.protos import tensor_pb2
from spikeless.formats.tensors import NUMPY_DTYPES, dtype_name, numpy_dtype, to_numpy

BYTES = st.binary(max_size=24)
INT32 = st.integers(-(2**31), 2**31 - 1)
FLOATS = st.floats(width=32, allow_nan=False)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "float_val": st.lists(FLOATS, max_size=8),
    "double_val": st.lists(st.floats(allow_nan=False), max_size=8),
    "int_val": st.lists(INT32, max_size=8),
    "string_val": st.lists(BYTES, max_size=8),
    "scomplex_val": st.lists(FLOATS, max_size=8),
    "dcomplex_val": st.lists(st.floats(allow_nan=False), max_size=8),
    "int64_val": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=8),
    "bool_val": st.lists(st.booleans(), max_size=8),
    "half_val": st.lists(st.integers(0, 0x7000), max_size=8),
    "uint32_val": st.lists(st.integers(0, 2**32 - 1), max_size=8),
    "uint64_val": st.lists(st.integers(0, 2**64 - 1), max_size=8),
}
DIMS = st.lists(st.integers(-1, 3), max_size=3)


@st.composite
def protos(draw: st.DrawFn, number: int) -> tensor_pb2.TensorProto:
    proto = tensor_pb2.TensorProto(dtype=number)
    for size in draw(DIMS):
        proto.tensor_shape.dim.add(size=size)
    proto.tensor_shape.unknown_rank = draw(st.booleans()) and draw(st.booleans())
    for field, values in FIELDS.items():
        getattr(proto, field).extend(draw(values))
    if draw(st.booleans()):
        size = numpy_dtype(number).itemsize
        count = draw(st.integers(0, 9))
        proto.tensor_content = draw(BYTES | st.binary(min_size=size * count, max_size=size * count))
    return proto


def tensorflow_reads(proto: tensor_pb2.TensorProto) -> Any:
    """An array, the bytes of a scalar string, or None where TensorFlow refuses."""
    try:
        return tf.io.parse_tensor(proto.SerializeToString(), tf.as_dtype(proto.dtype)).numpy()
    except tf.errors.InvalidArgumentError:
        return None


@pytest.mark.parametrize("number", sorted(NUMPY_DTYPES), ids=dtype_name)
@settings(max_examples=50)
@given(data=st.data())
def test_read_as_tensorflow_reads(number: int, data: st.DataObject) -> None:
    proto = data.draw(protos(number))
    expected = tensorflow_reads(proto)
    try:
        actual = to_numpy(proto)
    except SpikelessError:
        assert expected is None
        return
    assert expected is not None
    expected = np.asarray(expected, dtype=actual.dtype if actual.dtype.hasobject else None)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    if actual.dtype.hasobject:
        assert actual.tolist() == expected.tolist()
    else:
        assert actual.tobytes() == expected.tobytes()


@given(st.lists(BYTES, min_size=1, max_size=8))
def test_strings_in_content(values: list[bytes]) -> None:
    lengths = bytes(len(value) for value in values)
    proto = tensor_pb2.TensorProto(
        dtype=tf.string.as_datatype_enum, tensor_content=lengths + b"".join(values)
    )
    proto.tensor_shape.dim.add(size=len(values))
    assert to_numpy(proto).tolist() == values
    assert np.asarray(tensorflow_reads(proto)).tolist() == values
