"""Between ``TensorProto`` and NumPy arrays, without TensorFlow.

Both encodings are read: ``tensor_content`` (the raw little-endian bytes) and the typed
repeated fields, where fewer values than elements means that the last one repeats and no
value at all means zeros (or empty strings), as documented in
``tensorflow/core/framework/tensor.proto``. Strings become object arrays of ``bytes``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from spikeless.errors import InvalidArgument, Unimplemented
from spikeless.formats import wire
from spikeless.formats.protos import tensor_pb2, tensor_shape_pb2, types_pb2

#: TensorFlow DataType number -> the NumPy type, and the typed field with its values.
#: Half and bfloat16 keep their bits in ``half_val``.
_TYPES: dict[int, tuple[type[Any], str]] = {
    types_pb2.DT_FLOAT: (np.float32, "float_val"),
    types_pb2.DT_DOUBLE: (np.float64, "double_val"),
    types_pb2.DT_INT32: (np.int32, "int_val"),
    types_pb2.DT_UINT8: (np.uint8, "int_val"),
    types_pb2.DT_INT16: (np.int16, "int_val"),
    types_pb2.DT_INT8: (np.int8, "int_val"),
    types_pb2.DT_STRING: (object, "string_val"),
    types_pb2.DT_COMPLEX64: (np.complex64, "scomplex_val"),
    types_pb2.DT_INT64: (np.int64, "int64_val"),
    types_pb2.DT_BOOL: (np.bool_, "bool_val"),
    types_pb2.DT_UINT16: (np.uint16, "int_val"),
    types_pb2.DT_COMPLEX128: (np.complex128, "dcomplex_val"),
    types_pb2.DT_HALF: (np.float16, "half_val"),
    types_pb2.DT_UINT32: (np.uint32, "uint32_val"),
    types_pb2.DT_UINT64: (np.uint64, "uint64_val"),
    types_pb2.DT_BFLOAT16: (ml_dtypes.bfloat16, "half_val"),
    types_pb2.DT_FLOAT8_E5M2: (ml_dtypes.float8_e5m2, "float8_val"),
    types_pb2.DT_FLOAT8_E4M3FN: (ml_dtypes.float8_e4m3fn, "float8_val"),
}
#: DataType number -> NumPy dtype (strings are object arrays of ``bytes``).
NUMPY_DTYPES: dict[int, np.dtype[Any]] = {number: np.dtype(kind) for number, (kind, _) in _TYPES.items()}
_DATA_TYPES: dict[object, int] = {dtype: number for number, dtype in NUMPY_DTYPES.items()}

#: Fields of floating point numbers -> their number in ``TensorProto`` and the NumPy
#: dtype of one of them. Their packed encoding is the array's own bytes.
_PACKED: dict[str, tuple[int, np.dtype[Any]]] = {
    "float_val": (5, np.dtype("<f4")),
    "double_val": (6, np.dtype("<f8")),
    "scomplex_val": (9, np.dtype("<f4")),
    "dcomplex_val": (12, np.dtype("<f8")),
}

#: More elements than this in one tensor are refused before anything is allocated.
MAX_ELEMENTS = 1 << 31
#: Bytes that the typed fields may be filled up to: a short message stands for no more
#: than a long one holds.
MAX_FILLED_BYTES = 256 << 20
#: More dimensions than NumPy has (before version 2); hardly any kernel takes more than
#: eight.
MAX_RANK = 32


def dtype_name(data_type: int) -> str:
    """``DT_FLOAT`` for 1, and so on; ``DT_<number>`` for an unknown type."""
    try:
        return str(types_pb2.DataType.Name(data_type))
    except ValueError:
        return f"DT_{data_type}"


def numpy_dtype(data_type: int) -> np.dtype[Any]:
    """The NumPy dtype of a DataType; ``Unimplemented`` where there is none."""
    try:
        return NUMPY_DTYPES[data_type]
    except KeyError:
        raise Unimplemented(f"tensors of type {dtype_name(data_type)} cannot be sent or returned") from None


def data_type(dtype: np.dtype[Any] | type) -> int:
    """The DataType of a NumPy dtype; byte and unicode strings are DT_STRING."""
    number = _DATA_TYPES.get(dtype)
    if number is not None:  # nearly always
        return number
    dtype = np.dtype(dtype)
    if dtype.kind in "SU":
        return int(types_pb2.DT_STRING)
    try:
        return _DATA_TYPES[dtype.newbyteorder("=")]
    except KeyError:
        raise InvalidArgument(f"there is no TensorFlow type for NumPy dtype {dtype}") from None


def shape_of(proto: tensor_shape_pb2.TensorShapeProto) -> tuple[int | None, ...] | None:
    """A shape with None for unknown dimensions; None for an unknown rank."""
    if proto.unknown_rank:
        return None
    return tuple(None if dim.size < 0 else int(dim.size) for dim in proto.dim)


def shape_text(shape: Sequence[int | None] | None) -> str:
    """``[?, 30]``; an unknown rank is ``[...]``."""
    if shape is None:
        return "[...]"
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


def _static_shape(proto: tensor_pb2.TensorProto) -> tuple[int, ...]:
    # As in TensorFlow, ``unknown_rank`` says nothing about a value: without dimensions
    # it is a scalar.
    return known_shape([dim.size for dim in proto.tensor_shape.dim])


def known_shape(dims: Iterable[int]) -> tuple[int, ...]:
    """The shape of a tensor that a client sent; ``InvalidArgument`` for no such one."""
    return _known_shape(tuple(dims))


@functools.lru_cache(maxsize=1024)
def _known_shape(static: tuple[int, ...]) -> tuple[int, ...]:
    if min(static, default=0) < 0:
        raise InvalidArgument("tensor shape is not fully known: every dimension must be 0 or more")
    # Zero dimensions do not excuse absurd ones: TensorFlow multiplies them all the
    # same.
    if len(static) > MAX_RANK:
        raise InvalidArgument(f"tensor shape has {len(static)} dimensions, at most {MAX_RANK} are supported")
    if math.prod([dim or 1 for dim in static]) > MAX_ELEMENTS:
        raise InvalidArgument(f"tensor shape {list(static)} has too many elements")
    return static


def to_numpy(proto: tensor_pb2.TensorProto, content: memoryview | None = None) -> np.ndarray[Any, Any]:
    """The value of a TensorProto, by the rules of TensorFlow's ``Tensor::FromProto``.

    Arrays of numbers made from ``tensor_content`` are read-only views of its bytes, or
    of the ``content`` that stands for it.

    Raises:
        InvalidArgument: an unknown shape, or content that does not fit the shape.
        Unimplemented: a type that has no NumPy counterpart.
    """
    dtype = numpy_dtype(proto.dtype)
    shape = _static_shape(proto)
    count = math.prod(shape)
    if not count:
        return np.empty(shape, dtype=dtype)
    raw = proto.tensor_content if content is None else content  # each look at a field makes a copy
    if not raw:
        return _fill(_typed_values(proto, dtype, count), count, dtype).reshape(shape)
    if proto.dtype == types_pb2.DT_STRING:
        return _strings(raw, count).reshape(shape)
    return from_bytes(raw, proto.dtype, shape, "tensor_content")


def from_bytes(
    raw: bytes | memoryview, number: int, shape: tuple[int, ...], what: str
) -> np.ndarray[Any, Any]:
    """Numbers from their little-endian bytes, as a read-only view of them.

    ``what`` names the bytes in errors.
    """
    dtype = numpy_dtype(number)
    needed = math.prod(shape) * dtype.itemsize
    if len(raw) != needed:
        raise InvalidArgument(
            f"{what} has {len(raw)} bytes, but shape {list(shape)} of {dtype_name(number)} needs {needed}"
        )
    if number == types_pb2.DT_BOOL and raw and np.frombuffer(raw, np.uint8).max() > 1:
        raise InvalidArgument(f"{what} of booleans may only hold the bytes 0 and 1")
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def _typed_values(proto: tensor_pb2.TensorProto, dtype: np.dtype[Any], count: int) -> np.ndarray[Any, Any]:
    """The first ``count`` values of the dtype's field; there may be fewer."""
    _, field = _TYPES[proto.dtype]
    values = getattr(proto, field)
    if field in _PACKED:
        number, part = _PACKED[field]
        flat = np.frombuffer(_packed(proto, number, len(values) * part.itemsize), dtype=part)
        # Complex numbers are pairs; a real part alone at the end counts for nothing.
        width = dtype.itemsize // part.itemsize
        return flat[: len(flat) // width * width].view(dtype)[:count]
    if field == "float8_val":
        return np.frombuffer(values[:count], dtype=dtype)
    count = min(count, len(values))
    if field == "string_val":
        return np.fromiter(values, dtype=object, count=count)
    if field in ("half_val", "int_val"):
        # Wraps as the server's own static_cast does instead of raising.
        bits = np.dtype(np.uint16) if field == "half_val" else dtype
        return np.fromiter(values, dtype=np.int64, count=count).astype(bits).view(dtype)
    return np.fromiter(values, dtype=dtype, count=count)


def _packed(proto: tensor_pb2.TensorProto, number: int, size: int) -> bytes | memoryview:
    """The packed numbers of a field, from the serialized message: faster than a loop.

    What a client sent under this number in another encoding is written out too, as an
    unknown field, but after the numbers and in another size. Strings beside numbers,
    which would come before them, mean nothing.

    Raises:
        InvalidArgument: there are too many of these.
    """
    for field, _, value in wire.fields(memoryview(proto.SerializeToString()), wire.allowance()):
        if field == number and len(value) == size:
            return value
    return b""


def _fill(values: np.ndarray[Any, Any], count: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Bring a flat array to ``count`` elements: the last one repeats, or zero."""
    if len(values) == count:
        return values
    if count * dtype.itemsize > MAX_FILLED_BYTES:
        raise InvalidArgument(f"tensor has {len(values)} values for {count} elements: send them all")
    empty: Any = b"" if dtype.hasobject else 0
    filled = np.full(count, values[-1] if len(values) else empty, dtype=dtype)
    filled[: len(values)] = values
    return filled


def _strings(content: bytes | memoryview, count: int) -> np.ndarray[Any, Any]:
    """Strings in ``tensor_content``: all lengths as varints, then all bytes."""
    lengths: list[int] = []
    position = 0
    try:
        while len(lengths) < count:
            length, position = wire.read_varint(content, position)
            lengths.append(length)
    except InvalidArgument:
        raise InvalidArgument(f"tensor_content ends before the lengths of {count} strings") from None
    if position + sum(lengths) != len(content):
        raise InvalidArgument(
            f"tensor_content has {len(content) - position} bytes of strings, "
            f"their lengths add up to {sum(lengths)}"
        )
    strings = np.empty(count, dtype=object)
    for index, length in enumerate(lengths):
        strings[index] = bytes(content[position : position + length])
        position += length
    return strings


def to_proto(array: Any, dtype: int | None = None, as_field: bool = False) -> tensor_pb2.TensorProto:
    """A TensorProto of an array (or anything ``np.asarray`` takes).

    Args:
        array: numbers, booleans, or strings (``bytes``; ``str`` is encoded as UTF-8).
        dtype: the TensorFlow DataType, when it is not to be told from the array.
        as_field: numbers go into the typed field (``float_val``, ...) instead of
            ``tensor_content``.
    """
    proto = tensor_pb2.TensorProto()
    write_proto(proto, array, dtype, as_field)
    return proto


def write_proto(
    proto: tensor_pb2.TensorProto,
    array: Any,
    dtype: int | None = None,
    as_field: bool = False,
    pack_strings: bool = False,
) -> None:
    """The same into a TensorProto that is there, and empty.

    ``pack_strings`` puts strings into ``tensor_content`` too.
    """
    values = np.asarray(array)
    number = data_type(values.dtype) if dtype is None else dtype
    proto.dtype = number
    proto.tensor_shape.SetInParent()
    for dim in values.shape:
        proto.tensor_shape.dim.add(size=dim)
    if number == types_pb2.DT_STRING:
        strings = as_bytes(values.reshape(-1).tolist())
        if pack_strings:
            proto.tensor_content = b"".join(
                [*(wire.write_varint(len(string)) for string in strings), *strings]
            )
        else:
            proto.string_val.extend(strings)
    elif as_field:
        _set_field(proto, np.ascontiguousarray(values, dtype=numpy_dtype(number)).reshape(-1))
    else:
        proto.tensor_content = np.ascontiguousarray(values, dtype=numpy_dtype(number)).tobytes()


def raw_field(number: int, as_field: bool) -> int | None:
    """The field that takes a tensor's bytes as they are; None where none does.

    Args:
        number: the DataType.
        as_field: as in `to_proto`.
    """
    if number == types_pb2.DT_STRING:
        return None
    if not as_field:
        return 4
    field, _ = _PACKED.get(_TYPES[number][1], (None, None))
    return field


def _set_field(proto: tensor_pb2.TensorProto, flat: np.ndarray[Any, Any]) -> None:
    _, field = _TYPES[proto.dtype]
    if field in _PACKED:
        if flat.size:
            proto.MergeFromString(wire.field(_PACKED[field][0], flat.view(np.uint8).data))
    elif field == "float8_val":
        proto.float8_val = flat.tobytes()
    else:
        bits = flat.view(np.uint16) if field == "half_val" else flat
        getattr(proto, field).extend(bits.tolist())


def as_bytes(values: Sequence[Any]) -> list[bytes]:
    """Each value as bytes, text as UTF-8; ``InvalidArgument`` where one is neither."""
    try:
        return [value if isinstance(value, bytes) else value.encode() for value in values]
    except AttributeError:
        raise InvalidArgument("a string tensor may only hold text or bytes") from None
