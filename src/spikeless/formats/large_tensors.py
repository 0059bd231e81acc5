"""Predict messages whose large tensors are not copied into message objects.

In: serialized requests. Out: serialized responses. A message object holds a copy of
each tensor, and gives away another. Here a tensor of a large request is a view of the
request's bytes, and one of a large response is copied once, from where it was computed
into the response's bytes. Small messages are parsed and written as usual, and what is
in any of them does not depend on the way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from spikeless.errors import InvalidArgument
from spikeless.formats import wire
from spikeless.formats.protos import model_pb2, predict_pb2, tensor_pb2
from spikeless.formats.tensors import data_type, numpy_dtype, raw_field, to_numpy, write_proto

#: From this many bytes on, a message is large.
LARGE = 1 << 18

# The fields of the messages: of PredictRequest, of PredictResponse, of an entry of a
# map, and of TensorProto.
_INPUTS = 2
_OUTPUTS, _MODEL_SPEC = 1, 2
_KEY, _VALUE = 1, 2
_TENSOR_CONTENT = 4

_Array = np.ndarray[Any, Any]


class LargeRequest:
    """A ``PredictRequest`` whose ``tensor_content`` stayed where it was."""

    def __init__(self, message: predict_pb2.PredictRequest, contents: Mapping[str, memoryview]) -> None:
        self.model_spec = message.model_spec
        self.output_filter = message.output_filter
        #: By alias, what ``to_numpy`` makes an array of.
        self.inputs = {alias: (proto, contents.get(alias)) for alias, proto in message.inputs.items()}
        self._message = message

    def HasField(self, name: str) -> bool:
        return bool(self._message.HasField(name))


def array_of(value: tensor_pb2.TensorProto | tuple[tensor_pb2.TensorProto, memoryview | None]) -> _Array:
    """An input of either form of request; raises as `to_numpy`."""
    return to_numpy(*value) if isinstance(value, tuple) else to_numpy(value)


def read_request(content: bytes, large: int = LARGE) -> predict_pb2.PredictRequest | LargeRequest:
    """Parse a ``PredictRequest``, without its tensors where they have ``large`` bytes.

    Raises:
        DecodeError: it is none.
    """
    if len(content) >= large:
        try:
            rest, contents = _split(memoryview(content))
        except (InvalidArgument, UnicodeDecodeError):
            pass  # unusual: for the parser to refuse, or to make something of
        else:
            if sum(map(len, contents.values())) >= large:
                return LargeRequest(predict_pb2.PredictRequest.FromString(b"".join(rest)), contents)
    return predict_pb2.PredictRequest.FromString(content)


_Parts = list[bytes | memoryview]


def _split(request: memoryview) -> tuple[_Parts, dict[str, memoryview]]:
    """A request without its tensors' contents, in parts, and these by alias."""
    kept: _Parts = []
    contents: dict[str, memoryview] = {}
    allowed = wire.allowance()
    for number, whole, value in wire.fields(request, allowed):
        if number != _INPUTS or not _holds_bytes(whole):
            kept.append(whole)
            continue
        alias, content = "", memoryview(b"")
        tensor: _Parts = []
        for part, field, inner in wire.fields(value, allowed):
            if part not in (_KEY, _VALUE) or not _holds_bytes(field):
                raise InvalidArgument("an entry of a map with an unknown field")
            if part == _KEY:
                alias = bytes(inner).decode()
            else:
                # What is there twice is merged.
                for kind, tensor_field, raw in wire.fields(inner, allowed):
                    if kind == _TENSOR_CONTENT and _holds_bytes(tensor_field):
                        content = raw
                    else:
                        tensor.append(tensor_field)
        # Of equal keys the last counts.
        contents[alias] = content
        kept += _map_entry(_INPUTS, alias, tensor)
    return kept, contents


def _holds_bytes(field: memoryview) -> bool:
    return field[0] & 7 == wire.BYTES


def _map_entry(number: int, key: str, value: _Parts) -> _Parts:
    """An entry of a map from strings to messages, of which these are the parts."""
    entry = [wire.field(_KEY, key.encode()), wire.head(_VALUE, sum(map(len, value))), *value]
    return [wire.head(number, sum(map(len, entry))), *entry]


@dataclass(frozen=True)
class Response:
    """What a ``PredictResponse`` is made of."""

    model_spec: model_pb2.ModelSpec
    outputs: Mapping[str, _Array]
    #: Outputs go into ``tensor_content`` instead of the typed fields.
    tensor_content: bool = False

    def message(self) -> predict_pb2.PredictResponse:
        """The message object."""
        response = predict_pb2.PredictResponse(model_spec=self.model_spec)
        for alias, output in self.outputs.items():
            self._write(response.outputs[alias], output)
        return response

    def serialized(self) -> bytes:
        """The message; its numbers are copied only once."""
        parts: _Parts = []
        for alias, output in self.outputs.items():
            number = data_type(output.dtype)
            field = raw_field(number, as_field=not self.tensor_content)
            if field is None or not output.size:
                proto = tensor_pb2.TensorProto()
                self._write(proto, output)
                parts += _map_entry(_OUTPUTS, alias, [proto.SerializeToString()])
            else:
                values = np.ascontiguousarray(output, dtype=numpy_dtype(number))
                parts += (_before_numbers(alias, number, output.shape, field), _raw(values))
        parts.append(wire.field(_MODEL_SPEC, self.model_spec.SerializeToString()))
        return b"".join(parts)

    def _write(self, proto: tensor_pb2.TensorProto, output: _Array) -> None:
        write_proto(proto, output, as_field=not self.tensor_content, pack_strings=self.tensor_content)


@functools.lru_cache(maxsize=1024)
def _before_numbers(alias: str, number: int, shape: tuple[int, ...], field: int) -> bytes:
    """An output up to its numbers, which are the end of it: the same in many responses.

    Args:
        alias: its key.
        number: its DataType.
        shape: its shape, without a 0.
        field: the field of ``TensorProto`` that takes the numbers' bytes.
    """
    proto = tensor_pb2.TensorProto(dtype=number)
    proto.tensor_shape.SetInParent()
    for dim in shape:
        proto.tensor_shape.dim.add(size=dim)
    size = math.prod(shape) * numpy_dtype(number).itemsize
    tensor = b"".join((proto.SerializeToString(), wire.head(field, size)))
    entry = wire.field(_KEY, alias.encode()) + wire.head(_VALUE, len(tensor) + size) + tensor
    return wire.head(_OUTPUTS, len(entry) + size) + entry


def _raw(values: _Array) -> bytes | memoryview:
    """The bytes of a contiguous array; a view of them where they are many."""
    return values.tobytes() if values.nbytes < LARGE else values.reshape(-1).view(np.uint8).data
