"""Outputs to REST JSON, by TensorFlow Serving's rules."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import hypothesis.extra.numpy as arrays
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikeless.errors import InvalidArgument
from spikeless.formats import rest_json
from spikeless.formats.protos import classification_pb2, regression_pb2

Array = np.ndarray[Any, Any]
NUMBERS = ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint32", "uint64", "bool")


def predictions(**outputs: Array) -> Any:
    (answer,) = json.loads(rest_json.predict_body(outputs, rows=True)).values()
    return answer


def columns(**outputs: Array) -> Any:
    (answer,) = json.loads(rest_json.predict_body(outputs, rows=False)).values()
    return answer


def same(left: Array, right: Array) -> bool:
    """Equal shape and values, NaN equal to itself and zeros by their sign."""
    return left.shape == right.shape and left.tobytes() == right.tobytes()


@pytest.mark.parametrize("dtype", NUMBERS)
@given(data=st.data())
def test_numbers_come_back(dtype: str, data: st.DataObject) -> None:
    shape = data.draw(arrays.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=4))
    array = data.draw(arrays.arrays(np.dtype(dtype), shape))
    if array.dtype.kind == "f":
        array[np.isnan(array)] = np.nan
        # Those next to zero become zero.
        array[np.abs(array) < np.finfo(array.dtype).tiny] *= 0
    assert same(np.array(predictions(y=array), dtype=dtype), array)
    assert same(np.array(columns(y=array), dtype=dtype), array)
    two = predictions(y=array, z=array)
    assert [set(row) for row in two] == [{"y", "z"}] * len(array)
    assert same(np.array([row["y"] for row in two], dtype=dtype), array)
    scalar = columns(y=array.reshape(-1)[0])
    assert same(np.array(scalar, dtype=dtype), array.reshape(-1)[0])


@given(st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.5]), min_size=1, max_size=9))
def test_what_is_not_finite_keeps_its_place(values: list[float]) -> None:
    words = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity", "0.5": "0.5"}
    text = rest_json.predict_body({"y": np.array(values, np.float32)}, rows=False).decode()
    assert "[" + ",".join(words[str(value)] for value in values) + "]" in text


def test_views_and_transposed_arrays() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert predictions(y=array.transpose(2, 0, 1)) == array.transpose(2, 0, 1).tolist()
    assert predictions(y=array[:, ::2]) == array[:, ::2].tolist()


def test_floats_are_short_and_keep_a_fraction() -> None:
    body = rest_json.predict_body({"y": np.array([0.1, 3, -0.0], np.float32)}, rows=True)
    assert b"[0.1,3.0,-0.0]" in body


def test_strings() -> None:
    values = np.array([["a", 'quote "'], ["毛刺", "\n"]], dtype=object)
    encoded = np.array([[text.encode() for text in row] for row in values.tolist()], dtype=object)
    assert predictions(y=encoded) == values.tolist()
    assert columns(y=encoded[0, 0:1].reshape(())) == "a"
    assert predictions(y=encoded, z=encoded[:, 0])[1] == {"y": ["毛刺", "\n"], "z": "毛刺"}
    wrapped = {"b64": base64.b64encode(b"\xff\x00").decode()}
    assert predictions(image_bytes=np.array([b"\xff\x00"], dtype=object)) == [wrapped]
    body = rest_json.predict_body({"y": np.array([b"\xff"], dtype=object)}, rows=True)
    assert b'"\xff"' in body, "what is no text goes through as it is"


def test_empty_columns() -> None:
    assert columns(y=np.empty((0,), np.float32)) == []
    assert columns(y=np.empty((2, 0), np.float32)) == [[], []]
    assert predictions(y=np.empty((2, 0), np.float32)) == [[], []]


@pytest.mark.parametrize("shape", [(0,), (0, 2)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    empty = np.empty(shape, np.float32)
    assert predictions(y=empty) == []
    assert predictions(y=empty, z=np.empty(shape, np.int32), text=np.empty(shape, object)) == []


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({}, "Cannot convert empty tensor map to JSON"),
        ({"y": np.float32(1)}, "Tensor name: y has no shape information "),
        (
            {"y": np.ones(2, np.float32), "z": np.ones(3, np.float32)},
            "Tensor name: z has inconsistent batch size: 3 expecting: 2",
        ),
        ({"y": np.ones(2, np.float16)}, "Failed to write JSON value for tensor type: half"),
        ({"y": np.ones(2, ml_dtypes.bfloat16)}, "Failed to write JSON value for tensor type: bfloat16"),
        ({"y": np.ones(2, np.complex64)}, "Failed to write JSON value for tensor type: complex64"),
    ],
)
def test_outputs_that_are_no_answer(outputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        rest_json.predict_body({name: np.asarray(value) for name, value in outputs.items()}, rows=True)
    assert str(caught.value) == message


def test_classifications_and_regressions() -> None:
    result = classification_pb2.ClassificationResult()
    row = result.classifications.add()
    row.classes.add(label='a"b', score=0.1)
    row.classes.add(label="c", score=math.nan)
    result.classifications.add()
    body = rest_json.classify_body(result)
    assert b"NaN" in body
    assert json.loads(body.replace(b"NaN", b"1")) == {"results": [[['a"b', 0.1], ["c", 1]], []]}
    regression = regression_pb2.RegressionResult()
    regression.regressions.add(value=0.1)
    regression.regressions.add(value=2)
    assert json.loads(rest_json.regress_body(regression)) == {"results": [0.1, 2.0]}
    with pytest.raises(InvalidArgument, match="Cannot convert empty"):
        rest_json.classify_body(classification_pb2.ClassificationResult())
    with pytest.raises(InvalidArgument, match="Cannot convert empty"):
        rest_json.regress_body(regression_pb2.RegressionResult())


def test_errors_are_quoted() -> None:
    assert json.loads(rest_json.error_body('a "b"\n\x00 毛')) == {"error": 'a "b"\n\x00 毛'}
