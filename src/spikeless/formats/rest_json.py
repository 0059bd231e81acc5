"""TensorFlow Serving's REST JSON, both ways.

In: the body of a ``:predict``, ``:classify`` or ``:regress`` call. Out: NumPy arrays by
input alias, or an ``Input`` message; and back from output arrays, or a result message,
to the body of the answer. The rules and error texts are those of
``tensorflow_serving/util/json_tensor.cc``:

- ``instances`` is a list of rows; a row is a value or nested list (signatures with one
  input), or an object with one entry for each input. Rows become the first dimension.
  The answer has ``predictions``, row by row.
- ``inputs`` holds columns: one value or nested list (signatures with one input), or an
  object with one entry for each input; entries for anything else are ignored. The
  answer has ``outputs``.
- Numbers must fit their type: no fractions for integers, no numbers for booleans. As
  floats they are rounded: what is too large is infinite, and what is smaller than the
  smallest normal number zero, in requests and in answers.
- Strings are text, or ``{"b64": "..."}`` for bytes; outputs whose name ends in
  ``_bytes`` come as the latter.
- NaN, Infinity and -Infinity are written as such, although JSON does not know them;
  in requests also as Inf.
- The first of several equal keys counts, but the last of an example's features. What
  follows the JSON object is ignored.

Values are checked by type and converted in bulk; no Python code runs per number, in
either direction.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import math
import re
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import orjson

from spikeless.errors import InvalidArgument, SpikelessError, Unimplemented
from spikeless.formats.protos import (
    classification_pb2,
    example_pb2,
    feature_pb2,
    input_pb2,
    regression_pb2,
    types_pb2,
)
from spikeless.formats.savedmodel import TensorSpec
from spikeless.formats.tensors import MAX_RANK, data_type, dtype_name, numpy_dtype

SIGNATURE_KEY = "signature_name"
INSTANCES_KEY = "instances"
INPUTS_KEY = "inputs"
EXAMPLES_KEY = "examples"
CONTEXT_KEY = "context"
BASE64_KEY = "b64"
PREDICTIONS_KEY = "predictions"
OUTPUTS_KEY = "outputs"
RESULTS_KEY = "results"
ERROR_KEY = "error"
#: The header of every body in JSON.
HEADER = ("Content-Type", "application/json")
#: Outputs with such a name hold bytes, not text.
BYTES_SUFFIX = "_bytes"

_Array = np.ndarray[Any, Any]

_FLOATS = frozenset({types_pb2.DT_FLOAT, types_pb2.DT_DOUBLE})
_INTEGERS = frozenset(
    {
        types_pb2.DT_INT8,
        types_pb2.DT_INT16,
        types_pb2.DT_INT32,
        types_pb2.DT_INT64,
        types_pb2.DT_UINT8,
        types_pb2.DT_UINT32,
        types_pb2.DT_UINT64,
    }
)


class _Constant(float):
    """``NaN``, ``Infinity`` or ``Inf`` in a request: no number became too large."""


_JSON_TYPES = {
    dict: "Object",
    list: "Array",
    str: "String",
    int: "Number",
    float: "Number",
    _Constant: "Number",
    type(None): "Null",
}
#: Strings, which stay as they are, and constants outside of them that Python does not
#: know.
_CONSTANTS = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")|Inf(?!inity)|-NaN', re.DOTALL)
_PYTHON_NAMES = {"Inf": "Infinity", "-NaN": "NaN"}
#: A number that may be too large for a double.
_LARGE = re.compile(r"[eE]\+?\d{3}|\d{300}")
_TOO_LARGE = "JSON Parse error: Number too big to be stored in double."
#: What an element of a ``tf.Example`` becomes, by its Python type.
_FEATURE_KINDS = {
    str: "bytes",
    dict: "bytes",
    int: "int64",
    bool: "int64",
    float: "float",
    _Constant: "float",
}


def path_text(part: str, what: str) -> str:
    """The text of a percent-encoded part of a path; ``what`` names it in errors."""
    try:
        return unquote_to_bytes(part).decode()
    except UnicodeDecodeError:
        raise InvalidArgument(f"Failed to decode {what}:{part}") from None


def parse(body: bytes | str) -> dict[str, Any]:
    """The JSON object in a request body; ``NaN`` and ``Infinity`` are numbers."""
    content = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    if not content:
        raise InvalidArgument("JSON Parse error: The document is empty")
    try:
        document = _loads(content)
    except (ValueError, RecursionError) as error:  # bad JSON or UTF-8, absurdly long numbers, deep nesting
        raise InvalidArgument(f"JSON Parse error: {error}") from None
    if type(document) is not dict:
        raise InvalidArgument(f"JSON Value: {_text(document)} Is not object")
    return document


def _loads(body: bytes) -> Any:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    else:
        # Each member has a colon: where there are no more, no key is there twice.
        if type(document) is not dict or _members(document) == body.count(b":"):
            return document
    # Several times slower, but it sees every key, and knows NaN and Infinity. What is
    # no text may follow the object; inside, it is refused where it is used.
    text = body.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    try:
        return _first_object(text)
    except json.JSONDecodeError:
        if "Inf" not in text and "-NaN" not in text:  # which Python does not know
            raise
        return _first_object(_CONSTANTS.sub(lambda found: found[1] or _PYTHON_NAMES[found[0]], text))


def _members(document: dict[str, Any]) -> int:
    """How many members the objects have that requests usually consist of."""
    count = len(document)
    for value in document.values():
        for item in value if type(value) is list else (value,):
            if type(item) is not dict:
                break  # all rows are objects, or none is
            count += len(item) + sum(len(inner) for inner in item.values() if type(inner) is dict)
    return count


def _first_object(text: str) -> Any:
    """The value at the beginning of a text."""
    text = text.lstrip(" \t\n\r")
    # Called for each number, so only where one may be too large.
    parse_float = _finite if _LARGE.search(text) else None

    def decode(members: Callable[[list[tuple[str, Any]]], dict[str, Any]]) -> Any:
        return json.JSONDecoder(
            object_pairs_hook=members, parse_constant=_Constant, parse_float=parse_float
        ).raw_decode(text)[0]

    document = decode(_first_members)
    if type(document) is dict and EXAMPLES_KEY in document:
        # Of the features of an example the last counts. The outermost object is the
        # last one that ends.
        outermost: list[tuple[str, Any]] = []

        def last_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            outermost[:] = pairs
            return dict(pairs)

        decode(last_members)
        return _first_members(outermost)
    return document


def _first_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        members.update(reversed(pairs))
    return members


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(_TOO_LARGE.partition(": ")[2])
    return value


def signature_name(document: Mapping[str, Any]) -> str:
    """The signature that a request asks for; empty for the default."""
    name = document.get(SIGNATURE_KEY, "")
    if not isinstance(name, str):
        raise InvalidArgument(
            f"JSON Value: {_text(document)} not formatted correctly. 'signature_name' key must be a string "
            "value."
        )
    return _encode(name).decode()


def is_row_format(document: Mapping[str, Any]) -> bool:
    """Whether a ``:predict`` request, and so its response, is row by row.

    Raises:
        InvalidArgument: it has both of ``instances`` and ``inputs``, or neither.
    """
    rows, columns = INSTANCES_KEY in document, INPUTS_KEY in document
    if rows and columns:
        raise InvalidArgument(
            f"JSON Value: {_text(document)} Not formatted correctly expecting only one of 'inputs' or "
            "'instances' keys to exist "
        )
    if not rows and not columns:
        raise InvalidArgument("Missing 'inputs' or 'instances' key")
    return rows


def predict_inputs(
    document: Mapping[str, Any], specs: Mapping[str, TensorSpec], *, strict: bool = False
) -> dict[str, _Array]:
    """The tensors of a ``:predict`` request by alias; strings are ``bytes`` objects.

    Args:
        document: the request.
        specs: the inputs of the signature that it asks for.
        strict: refuse ``inputs`` that the signature does not have instead of ignoring
            them.

    Raises:
        InvalidArgument: the request does not have the form described above.
        Unimplemented: an input has a type that JSON requests cannot hold.
    """
    rows = is_row_format(document)
    if not specs:
        name = signature_name(document) or "DEFAULT"
        raise InvalidArgument(f"Failed to get input map for signature: {name}")
    if rows:
        return _from_rows(document, specs)
    columns = document[INPUTS_KEY]
    if strict and _is_object(columns) and (unknown := columns.keys() - specs.keys()):
        raise InvalidArgument(
            f"unknown input {_text(min(unknown))}; the signature has: {', '.join(sorted(specs))}"
        )
    return _from_columns(columns, specs)


def _from_rows(document: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, _Array]:
    rows = document[INSTANCES_KEY]
    if type(rows) is not list:
        raise InvalidArgument(f"JSON Value: {_text(document)} Expecting 'instances' to be an list/array")
    if not rows:
        raise InvalidArgument(f"JSON Value: {_text(document)} No values in 'instances' array")
    named = _is_object(rows[0])
    for number, row in enumerate(rows):
        if _is_object(row) != named:
            expected, got = ("object", "list") if named else ("value/list", "object")
            raise InvalidArgument(f"Expecting {expected} but got {got} at item {number} of input list")
    if not named:
        if len(specs) > 1:
            raise InvalidArgument(
                "instances is a plain list, but expecting list of objects as multiple input tensors required "
                "as per tensorinfo_map"
            )
        (spec,) = specs.values()
        return {spec.alias: _row_tensor(rows, spec)}
    for number, row in enumerate(rows):
        if row.keys() != specs.keys():
            for name in row.keys() - specs.keys():
                raise InvalidArgument(
                    f"Failed to process element: {number} key: {name} of 'instances' list. Error: "
                    f"INVALID_ARGUMENT: JSON object: does not have named input: {name}"
                )
            raise InvalidArgument(
                f"Failed to process element: {number} of 'instances' list. JSON object: {_text(row)} keys "
                f"must be equal to: {','.join(sorted(specs))}"
            )
    return {
        alias: _row_tensor([row[alias] for row in rows], spec, f" key: {alias}")
        for alias, spec in specs.items()
    }


def _from_columns(columns: Any, specs: Mapping[str, TensorSpec]) -> dict[str, _Array]:
    if not _is_object(columns):
        if len(specs) > 1:
            raise InvalidArgument(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as "
                "per tensorinfo_map"
            )
        (spec,) = specs.values()
        return {spec.alias: _column_tensor(columns, spec, "'inputs'")}
    for alias in specs:
        if alias not in columns:
            raise InvalidArgument(f"Missing named input: {alias} in 'inputs' object.")
    return {
        alias: _column_tensor(columns[alias], spec, f"key: {alias} of 'inputs' object")
        for alias, spec in specs.items()
    }


def _is_object(value: Any) -> bool:
    """An object that stands for named values, not for base64-encoded bytes."""
    return type(value) is dict and not _is_base64(value)


def _is_base64(value: dict[str, Any]) -> bool:
    return len(value) == 1 and type(value.get(BASE64_KEY)) is str


def _column_tensor(value: Any, spec: TensorSpec, where: str) -> _Array:
    try:
        return tensor(value, spec.dtype)
    except InvalidArgument as error:
        raise InvalidArgument(f"Failed to process {where}. Error: {error}") from None


def _row_tensor(rows: list[Any], spec: TensorSpec, key: str = "") -> _Array:
    try:
        return tensor(rows, spec.dtype)
    except SpikelessError:
        number = _first_misfit(rows, spec.dtype)
        error = _complaint(rows[number], rows[0], spec.dtype)
    raise InvalidArgument(
        f"Failed to process element: {number}{key} of 'instances' list. Error: {error.code.name}: {error}"
    )


def _first_misfit(rows: list[Any], dtype: int) -> int:
    """The first row that cannot be converted, or not to the shape of the first row.

    There must be one. It bisects and converts in bulk, as a request is converted.
    """
    low, high = 0, len(rows)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            tensor(rows[:1] + rows[low:middle], dtype)
            low = middle
        except SpikelessError:
            high = middle
    return low


def _complaint(row: Any, first: Any, dtype: int) -> SpikelessError:
    """What is wrong with a row, by itself or beside the first."""
    try:
        shape, expected = tensor(row, dtype).shape, tensor(first, dtype).shape
    except SpikelessError as error:
        return error
    if math.prod(shape) != math.prod(expected):
        return InvalidArgument(f"Expecting tensor size: {math.prod(expected)} but got: {math.prod(shape)}")
    texts = (f"[{','.join(map(str, dims))}]" for dims in (expected, shape))
    return InvalidArgument("Expecting shape {} but got: {}".format(*texts))


def tensor(value: Any, dtype: int) -> _Array:
    """The tensor of a value or nested lists of values, which must fit ``dtype``."""
    shape, leaves = _flatten(value)
    return _convert(leaves, dtype).reshape(shape)


def _flatten(value: Any) -> tuple[list[int], list[Any]]:
    """The shape of nested lists, and what they hold; it must be rectangular."""
    shape: list[int] = []
    level = [value]
    while list in (types := set(map(type, level))):
        if len(types) > 1:
            raise _mixed(level, len(shape))
        if len(shape) == MAX_RANK:
            raise InvalidArgument(f"lists may be nested at most {MAX_RANK} deep")
        size = len(level[0])
        for length in set(map(len, level)) - {size}:
            raise InvalidArgument(
                f"Encountered list at unexpected size: {length} at level: {len(shape)} expected size: {size}"
            )
        shape.append(size)
        level = list(chain.from_iterable(level))
    return shape, level


def _mixed(items: list[Any], level: int) -> InvalidArgument:
    """The error of a level with lists and values; the first item sets the depth."""
    rank, item = level, items[0]
    while type(item) is list:
        rank, item = rank + 1, item[0] if item else None
    if rank == level:
        return InvalidArgument(f"Encountered list at unexpected level: {level} expected < {rank}")
    odd = next(item for item in items if type(item) is not list)
    return InvalidArgument(
        f"JSON Value: {_text(odd)} found at incorrect level: {level + 1} in the JSON DOM. "
        f"Expected at level: {rank}"
    )


def _convert(leaves: list[Any], dtype: int) -> _Array:
    """A flat array of values, which must have the right JSON type and fit ``dtype``."""
    types = set(map(type, leaves))
    if dtype == types_pb2.DT_STRING:
        _check_types(leaves, types, {str, dict}, dtype)
        strings = np.empty(len(leaves), dtype=object)
        strings[:] = [_string(leaf) for leaf in leaves]
        return strings
    if dtype == types_pb2.DT_BOOL:
        _check_types(leaves, types, {bool}, dtype)
        return np.array(leaves, dtype=np.bool_)
    if dtype in _INTEGERS:
        _check_types(leaves, types, {int}, dtype)
        return _integers(leaves, dtype)
    if dtype in _FLOATS:
        _check_types(leaves, types, {int, float, _Constant}, dtype)
        return _floats(leaves, dtype)
    value = _text(leaves[0]) if leaves else "[]"
    raise Unimplemented(f"Conversion of JSON Value: {value} to type: {_type_text(dtype)}")


def _check_types(leaves: list[Any], types: set[type], allowed: set[type], dtype: int) -> None:
    if not types <= allowed:
        odd = next(leaf for leaf in leaves if type(leaf) not in allowed)
        raise InvalidArgument(
            f"JSON Value: {_text(odd)} Type: {_json_type(odd)} is not of expected type: {_type_text(dtype)}"
        )


def _integers(leaves: list[int], dtype: int) -> _Array:
    numpy = numpy_dtype(dtype)
    if leaves:
        limits = np.iinfo(numpy)
        for extreme in (min(leaves), max(leaves)):
            # The server lets 8 and 16 bit integers wrap around; saying so instead loses
            # no valid request.
            if not limits.min <= extreme <= limits.max:
                raise InvalidArgument(
                    f"JSON Value: {extreme} Type: Number is not of expected type: {_type_text(dtype)}"
                )
    return np.array(leaves, dtype=numpy)


def _floats(leaves: list[float], dtype: int) -> _Array:
    try:
        values = np.array(leaves, dtype=np.float64)
    except OverflowError:
        raise InvalidArgument(_TOO_LARGE) from None
    infinite = np.isinf(values)
    if infinite.any() and any(type(leaves[index]) is float for index in np.flatnonzero(infinite)):
        raise InvalidArgument(_TOO_LARGE)
    with np.errstate(over="ignore"):
        return _flushed(values.astype(numpy_dtype(dtype)))


def _flushed(values: _Array) -> _Array:
    """Zero for denormal numbers, as on the threads of TensorFlow Serving's REST API."""
    denormal = np.abs(values) < np.finfo(values.dtype).tiny
    if (values[denormal] != 0).any():
        return np.where(denormal, np.copysign(np.zeros((), values.dtype), values), values)
    return values


def _string(leaf: str | dict[str, Any]) -> bytes:
    if isinstance(leaf, dict):
        return _decode_base64(leaf)
    return _encode(leaf)


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"JSON Value: {_text(text)} is not valid Unicode: a lone surrogate") from None


def _decode_base64(value: dict[str, Any]) -> bytes:
    if not _is_base64(value):
        raise InvalidArgument(f"JSON Value: {_text(value)} not formatted correctly for base64 data")
    try:
        text = b"".join(value[BASE64_KEY].encode("ascii").split())
        # Padding is all there or left out; dots are padding too.
        digits = text.rstrip(b"=.")
        missing = -len(digits) % 4
        if len(text) - len(digits) in (0, missing):
            return base64.b64decode(digits + b"=" * missing, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise InvalidArgument("Unable to base64 decode")


def examples_input(document: Mapping[str, Any]) -> input_pb2.Input:
    """The ``Input`` of a ``:classify`` or ``:regress`` request: examples and context.

    A feature is a value or a list of values: decimals are floats, whole numbers and
    booleans are int64, strings and ``b64`` objects are bytes; one feature holds one
    kind only.
    """
    examples = document.get(EXAMPLES_KEY)
    if EXAMPLES_KEY not in document:
        raise InvalidArgument(
            f"JSON Value: {_text(document)} When method is classify, key 'examples' is expected and was not "
            "found"
        )
    if type(examples) is not list:
        raise InvalidArgument(f"JSON Value: {_text(document)} Expecting 'examples' value to be an list/array")
    if not examples:
        raise InvalidArgument(f"JSON Value: {_text(document)} 'examples' value is an empty array")
    result = input_pb2.Input()
    listed: Any = result.example_list
    if CONTEXT_KEY in document:
        listed = result.example_list_with_context
        listed.context.CopyFrom(_example(document[CONTEXT_KEY]))
    listed.examples.extend(_example(example) for example in examples)
    return result


def _example(value: Any) -> example_pb2.Example:
    if type(value) is not dict:
        raise InvalidArgument(f"Example must be JSON object but got JSON {_json_type(value)}")
    example = example_pb2.Example()
    for name, content in value.items():
        # Assigning also keeps features without a value, which is another thing than no
        # feature.
        example.features.feature[_encode(name).decode()].CopyFrom(_feature(name, content))
    return example


def _feature(name: str, content: Any) -> feature_pb2.Feature:
    values = content if type(content) is list else [content]
    feature = feature_pb2.Feature()
    if not values:
        return feature
    types = set(map(type, values))
    if types & {list, type(None)} or any(not _is_base64(value) for value in values if type(value) is dict):
        odd = next(
            value
            for value in values
            if type(value) in (list, type(None)) or (type(value) is dict and not _is_base64(value))
        )
        raise InvalidArgument(f"Feature: {name} has element with unexpected JSON type: {_json_type(odd)}")
    if types <= {str, dict}:
        feature.bytes_list.value.extend(map(_string, values))
    elif types <= {int, bool}:
        feature.int64_list.value.extend(_integers([int(v) for v in values], types_pb2.DT_INT64).tolist())
    elif types <= {float, _Constant}:
        feature.float_list.value.extend(_floats(values, types_pb2.DT_FLOAT).tolist())
    else:
        first = _FEATURE_KINDS[type(values[0])]
        raise InvalidArgument(f"Unexpected element type in feature: {name} expecting type: {first}")
    return feature


def _json_type(value: Any) -> str:
    return str(value) if type(value) is bool else _JSON_TYPES[type(value)]


def _type_text(dtype: int) -> str:
    """TensorFlow's short name, such as ``int64``."""
    return dtype_name(dtype).removeprefix("DT_").lower()


def _text(value: Any, limit: int = 200) -> str:
    """A JSON value for an error message, cut where it gets long."""
    text = ""
    for piece in json.JSONEncoder().iterencode(value):  # lazily: the value may be a whole request
        text += piece
        if len(text) > limit:
            return text[:limit] + "..."
    return text


# --- requests that others answer ------------------------------------------------------


def predict_request_body(signature: str, inputs: Mapping[str, _Array]) -> bytes:
    """The body of a ``:predict`` call with ``inputs``, whose strings are all ``b64``.

    Args:
        signature: empty for the default.
        inputs: by alias; strings are object arrays of ``bytes``.

    Raises:
        InvalidArgument: an input of a type that JSON cannot hold.
    """
    for alias, array in inputs.items():
        if (number := data_type(array.dtype)) not in _WRITABLE:
            raise InvalidArgument(f"input {alias}: REST has no JSON for {_type_text(number)}")
    columns = _object({alias: array_json(array, BYTES_SUFFIX) for alias, array in inputs.items()})
    members = {SIGNATURE_KEY: _text_json(signature)} if signature else {}
    return _object({**members, INPUTS_KEY: columns})


def examples_request_body(signature: str, given: input_pb2.Input) -> bytes:
    """The body of a ``:classify`` or ``:regress`` call; see `examples_input`."""
    kind = given.WhichOneof("kind") or "example_list"
    document: dict[str, Any] = {SIGNATURE_KEY: signature} if signature else {}
    if kind == "example_list_with_context":
        document[CONTEXT_KEY] = _features(given.example_list_with_context.context)
    document[EXAMPLES_KEY] = [_features(example) for example in getattr(given, kind).examples]
    return json.dumps(document).encode()


def _features(example: example_pb2.Example) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        if kind == "bytes_list":
            values = [{BASE64_KEY: base64.b64encode(value).decode()} for value in values]
        found[name] = values
    return found


# --- answers --------------------------------------------------------------------------

#: The types that an answer can hold; TensorFlow Serving has no JSON for half, bfloat16,
#: complex and uint16.
_WRITABLE = _FLOATS | _INTEGERS | {types_pb2.DT_BOOL, types_pb2.DT_STRING}


def error_body(message: str) -> bytes:
    """The body of every error."""
    return _document(ERROR_KEY, _text_json(message))


def predict_body(outputs: Mapping[str, _Array], rows: bool) -> bytes:
    """The answer to a ``:predict`` call.

    Args:
        outputs: by alias; strings are object arrays of ``bytes``.
        rows: the request had ``instances``, so the answer goes row by row; otherwise
            column by column.

    Raises:
        InvalidArgument: outputs that are no rows, or of a type that JSON answers cannot
            hold.
    """
    if not outputs:
        raise InvalidArgument("Cannot convert empty tensor map to JSON")
    for array in outputs.values():
        number = data_type(array.dtype)
        if number not in _WRITABLE and array.size:
            raise InvalidArgument(f"Failed to write JSON value for tensor type: {_type_text(number)}")
    return _predictions(outputs) if rows else _columns(outputs)


def _columns(outputs: Mapping[str, _Array]) -> bytes:
    columns = {name: array_json(array, name) for name, array in outputs.items()}
    if len(columns) == 1:
        return _document(OUTPUTS_KEY, *columns.values())
    return _document(OUTPUTS_KEY, _object(columns))


def _predictions(outputs: Mapping[str, _Array]) -> bytes:
    sizes: set[int] = set()
    for name, array in outputs.items():
        if not array.ndim:
            raise InvalidArgument(f"Tensor name: {name} has no shape information ")
        size = array.shape[0]
        if sizes and size not in sizes:
            raise InvalidArgument(
                f"Tensor name: {name} has inconsistent batch size: {size} expecting: {sizes.pop()}"
            )
        sizes.add(size)
    if len(outputs) == 1:
        ((name, array),) = outputs.items()
        return _document(PREDICTIONS_KEY, array_json(array, name))
    columns = [_rows_json(array, name) for name, array in outputs.items()]
    rows = (_object(dict(zip(outputs, row, strict=True))) for row in zip(*columns, strict=True))
    return _document(PREDICTIONS_KEY, b"[" + b", ".join(rows) + b"]")


def _rows_json(array: _Array, name: str) -> list[bytes]:
    """The JSON of each row of an array."""
    if array.ndim > 1:
        return [array_json(row, name) for row in array]
    if array.dtype.hasobject:
        return [_string_json(value, name) for value in array.tolist()]
    if not array.size:
        return []
    # Numbers contain no commas.
    return _numbers_json(array)[1:-1].split(b",")


def array_json(array: _Array, name: str) -> bytes:
    """Nested lists of an output's values, or its only value."""
    if not array.dtype.hasobject:
        return _numbers_json(array)
    if array.ndim == 0:
        return _string_json(array.item(), name)
    if array.ndim == 1:
        return b"[" + b",".join(_string_json(value, name) for value in array.tolist()) + b"]"
    return b"[" + b",".join(array_json(row, name) for row in array) + b"]"


def _numbers_json(array: _Array) -> bytes:
    # A scalar goes in as a row of one, because its NumPy type has no JSON form of its
    # own everywhere.
    values = np.ascontiguousarray(array).reshape(array.shape or (1,))
    if values.dtype.kind == "f":
        values = _flushed(values)
    text = orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)
    if values.dtype.kind == "f" and not (finite := np.isfinite(values)).all():
        # JSON has no word for these: they come out as null, which nothing else does, in
        # their order.
        words = _words(values[~finite])
        parts = text.split(b"null")
        text = b"".join(chain.from_iterable(zip(parts, [*words, b""], strict=True)))
    return text if array.ndim else text[1:-1]


def _words(values: _Array) -> list[bytes]:
    """``NaN``, ``Infinity`` or ``-Infinity`` for each value; none may be finite."""
    table = [b"NaN", b"Infinity", b"-Infinity"]
    return [table[index] for index in np.where(np.isnan(values), 0, np.where(values > 0, 1, 2)).tolist()]


def _string_json(value: bytes, name: str) -> bytes:
    if name.endswith(BYTES_SUFFIX):
        return b'{"' + BASE64_KEY.encode() + b'": "' + base64.b64encode(value) + b'"}'
    # Bytes that are no text go through as they are, as they do in TensorFlow Serving.
    return _text_json(value.decode("utf-8", "surrogateescape"))


def _text_json(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogateescape")


def _object(members: Mapping[str, bytes]) -> bytes:
    return b"{" + b", ".join(_text_json(name) + b": " + value for name, value in members.items()) + b"}"


def _document(key: str, value: bytes) -> bytes:
    return b'{\n    "' + key.encode() + b'": ' + value + b"\n}"


def classify_body(result: classification_pb2.ClassificationResult) -> bytes:
    """The answer to a ``:classify`` call: a list of ``[label, score]`` per example."""
    if not result.classifications:
        raise InvalidArgument("Cannot convert empty ClassificationResults to JSON")
    rows = []
    for row in result.classifications:
        scores = np.array([entry.score for entry in row.classes], dtype=np.float32)
        labels = (_text_json(entry.label) for entry in row.classes)
        pairs = zip(labels, _rows_json(scores, ""), strict=True) if row.classes else ()
        rows.append(b"[" + b",".join(b"[" + label + b"," + score + b"]" for label, score in pairs) + b"]")
    return _document(RESULTS_KEY, b"[" + b",".join(rows) + b"]")


def regress_body(result: regression_pb2.RegressionResult) -> bytes:
    """The answer to a ``:regress`` call: one number for each example."""
    if not result.regressions:
        raise InvalidArgument("Cannot convert empty RegressionResults to JSON")
    values = np.array([entry.value for entry in result.regressions], dtype=np.float32)
    return _document(RESULTS_KEY, _numbers_json(values))
