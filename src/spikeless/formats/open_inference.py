"""Tensors and signatures in the forms of the Open Inference Protocol (V2).

In: the body of a REST request, or a ``ModelInferRequest``. Out: an `InferRequest` with
NumPy arrays; and back from output arrays to the body of the answer, or a
``ModelInferResponse``. Both forms have two ways to hold values:

- values of JSON, nested or in one list, as `spikeless.formats.rest_json` reads and
  writes numbers, or ``InferTensorContents``;
- bytes: behind the JSON (the binary tensor data extension), or in
  ``raw_input_contents``. Numbers are little-endian, and before each string is its
  length in four bytes.

The datatype BYTES stands for strings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from spikeless.errors import InvalidArgument, SpikelessError, Unimplemented
from spikeless.formats import rest_json, wire
from spikeless.formats.large_tensors import LARGE
from spikeless.formats.open_inference_messages import message_class
from spikeless.formats.protos import types_pb2
from spikeless.formats.savedmodel import Signature, TensorSpec
from spikeless.formats.tensors import data_type, dtype_name, from_bytes, known_shape, numpy_dtype

#: The extensions that servers may name.
EXTENSIONS = ("binary_tensor_data",)
#: The parameter of a request that names a signature.
SIGNATURE_PARAMETER = "signature_name"
#: The header that says where the JSON of a body ends and bytes of tensors begin.
JSON_LENGTH_HEADER = "Inference-Header-Content-Length"

_Array = np.ndarray[Any, Any]
_Request, _Response = message_class("ModelInferRequest"), message_class("ModelInferResponse")
_RAW_INPUTS, _RAW_OUTPUTS = (
    message.DESCRIPTOR.fields_by_name[name].number
    for message, name in ((_Request, "raw_input_contents"), (_Response, "raw_output_contents"))
)
#: Datatype -> TensorFlow DataType, and the field of ``InferTensorContents``; None where
#: there is none.
_DATATYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (types_pb2.DT_BOOL, "bool_contents"),
    "UINT8": (types_pb2.DT_UINT8, "uint_contents"),
    "UINT16": (types_pb2.DT_UINT16, "uint_contents"),
    "UINT32": (types_pb2.DT_UINT32, "uint_contents"),
    "UINT64": (types_pb2.DT_UINT64, "uint64_contents"),
    "INT8": (types_pb2.DT_INT8, "int_contents"),
    "INT16": (types_pb2.DT_INT16, "int_contents"),
    "INT32": (types_pb2.DT_INT32, "int_contents"),
    "INT64": (types_pb2.DT_INT64, "int64_contents"),
    "FP16": (types_pb2.DT_HALF, None),
    "BF16": (types_pb2.DT_BFLOAT16, None),
    "FP32": (types_pb2.DT_FLOAT, "fp32_contents"),
    "FP64": (types_pb2.DT_DOUBLE, "fp64_contents"),
    "BYTES": (types_pb2.DT_STRING, "bytes_contents"),
}
_NAMES = {number: name for name, (number, _) in _DATATYPES.items()}
#: Types that JSON is read as before it becomes one that `rest_json` does not know.
_WIDER = {
    types_pb2.DT_HALF: types_pb2.DT_FLOAT,
    types_pb2.DT_BFLOAT16: types_pb2.DT_FLOAT,
    types_pb2.DT_UINT16: types_pb2.DT_UINT32,
}
_LENGTH_BYTES = 4


@dataclass(frozen=True)
class InferRequest:
    """What a request of either form asks for."""

    id: str
    #: Empty for the default.
    signature: str
    #: By alias; strings are object arrays of ``bytes``.
    inputs: Mapping[str, _Array]
    #: Aliases; none stands for all.
    outputs: Sequence[str]
    #: Whether the answer holds all outputs as bytes.
    raw: bool
    #: The outputs that it holds as bytes even so.
    raw_outputs: frozenset[str] = field(default_factory=frozenset)


def tensor_metadata(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    """The metadata of inputs or outputs.

    Unknown dimensions are -1; a shape of unknown rank is [-1]. Types that the protocol
    does not know have TensorFlow's names.
    """
    return [
        {
            "name": spec.alias,
            "datatype": _NAMES.get(spec.dtype, dtype_name(spec.dtype)),
            "shape": [-1] if spec.shape is None else [-1 if dim is None else dim for dim in spec.shape],
        }
        for spec in specs
    ]


def signature_metadata(signature: Signature) -> dict[str, Any]:
    """The metadata of a signature's inputs and outputs."""
    return {
        "inputs": tensor_metadata(signature.inputs.values()),
        "outputs": tensor_metadata(signature.outputs.values()),
    }


# --- bytes ----------------------------------------------------------------------------


def _from_raw(raw: bytes | memoryview, number: int, shape: tuple[int, ...], what: str) -> _Array:
    if number != types_pb2.DT_STRING:
        return from_bytes(raw, number, shape, what)
    count = math.prod(shape)
    strings: list[bytes] = []
    position = 0
    while position < len(raw) and len(strings) < count:
        start = position + _LENGTH_BYTES
        position = start + int.from_bytes(raw[position:start], "little")
        strings.append(bytes(raw[start:position]))
    if position != len(raw) or len(strings) != count:
        raise InvalidArgument(
            f"{what} has {len(raw)} bytes, which are not {count} strings with a length of "
            f"{_LENGTH_BYTES} bytes before each"
        )
    return _strings(strings).reshape(shape)


def _to_raw(array: _Array) -> bytes | memoryview:
    if not array.dtype.hasobject:
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    parts: list[bytes] = []
    for string in array.reshape(-1).tolist():
        parts += len(string).to_bytes(_LENGTH_BYTES, "little"), string
    return b"".join(parts)


def _strings(values: Sequence[bytes]) -> _Array:
    strings = np.empty(len(values), dtype=object)
    strings[:] = values
    return strings


def _datatype(array: _Array, what: str) -> str:
    number = data_type(array.dtype)
    if number not in _NAMES:
        raise Unimplemented(f"{what}: the protocol has no datatype for {dtype_name(number)}")
    return _NAMES[number]


def _number(datatype: Any, what: str) -> int:
    if not isinstance(datatype, str) or datatype not in _DATATYPES:
        raise InvalidArgument(
            f"{what}: there is no datatype {str(datatype)[:100]!r}, but {', '.join(_DATATYPES)}"
        )
    return _DATATYPES[datatype][0]


def _add(inputs: dict[str, _Array], alias: str, array: _Array) -> None:
    if alias in inputs:
        raise InvalidArgument(f"input {alias} is there twice")
    inputs[alias] = array


# --- REST -----------------------------------------------------------------------------


def read_json(body: bytes, json_length: int | None) -> InferRequest:
    """Read the body of a REST request.

    Args:
        body: JSON, and the bytes of tensors behind it.
        json_length: bytes of JSON; None where nothing follows it.

    Raises:
        InvalidArgument: it is no request, or an input does not fit what it says of
            itself; the message names the input.
    """
    length = len(body) if json_length is None else json_length
    if not 0 <= length <= len(body):
        raise InvalidArgument(f"{JSON_LENGTH_HEADER} is {length}, but the body has {len(body)} bytes")
    document = rest_json.parse(body[:length])
    inputs: dict[str, _Array] = {}
    for number, entry in enumerate(_objects(document, "inputs")):
        name = _name(entry, f"inputs[{number}]")
        try:
            size = _parameters(entry).get("binary_data_size")
            if size is None:
                array = _json_input(entry)
            else:
                if type(size) is not int or not 0 <= size <= len(body) - length:
                    raise InvalidArgument(f"binary_data_size: {len(body) - length} bytes are left")
                array = _from_raw(
                    body[length : length + size], _number(entry.get("datatype"), "it"), _shape(entry), "it"
                )
                length += size
        except SpikelessError as error:
            raise InvalidArgument(f"input {name}: {error}") from None
        _add(inputs, name, array)
    if length != len(body):
        raise InvalidArgument(f"{len(body) - length} bytes behind the JSON belong to no input")
    parameters = _parameters(document)
    outputs = {_name(entry, "outputs"): _parameters(entry) for entry in _objects(document, "outputs")}
    return InferRequest(
        id=_text(document, "id"),
        signature=_text(parameters, SIGNATURE_PARAMETER),
        inputs=inputs,
        outputs=list(outputs),
        raw=parameters.get("binary_data_output") is True,
        raw_outputs=frozenset(name for name, one in outputs.items() if one.get("binary_data") is True),
    )


def _json_input(entry: Mapping[str, Any]) -> _Array:
    number, shape = _number(entry.get("datatype"), "it"), _shape(entry)
    if "data" not in entry:
        raise InvalidArgument("it has no data")
    wide = _WIDER.get(number, number)
    array = rest_json.tensor(entry["data"], wide)
    if array.size != math.prod(shape) or (array.ndim > 1 and array.shape != shape):
        raise InvalidArgument(f"data of shape {list(array.shape)} does not fit shape {list(shape)}")
    if wide != number:
        with np.errstate(over="ignore"):
            narrow = array.astype(numpy_dtype(number))
        if array.dtype.kind == "u" and (narrow != array).any():
            raise InvalidArgument(f"data has a number that is too large for {entry['datatype']}")
        array = narrow
    return array.reshape(shape)


def _shape(entry: Mapping[str, Any]) -> tuple[int, ...]:
    shape = entry.get("shape")
    if type(shape) is not list or any(type(dim) is not int for dim in shape):
        raise InvalidArgument("shape must be a list of integers")
    return known_shape(shape)


def _objects(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    entries = document.get(key, [])
    if type(entries) is not list or any(type(entry) is not dict for entry in entries):
        raise InvalidArgument(f"{key} must be a list of objects")
    return entries


def _name(entry: Mapping[str, Any], what: str) -> str:
    name = _text(entry, "name")
    if not name:
        raise InvalidArgument(f"{what} has no name")
    return name


def _parameters(entry: Mapping[str, Any]) -> dict[str, Any]:
    parameters = entry.get("parameters", {})
    if type(parameters) is not dict:
        raise InvalidArgument("parameters must be an object")
    return parameters


def _text(entry: Mapping[str, Any], key: str) -> str:
    """A text without what JSON cannot hold; empty where there is none."""
    text = entry.get(key, "")
    if type(text) is not str:
        raise InvalidArgument(f"{key} must be a string")
    return text.encode("utf-8", "replace").decode()


def request_body(signature: str, inputs: Mapping[str, _Array], outputs: Sequence[str]) -> bytes:
    """The JSON body of a request; the reverse of `read_json`.

    Args:
        signature: empty for the default.
        inputs: by alias; strings are object arrays of ``bytes``.
        outputs: aliases of those to ask for; none stands for all.

    Raises:
        InvalidArgument: a string that is no text, which JSON cannot hold.
        Unimplemented: an input of a type that the protocol does not know.
    """
    document: dict[str, Any] = {}
    if signature:
        document["parameters"] = {SIGNATURE_PARAMETER: signature}
    if outputs:
        document["outputs"] = [{"name": name} for name in outputs]
    entries = [_json_tensor(array, alias, "input") for alias, array in inputs.items()]
    return (
        orjson.dumps(document)[:-1] + (b"," if document else b"") + b'"inputs":[' + b",".join(entries) + b"]}"
    )


def _head(array: _Array, alias: str, what: str) -> dict[str, Any]:
    return {"name": alias, "datatype": _datatype(array, f"{what} {alias}"), "shape": list(array.shape)}


def _json_tensor(array: _Array, alias: str, what: str) -> bytes:
    values = _json_values(array, f"{what} {alias}")
    return orjson.dumps(_head(array, alias, what))[:-1] + b',"data":' + values + b"}"


def write_json(
    model: str, version: int | None, request: InferRequest, outputs: Mapping[str, _Array]
) -> tuple[bytes, int | None]:
    """The body of a REST answer, and how many bytes of it are JSON where others follow.

    Raises:
        InvalidArgument: a string that is no text, to be written as JSON.
        Unimplemented: an output of a type that the protocol does not know.
    """
    heads: list[bytes] = []
    tail: list[bytes | memoryview] = []
    for alias, array in outputs.items():
        if request.raw or alias in request.raw_outputs:
            tail.append(_to_raw(array))
            parameters = {"binary_data_size": len(tail[-1])}
            heads.append(orjson.dumps({**_head(array, alias, "output"), "parameters": parameters}))
        else:
            heads.append(_json_tensor(array, alias, "output"))
    answer = {"model_name": model}
    if version is not None:
        answer["model_version"] = str(version)
    if request.id:
        answer["id"] = request.id
    text = orjson.dumps(answer)[:-1] + b',"outputs":[' + b",".join(heads) + b"]}"
    return b"".join([text, *tail]), len(text) if tail else None


def _json_values(array: _Array, what: str) -> bytes:
    flat = array.reshape(-1)
    if not array.dtype.hasobject:
        wide = _WIDER.get(data_type(array.dtype), data_type(array.dtype))
        return rest_json.array_json(flat.astype(numpy_dtype(wide), copy=False), what)
    try:
        return orjson.dumps([string.decode() for string in flat.tolist()])
    except UnicodeDecodeError:
        raise InvalidArgument(
            f"{what} holds bytes that are no text: ask for it with the parameter binary_data"
        ) from None


# --- gRPC -----------------------------------------------------------------------------


@dataclass(frozen=True)
class InferMessage:
    """A ``ModelInferRequest``, and its ``raw_input_contents`` if they are beside it."""

    message: Any
    raw: Sequence[bytes | memoryview]


def parse_message(content: bytes, large: int = LARGE) -> InferMessage:
    """Parse a ``ModelInferRequest``; one of ``large`` bytes keeps its raw contents.

    These are views of ``content`` then.

    Raises:
        DecodeError: it is none.
    """
    if len(content) >= large:
        kept: list[memoryview] = []
        raw: list[memoryview] = []
        try:
            for number, whole, value in wire.fields(memoryview(content), wire.allowance()):
                if number == _RAW_INPUTS and whole[0] & 7 == wire.BYTES:
                    raw.append(value)
                else:
                    kept.append(whole)
        except InvalidArgument:
            pass  # unusual: for the parser to refuse, or to make something of
        else:
            return InferMessage(_Request.FromString(b"".join(kept)), raw)
    message = _Request.FromString(content)
    return InferMessage(message, message.raw_input_contents)


def read_message(parsed: InferMessage) -> InferRequest:
    """Read a ``ModelInferRequest``; raises as `read_json` does."""
    message, raw = parsed.message, list(parsed.raw)
    if raw and len(raw) != len(message.inputs):
        raise InvalidArgument(f"raw_input_contents has {len(raw)} entries for {len(message.inputs)} inputs")
    inputs: dict[str, _Array] = {}
    for index, entry in enumerate(message.inputs):
        try:
            number, shape = _number(entry.datatype, "it"), known_shape(entry.shape)
            if raw:
                if entry.HasField("contents"):
                    raise InvalidArgument("it has contents, and raw_input_contents too")
                array = _from_raw(raw[index], number, shape, "it")
            else:
                array = _from_contents(entry, number, shape)
        except SpikelessError as error:
            raise InvalidArgument(f"input {entry.name}: {error}") from None
        _add(inputs, entry.name, array)
    return InferRequest(
        id=message.id,
        signature=message.parameters[SIGNATURE_PARAMETER].string_param
        if SIGNATURE_PARAMETER in message.parameters
        else "",
        inputs=inputs,
        outputs=[output.name for output in message.outputs],
        raw=bool(raw),
    )


def _from_contents(entry: Any, number: int, shape: tuple[int, ...]) -> _Array:
    _, name = _DATATYPES[entry.datatype]
    if name is None:
        raise InvalidArgument(f"{entry.datatype} only goes into raw_input_contents")
    values = getattr(entry.contents, name)
    if len(values) != math.prod(shape):
        raise InvalidArgument(
            f"{name} has {len(values)} values, but shape {list(shape)} needs {math.prod(shape)}"
        )
    if number == types_pb2.DT_STRING:
        return _strings(values).reshape(shape)
    dtype = numpy_dtype(number)
    if dtype.kind not in "iu":
        return np.fromiter(values, dtype, len(values)).reshape(shape)
    wide = np.fromiter(values, np.uint64 if dtype.kind == "u" else np.int64, len(values))
    array = wide.astype(dtype)
    if (array != wide).any():
        raise InvalidArgument(f"{name} has a number that does not fit {entry.datatype}")
    return array.reshape(shape)


def write_message(
    model: str, version: int | None, request: InferRequest, outputs: Mapping[str, _Array]
) -> bytes:
    """The serialized ``ModelInferResponse``.

    It is raw if the request is, or an output can be only that.

    Raises:
        Unimplemented: an output of a type that the protocol does not know.
    """
    response = _Response(
        model_name=model, model_version="" if version is None else str(version), id=request.id
    )
    datatypes = {alias: _datatype(array, f"output {alias}") for alias, array in outputs.items()}
    raw = request.raw or any(_DATATYPES[datatype][1] is None for datatype in datatypes.values())
    raws: list[bytes | memoryview] = []
    for alias, array in outputs.items():
        entry = response.outputs.add(name=alias, datatype=datatypes[alias], shape=array.shape)
        if raw:
            contents = _to_raw(array)
            # Copied once, here: a message object would copy them twice more.
            raws += wire.head(_RAW_OUTPUTS, len(contents)), contents
        else:
            getattr(entry.contents, str(_DATATYPES[entry.datatype][1])).extend(array.reshape(-1).tolist())
    return b"".join((response.SerializeToString(), *raws))
