"""TensorProto to NumPy and back: both encodings, every dtype, and what is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import hypothesis.extra.numpy as arrays
import ml_dtypes
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from spikeless.errors import InvalidArgument, SpikelessError, Unimplemented
from spikeless.formats import wire
from spikeless.formats.protos import tensor_pb2, types_pb2
from spikeless.formats.tensors import NUMPY_DTYPES, dtype_name, to_numpy, to_proto

NUMERIC = {number: dtype for number, dtype in NUMPY_DTYPES.items() if dtype != np.dtype(object)}


def same(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> bool:
    """Equal shape, dtype and bits (so that NaN equals itself)."""
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


@pytest.mark.parametrize("as_field", [False, True])
@pytest.mark.parametrize("number", sorted(NUMERIC), ids=dtype_name)
@given(data=st.data())
def test_numbers_round_trip(number: int, as_field: bool, data: st.DataObject) -> None:
    dtype = NUMERIC[number]
    shape = data.draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    if dtype == np.bool_:
        values = data.draw(arrays.arrays(dtype, shape))
    else:
        bits = data.draw(arrays.arrays(np.uint8, (*shape, dtype.itemsize)))
        values = np.ascontiguousarray(bits).view(dtype).reshape(shape)
    if as_field and dtype.kind in "fc":
        # The typed fields are numbers to Python, which does not keep a NaN's payload.
        values = np.where(np.isnan(values), dtype.type(0), values).astype(dtype)
    proto = tensor_pb2.TensorProto.FromString(to_proto(values, as_field=as_field).SerializeToString())
    assert proto.dtype == number
    assert same(to_numpy(proto), values)


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_strings_round_trip(values: list[bytes]) -> None:
    array = np.array(values, dtype=object)
    assert to_numpy(to_proto(array)).tolist() == values


def test_text_becomes_utf8() -> None:
    assert to_numpy(to_proto(np.array(["毛刺"]))).tolist() == ["毛刺".encode()]


@pytest.mark.parametrize(
    ("field", "number", "value"),
    [
        ("float_val", types_pb2.DT_FLOAT, 1.5),
        ("double_val", types_pb2.DT_DOUBLE, 1.5),
        ("int_val", types_pb2.DT_INT32, -3),
        ("int_val", types_pb2.DT_UINT8, 200),
        ("int64_val", types_pb2.DT_INT64, 1 << 40),
        ("bool_val", types_pb2.DT_BOOL, True),
        ("uint64_val", types_pb2.DT_UINT64, 1 << 63),
    ],
)
def test_the_last_value_repeats(field: str, number: int, value: Any) -> None:
    proto = tensor_pb2.TensorProto(dtype=number)
    proto.tensor_shape.dim.add(size=2)
    proto.tensor_shape.dim.add(size=3)
    getattr(proto, field).append(value)
    assert to_numpy(proto).tolist() == [[value] * 3] * 2


def test_no_value_at_all_means_zeros() -> None:
    proto = tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT)
    proto.tensor_shape.dim.add(size=2)
    assert to_numpy(proto).tolist() == [0.0, 0.0]
    proto.dtype = types_pb2.DT_STRING
    assert to_numpy(proto).tolist() == [b"", b""]


def test_half_and_bfloat16_keep_their_bits_in_half_val() -> None:
    for dtype in (np.float16, ml_dtypes.bfloat16):
        proto = to_proto(np.array([1.5], dtype=dtype), as_field=True)
        assert list(proto.half_val) == [int(np.array(1.5, dtype=dtype).view(np.uint16))]


def tensor(dims: list[int], **fields: Any) -> tensor_pb2.TensorProto:
    proto = tensor_pb2.TensorProto(**{"dtype": types_pb2.DT_FLOAT, **fields})
    for size in dims:
        proto.tensor_shape.dim.add(size=size)
    return proto


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (tensor([-1]), "not fully known"),
        (tensor([1 << 40, 1 << 40]), "too many elements"),
        (tensor([0, 1 << 40, 1 << 40]), "too many elements"),
        (tensor([1] * 33), "33 dimensions"),
        (tensor([1 << 30], float_val=[1.0]), "send them all"),
        (tensor([2], tensor_content=b"1234567"), "tensor_content has 7 bytes"),
        (tensor([1], dtype=types_pb2.DT_STRING, tensor_content=b"x"), "add up to 120"),
        (tensor([2], dtype=types_pb2.DT_STRING, tensor_content=b"\0"), "lengths of 2 strings"),
    ],
)
def test_what_does_not_fit_is_refused(proto: tensor_pb2.TensorProto, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        to_numpy(proto)


@pytest.mark.parametrize("number", [types_pb2.DT_RESOURCE, types_pb2.DT_VARIANT, types_pb2.DT_QINT8, 0, 999])
def test_types_without_a_counterpart_are_refused(number: int) -> None:
    with pytest.raises(Unimplemented, match="DT_"):
        to_numpy(tensor([1], dtype=number))


def test_strings_before_the_numbers_mean_nothing_but_are_not_many() -> None:
    """They are walked over: millions would hold all other requests up."""
    few = tensor([1], dtype=types_pb2.DT_COMPLEX64, scomplex_val=[1, 2], string_val=[b""] * 100)
    assert to_numpy(few).tolist() == [1 + 2j]
    many = tensor([1], string_val=[b""] * (wire.MAX_FIELDS + 1))
    with pytest.raises(InvalidArgument, match="too many fields"):
        to_numpy(many)


@given(st.binary(max_size=200))
def test_any_message_gives_an_array_or_a_clear_error(content: bytes) -> None:
    proto = tensor_pb2.TensorProto()
    try:
        proto.ParseFromString(content)
    except DecodeError:
        return
    with contextlib.suppress(SpikelessError, MemoryError):
        to_numpy(proto)


@pytest.mark.parametrize("values", [(), (1.5, 2.0)])
def test_the_number_of_a_field_in_another_encoding_is_not_the_field(values: tuple[float, ...]) -> None:
    proto = tensor_pb2.TensorProto(dtype=types_pb2.DT_COMPLEX64, scomplex_val=values)
    varint = bytes([9 << 3 | 0, 0x9B, 0x25])
    parsed = tensor_pb2.TensorProto.FromString(proto.SerializeToString() + varint)
    assert to_numpy(parsed) == (complex(*values) if values else 0)
