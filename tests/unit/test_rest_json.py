"""REST JSON to tensors and examples, by TensorFlow Serving's rules."""

from __future__ import annotations

import base64
import contextlib
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikeless.errors import InvalidArgument, SpikelessError, Unimplemented
from spikeless.formats import rest_json
from spikeless.formats.protos import types_pb2
from spikeless.formats.savedmodel import TensorSpec
from spikeless.formats.tensors import dtype_name, numpy_dtype

Array = np.ndarray[Any, Any]


def specs(**dtypes: str) -> dict[str, TensorSpec]:
    return {
        alias: TensorSpec(alias, f"{alias}:0", types_pb2.DataType.Value(f"DT_{dtype.upper()}"), None)
        for alias, dtype in dtypes.items()
    }


def inputs(document: Any, **dtypes: str) -> dict[str, Array]:
    text = document if isinstance(document, str) else json.dumps(document)
    return rest_json.predict_inputs(rest_json.parse(text), specs(**dtypes))


def only(document: Any, dtype: str) -> Array:
    return inputs(document, x=dtype)["x"]


def test_plain_rows() -> None:
    array = only({"instances": [[1, 2.5], [3, -4]]}, "float")
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, [[1, 2.5], [3, -4]])


def test_rows_of_scalars_and_of_base64() -> None:
    assert only({"instances": [1, 2, 3]}, "int32").shape == (3,)
    assert only({"instances": [{"b64": "aGk="}, "text"]}, "string").tolist() == [b"hi", b"text"]


def test_named_rows() -> None:
    rows = [{"a": [1, 2], "b": "x"}, {"b": {"b64": "/w=="}, "a": [3, 4]}]
    result = inputs({"signature_name": "s", "instances": rows}, a="int64", b="string")
    np.testing.assert_array_equal(result["a"], [[1, 2], [3, 4]])
    assert result["b"].tolist() == [b"x", b"\xff"]


def test_named_rows_for_one_input() -> None:
    assert inputs({"instances": [{"x": 1}, {"x": 2}]}, x="int64")["x"].tolist() == [1, 2]


def test_columns() -> None:
    result = inputs({"inputs": {"a": [[1], [2]], "b": 0.5, "ignored": None}}, a="int8", b="double")
    assert result["a"].shape == (2, 1)
    assert result["a"].dtype == np.int8
    assert result["b"].shape == ()
    assert result["b"] == 0.5
    assert result.keys() == {"a", "b"}


def test_strict_columns() -> None:
    document = rest_json.parse('{"inputs": {"x": 1, "y": 2}}')
    with pytest.raises(InvalidArgument, match='unknown input "y"; the signature has: x'):
        rest_json.predict_inputs(document, specs(x="float"), strict=True)


def test_plain_columns_and_a_base64_scalar() -> None:
    np.testing.assert_array_equal(only({"inputs": [[1, 2]]}, "float"), [[1, 2]])
    assert only({"inputs": {"b64": "aGk"}}, "string").tolist() == b"hi"


def test_not_a_number_and_infinity() -> None:
    array = only('{"instances": [NaN, Infinity, -Infinity]}', "float")
    assert math.isnan(array[0])
    assert array[1:].tolist() == [math.inf, -math.inf]


def test_empty_lists() -> None:
    assert only({"instances": [[], []]}, "float").shape == (2, 0)
    assert only({"inputs": []}, "string").shape == (0,)
    assert only({"inputs": []}, "int32").shape == (0,)


@pytest.mark.parametrize(
    ("document", "dtype", "message"),
    [
        ("", "float", "The document is empty"),
        ("{", "float", "JSON Parse error"),
        (b"\xff\xfe", "float", "JSON Parse error"),
        ("[" * 100000, "float", "JSON Parse error"),
        ("9" * 5000, "float", "JSON Parse error"),
        ("[1]", "float", "Is not object"),
        ({}, "float", "Missing 'inputs' or 'instances' key"),
        ({"instances": [1], "inputs": [1]}, "float", "only one of 'inputs' or 'instances'"),
        ({"instances": {}}, "float", "to be an list/array"),
        ({"instances": []}, "float", "No values in 'instances' array"),
        ('{"inputs": ' + "[" * 100 + "1" + "]" * 100 + "}", "float", "lists may be nested at most 32 deep"),
        ({"inputs": [[1, 2], [3]]}, "float", "unexpected size: 1 at level: 1 expected size: 2"),
        ({"instances": [[1, 2], [3]]}, "float", "^Failed to process element: 1 of 'instances' list. "),
        (
            {"instances": [[1], 2]},
            "float",
            "element: 1 .* Expecting shape \\[1\\] but got: ",
        ),
        ({"instances": [[1], [2, 3]]}, "float", "element: 1 .* Expecting tensor size: 1 but got: 2"),
        ({"instances": [[[1, 2]], [[1], [2]]]}, "float", r"shape \[1,2\] but got: \[2,1\]"),
        ({"instances": [1, [2]]}, "float", r"Expecting shape \[\] but got: \[1\]"),
        ({"instances": [1] * 9 + ["a"] + [2] * 5}, "float", 'element: 9 .* JSON Value: "a" Type: String'),
        ({"instances": [{"x": 1}, {"x": True}]}, "float", "element: 1 key: x .* JSON Value: true Type: True"),
        ({"inputs": [[1], 2]}, "float", "JSON Value: 2 found at incorrect level: 2 .* Expected at level: 2"),
        ({"inputs": [1, [2]]}, "float", "Encountered list at unexpected level: 1 expected < 1"),
        ({"instances": [{"x": 1}, 2]}, "float", "Expecting object but got list at item 1"),
        ({"instances": [1, {"x": 2}]}, "float", "Expecting value/list but got object at item 1"),
        (
            {"instances": [{"x": 1}, {}]},
            "float",
            "element: 1 of .* keys must be equal to: x",
        ),
        ({"instances": [{"x": 1, "y": 1}]}, "float", "element: 0 key: y .* does not have named input: y"),
        ({"inputs": {"y": 1}}, "float", "Missing named input: x"),
        ({"inputs": "text"}, "float", 'JSON Value: "text" Type: String is not of expected type: float'),
        ({"inputs": [1, True]}, "float", "JSON Value: true Type: True"),
        ({"inputs": [None]}, "float", "JSON Value: null Type: Null"),
        ({"inputs": [1, True]}, "int32", "JSON Value: true Type: True"),
        ({"inputs": [1, 2.0]}, "int32", "JSON Value: 2.0 Type: Number is not of expected type: int32"),
        ({"inputs": [2**31]}, "int32", "JSON Value: 2147483648"),
        ({"inputs": [-1]}, "uint64", "JSON Value: -1"),
        ({"inputs": [2**64]}, "uint64", r"JSON Value: 1\.8446744073709552e\+19"),
        ({"inputs": [256]}, "uint8", "JSON Value: 256"),
        ({"inputs": [1]}, "bool", "is not of expected type: bool"),
        ({"inputs": [True, 1]}, "bool", "JSON Value: 1 Type: Number"),
        ({"inputs": [1]}, "string", "is not of expected type: string"),
        ({"inputs": [{"b64": "aGk="}]}, "float", "Type: Object is not of expected type: float"),
        ({"inputs": [{"b64": "!!"}]}, "string", "Unable to base64 decode"),
        ({"inputs": [{"b64": 1}]}, "string", "not formatted correctly for base64"),
        ({"inputs": [{"b64": "aGk=", "c": 1}]}, "string", "not formatted correctly for base64"),
        ({"inputs": ["\ud800"]}, "string", "lone surrogate"),
        ({"inputs": [10**400]}, "double", "too big"),
    ],
)
def test_refusals(document: Any, dtype: str, message: str) -> None:
    text = document if isinstance(document, str | bytes) else json.dumps(document)
    with pytest.raises(InvalidArgument, match=message):
        rest_json.predict_inputs(rest_json.parse(text), specs(x=dtype))


def test_signature_name() -> None:
    assert rest_json.signature_name({}) == ""
    assert rest_json.signature_name({"signature_name": "s"}) == "s"
    with pytest.raises(InvalidArgument, match="key must be a string"):
        rest_json.signature_name({"signature_name": 1})
    with pytest.raises(InvalidArgument, match="lone surrogate"):
        rest_json.signature_name({"signature_name": "\ud800"})


@pytest.mark.parametrize(
    "text",
    ["2.2250738585072014e-308", "123456789012345678901234567890", "1" + 300 * "0", "0.1234567890123456789"],
)
def test_numbers_are_rounded_correctly(text: str) -> None:
    for constant in ("", ", NaN"):  # two parsers
        document = rest_json.parse(f'{{"inputs": [{text}{constant}]}}')
        assert only(document, "double")[0] == float(text)


@pytest.mark.parametrize("constant", ["", ', "a": NaN'])
def test_numbers_too_large_for_a_double(constant: str) -> None:
    for number in ("1e400", "-1e400", "1" + 400 * "0", "1" + 400 * "0" + ".5"):
        with pytest.raises(InvalidArgument, match=r"Number too big to be stored in double\.$"):
            only(rest_json.parse(f'{{"inputs": [{number}]{constant}}}'), "double")


def test_large_numbers_that_fit() -> None:
    assert only({"inputs": [2**24 - 1, 16777216.0, 3e38, 2**70]}, "float").dtype == np.float32
    assert only({"inputs": [2**63 - 1, -(2**63)]}, "int64").tolist() == [2**63 - 1, -(2**63)]
    assert only({"inputs": [2**64 - 1]}, "uint64").tolist() == [2**64 - 1]


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_several_inputs_need_names(kind: str) -> None:
    document = {"instances": [[1]]} if kind == "rows" else {"inputs": [1]}
    with pytest.raises(InvalidArgument, match="expecting"):
        inputs(document, a="float", b="float")


def test_a_signature_without_inputs() -> None:
    with pytest.raises(InvalidArgument, match="Failed to get input map for signature: DEFAULT"):
        inputs({"inputs": []})


def test_types_that_json_requests_cannot_hold() -> None:
    for dtype in ("half", "complex64"):
        with pytest.raises(Unimplemented, match=dtype):
            only({"inputs": [1]}, dtype)
        with pytest.raises(
            InvalidArgument, match=f"UNIMPLEMENTED: Conversion of JSON Value: 1 to type: {dtype}"
        ):
            only({"instances": [1]}, dtype)


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(InvalidArgument) as info:
        inputs({"instances": [{"x": ["y" * 100] * 100000, "z": 1}]}, x="string")
    assert len(str(info.value)) < 500


_NUMBERS: dict[int, st.SearchStrategy[Any]] = {
    types_pb2.DT_FLOAT: st.floats(width=32, allow_nan=False, allow_subnormal=False),
    types_pb2.DT_DOUBLE: st.floats(allow_nan=False, allow_subnormal=False),
    types_pb2.DT_INT64: st.integers(-(2**63), 2**63 - 1),
    types_pb2.DT_UINT8: st.integers(0, 255),
    types_pb2.DT_BOOL: st.booleans(),
    types_pb2.DT_STRING: st.binary(max_size=8),
}


@given(st.data(), st.lists(st.integers(0, 4), max_size=3), st.sampled_from(sorted(_NUMBERS)))
def test_round_trip(data: st.DataObject, shape: list[int], dtype: int) -> None:
    count = math.prod(shape)
    flat = np.empty(count, numpy_dtype(dtype))
    flat[:] = data.draw(st.lists(_NUMBERS[dtype], min_size=count, max_size=count))
    array = flat.reshape(shape)
    # A zero dimension hides those behind it from JSON.
    visible = shape[: shape.index(0) + 1] if 0 in shape else shape

    def encode(value: Any) -> Any:
        if isinstance(value, list):
            return [encode(item) for item in value]
        return {"b64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value

    spec = TensorSpec("x", "x:0", dtype, None)
    document = rest_json.parse(json.dumps({"inputs": {"x": encode(array.tolist())}}))
    result = rest_json.predict_inputs(document, {"x": spec})["x"]
    assert result.dtype == array.dtype, dtype_name(dtype)
    assert result.shape == tuple(visible)
    np.testing.assert_array_equal(result, array.reshape(visible))


_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "b64", "y"]), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["instances", "inputs", "examples", "context", "signature_name"]), _JSON, min_size=1
    ),
    st.sampled_from(["float", "int8", "uint64", "bool", "string", "half"]),
)
def test_any_json_gives_tensors_or_a_spikeless_error(document: dict[str, Any], dtype: str) -> None:
    with contextlib.suppress(SpikelessError):
        rest_json.predict_inputs(document, specs(x=dtype))
    with contextlib.suppress(SpikelessError):
        examples(document)


def examples(document: dict[str, Any]) -> Any:
    return rest_json.examples_input(document)


def test_examples() -> None:
    document = rest_json.parse(
        '{"examples": [{"f": 1.5, "i": [1, true], "s": ["a", {"b64": "/w=="}], "none": []},'
        ' {"f": [2.0, 3.5]}]}'
    )
    first, second = examples(document).example_list.examples
    feature = first.features.feature
    assert feature["f"].float_list.value == [1.5]
    assert feature["i"].int64_list.value == [1, 1]
    assert feature["s"].bytes_list.value == [b"a", b"\xff"]
    assert feature["none"].WhichOneof("kind") is None
    assert second.features.feature["f"].float_list.value == [2.0, 3.5]


def test_examples_with_context() -> None:
    result = examples({"examples": [{"a": 1}], "context": {"c": "x"}}).example_list_with_context
    assert result.context.features.feature["c"].bytes_list.value == [b"x"]
    assert len(result.examples) == 1


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "key 'examples' is expected"),
        ({"examples": {}}, "to be an list/array"),
        ({"examples": []}, "is an empty array"),
        ({"examples": [1]}, "Example must be JSON object but got JSON Number"),
        ({"examples": [{"a": None}]}, "Feature: a has element with unexpected JSON type: Null"),
        ({"examples": [{"a": [[1]]}]}, "Feature: a has element with unexpected JSON type: Array"),
        ({"examples": [{"a": {"x": 1}}]}, "Feature: a has element with unexpected JSON type: Object"),
        ({"examples": [{"a": [1, 2.5]}]}, "Unexpected element type in feature: a expecting type: int64"),
        ({"examples": [{"a": ["x", 1]}]}, "Unexpected element type in feature: a expecting type: bytes"),
        ({"examples": [{"a": 2**63}]}, "9223372036854775808"),
    ],
)
def test_examples_refusals(document: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        examples(document)
