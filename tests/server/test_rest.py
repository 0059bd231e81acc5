"""The REST API: paths, bodies, status codes and error texts."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import math
import socket
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from harness import IS_EMBEDDED, Running, ServerFactory, put_version
from prometheus_client.parser import text_string_to_metric_families


class Http:
    """A connection that is kept alive, as clients keep it."""

    def __init__(self, url: str) -> None:
        self.connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)

    def __call__(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """The status, and the parsed JSON (which may hold NaN) of the answer."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        self.connection.request(method, path, content, headers or {})
        response = self.connection.getresponse()
        text = response.read()
        self.headers = response.headers
        return response.status, json.loads(text) if text else None


@pytest.fixture
def request_(shared: Running) -> Http:
    return Http(shared.rest_url)


def predict(call: Http, model: str, body: Any, where: str = "") -> Any:
    status, answer = call("POST", f"/v1/models/{model}{where}:predict", body)
    assert status == 200, answer
    return answer


def refusal(call: Http, path: str, body: Any, method: str = "POST") -> tuple[int, str]:
    status, answer = call(method, f"/v1/models/{path}", body)
    assert set(answer) == {"error"}, answer
    return status, answer["error"]


# --- :predict -------------------------------------------------------------------------


def test_rows_of_one_input(request_: Http) -> None:
    answer = predict(request_, "signatures", {"instances": [[1, 0, 0, 0], [0, 1, 0, 0]]})
    assert answer == {"predictions": [[0.0, 1.0], [2.0, 3.0]]}
    assert request_.headers["Content-Type"] == "application/json"
    # Objects and plain values are the same for one input.
    named = predict(request_, "signatures", {"instances": [{"x": [1, 0, 0, 0]}, {"x": [0, 1, 0, 0]}]})
    assert named == answer


def test_columns_of_one_input(request_: Http) -> None:
    assert predict(request_, "times", {"inputs": [1, 2.5]}) == {"outputs": [2.0, 5.0]}
    assert predict(request_, "times", {"inputs": {"x": [1, 2.5]}}) == {"outputs": [2.0, 5.0]}
    body = {"signature_name": "any_rank", "inputs": 1}
    assert predict(request_, "signatures", body) == {"outputs": 2.0}, "a scalar"
    body["inputs"] = [[[[1]]]]
    assert predict(request_, "signatures", body) == {"outputs": [[[[2.0]]]]}


ROWS = [
    {"ids": 1, "name": "a", "flag": [True], "weight": [1, 1.5, 1]},
    {"ids": 2, "name": {"b64": base64.b64encode(b"b").decode()}, "flag": [False], "weight": [2, 2, 2]},
]
COLUMNS = {key: [row[key] for row in ROWS] for key in ROWS[0]}


def test_several_inputs_and_outputs(request_: Http) -> None:
    body: dict[str, Any] = {"signature_name": "mixed", "instances": ROWS}
    assert predict(request_, "signatures", body) == {
        "predictions": [{"text": "a-1", "total": 4.5}, {"text": "b-2", "total": -4.0}]
    }
    body = {"signature_name": "mixed", "inputs": COLUMNS}
    assert predict(request_, "signatures", body) == {
        "outputs": {"text": ["a-1", "b-2"], "total": [4.5, -4.0]}
    }


def test_version_and_label(request_: Http) -> None:
    body = {"instances": [1.0]}
    assert predict(request_, "times", body) == {"predictions": [2.0]}
    assert predict(request_, "times", body, "/versions/1") == {"predictions": [1.0]}
    assert predict(request_, "times", body, "/versions/2") == {"predictions": [2.0]}
    assert predict(request_, "times", body, "/labels/stable") == {"predictions": [1.0]}
    assert predict(request_, "times", body, "/labels/canary") == {"predictions": [2.0]}
    assert predict(request_, "%74imes", body) == {"predictions": [2.0]}, "percent-encoded"


@pytest.mark.parametrize(
    ("signature", "values"),
    [
        ("float32", [[1.5, -0.25], [3.4e38, 1.2e-38]]),
        ("float64", [[0.1, -1e300], [1 / 3, 0.0]]),
        ("int8", [[-128, 127]]),
        ("int16", [[-32768, 32767]]),
        ("int32", [[-(2**31), 2**31 - 1]]),
        ("int64", [[-(2**63), 2**63 - 1]]),
        ("uint8", [[0, 255]]),
        ("uint32", [[0, 2**32 - 1]]),
        ("uint64", [[0, 2**64 - 1]]),
        ("bool", [[True, False], [False, True]]),
        ("string", [["", 'quotes " and \\ and \n'], ["毛刺", "\u0000x"]]),
    ],
)
def test_every_type_that_json_can_hold(request_: Http, signature: str, values: list[list[Any]]) -> None:
    for key, back in (("instances", "predictions"), ("inputs", "outputs")):
        (answer,) = predict(request_, "dtypes", {"signature_name": signature, key: values}).values()
        assert back in predict(request_, "dtypes", {"signature_name": signature, key: values})
        if signature == "float32":
            assert np.array_equal(np.array(answer, np.float32), np.array(values, np.float32))
        else:
            assert answer == values
            assert [type(value) for row in answer for value in row] == [
                type(value) for row in values for value in row
            ]


def test_numbers_that_json_does_not_know(request_: Http) -> None:
    answer = predict(request_, "times", b'{"instances": [NaN, Infinity, -Infinity, 1.5]}')
    first, *others = answer["predictions"]
    assert math.isnan(first)
    assert others == [math.inf, -math.inf, 3.0]


def test_numbers_are_rounded_to_their_type(request_: Http) -> None:
    whole = [16777217, 1700000000123, 2**63 - 1, -(2**63), 2**64 - 1, 2**64]
    large = [1e39, -1e39]
    for signature, dtype in (("float32", np.float32), ("float64", np.float64)):
        values = {"signature_name": signature, "inputs": [[*whole, *large]]}
        (answer,) = predict(request_, "dtypes", values)["outputs"]
        with np.errstate(over="ignore"):
            expected = np.array([*map(float, whole), *large]).astype(dtype)
        np.testing.assert_array_equal(np.array(answer, dtype), expected)
    body = b'{"signature_name": "regress", "examples": [{"x": [1e39, 1.0, 1.0, 1.0]}]}'
    status, answer = request_("POST", "/v1/models/examples:regress", body)
    assert (status, answer) == (200, {"results": [math.inf]})


@pytest.mark.parametrize(("signature", "normal"), [("float32", 1.2e-38), ("float64", 2.3e-308)])
def test_denormal_numbers_are_zero(request_: Http, signature: str, normal: float) -> None:
    body = {"signature_name": signature, "inputs": [[normal / 2, -normal / 2, normal, -normal]]}
    (answer,) = predict(request_, "dtypes", body)["outputs"]
    assert answer == [0, 0, normal, -normal]
    assert np.signbit(answer).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    "body",
    [
        b'{"instances": [1.0], "instances": [2.0]}',
        b'{"inputs": {"x": [1.0], "x": [2.0]}}',
        b'{"instances": [{"x": 1.0, "x": 2.0}]}',
        b'{"a": 1, "a": 2, "instances": [1.0]}',
        b'{"signature_name": "serving_default", "signature_name": "no", "instances": [1.0]}',
        b'{"instances": [1.0]} more {',
        b'{"instances": [1.0]}\xff\x00',
        b'\xef\xbb\xbf{"instances": [1.0]}',
        b'{"a": Inf, "b": ":", "instances": [1.0]}',
        b'{"a": ' + 1000 * b"[" + 1000 * b"]" + b', "instances": [1.0]}',
    ],
)
def test_what_is_read_beyond_json(request_: Http, body: bytes) -> None:
    assert list(predict(request_, "times", body).values()) == [[2.0]]


def test_the_last_of_equal_features_counts(request_: Http) -> None:
    example = b'{"x": [1.0, 1.0, 1.0, 1.0], "bias": 0.5, "bias": 1.5}'
    body = b'{"signature_name": "regress", "examples": [' + example + b'], "examples": []}'
    status, answer = request_("POST", "/v1/models/examples:regress", body)
    assert (status, answer) == (200, {"results": [5.5]})


def test_infinity_has_a_short_name(request_: Http) -> None:
    answer = predict(request_, "times", b'{"instances": [Inf, -Inf, Infinity, NaN, -NaN], "a": "Inf -NaN"}')
    np.testing.assert_array_equal(answer["predictions"], [math.inf, -math.inf, math.inf, math.nan, math.nan])
    status, _ = request_("POST", "/v1/models/times:predict", b'{"instances": [Infi]}')
    assert status == 400


def test_strings_that_are_no_text(embedded: None, request_: Http) -> None:
    for text in (b"\xff\xfe", b"\\ud800", b"\\udc00"):
        body = b'{"signature_name": "string", "inputs": [["' + text + b'"]]}'
        status, error = refusal(request_, "dtypes:predict", body)
        assert (status, "is not valid Unicode" in error) == (400, True), error
        assert predict(request_, "times", b'{"unused": "' + text + b'", "instances": [1.0]}')


def test_base64(request_: Http) -> None:
    """Padding is all there or left out, or dots; white space counts nowhere."""
    for text, decoded in {
        "YQ==": "a",
        "YQ": "a",
        "YQ..": "a",
        "YQ.=": "a",
        "YWI.": "ab",
        " Y Q\n=\t=": "a",
        "": "",
    }.items():
        body = {"signature_name": "string", "instances": [[{"b64": text}, "b"]]}
        assert predict(request_, "dtypes", body) == {"predictions": [[decoded, "b"]]}
    for text in (
        "Y",
        "YQ=",
        "YQ.",
        "YWI==",
        "YWJj=",
        "=",
        "....",
        "YQ==YQ==",
        "Y-__",
        "YQ\u00a0==",
        "YQ==\0",
    ):
        body = {"signature_name": "string", "instances": [[{"b64": text}, "b"]]}
        status, error = refusal(request_, "dtypes:predict", body)
        assert (status, "Unable to base64 decode" in error) == (400, True), (text, error)


def test_keys_do_not_end_at_a_zero(embedded: None, request_: Http) -> None:
    status, error = refusal(request_, "times:predict", {"instances": [{"x\0y": 1.0}]})
    assert (status, "does not have named input: x\0y" in error) == (400, True), error
    body = {"signature_name": "regress", "examples": [{"x": [1.0, 1.0, 1.0, 1.0], "bias\0": 9.0}]}
    assert request_("POST", "/v1/models/examples:regress", body) == (200, {"results": [4.0]})


def test_the_first_of_equal_keys_counts_everywhere(embedded: None, request_: Http) -> None:
    body = b'{"instances": [{"x": 1.0, "x": "a"}]}'
    assert predict(request_, "times", body) == {"predictions": [2.0]}
    body = b'{"signature_name": "string", "inputs": [[{"b64": "YQ==", "b64": "Yg=="}]]}'
    assert predict(request_, "dtypes", body) == {"outputs": [["a"]]}


def test_nesting_has_an_end(embedded: None, request_: Http) -> None:
    for body in (b'{"instances": ' + 33 * b"[" + b"1" + 33 * b"]" + b"}", b'{"a": ' + 50_000 * b"["):
        status, _ = request_("POST", "/v1/models/times:predict", body)
        assert status == 400
    assert predict(request_, "times", {"instances": [1.0]}) == {"predictions": [2.0]}


def test_whole_numbers_of_floating_point_keep_a_fraction(request_: Http) -> None:
    assert isinstance(predict(request_, "times", {"instances": [1]})["predictions"][0], float)


@pytest.mark.parametrize("signature", ["float16", "bfloat16", "complex64", "complex128", "uint16"])
def test_types_that_json_cannot_hold(request_: Http, signature: str) -> None:
    name = {"float16": "half"}.get(signature, signature)
    message = f"Conversion of JSON Value: 1 to type: {name}"
    for key, status, words in (("inputs", 501, ""), ("instances", 400, "Error: UNIMPLEMENTED: ")):
        body = {"signature_name": signature, key: [[1, 2]]}
        refused = refusal(request_, "dtypes:predict", body)
        assert refused[0] == status
        assert words + message in refused[1]


def test_small_integers_do_not_wrap(embedded: None, request_: Http) -> None:
    status, error = refusal(request_, "dtypes:predict", {"signature_name": "uint8", "instances": [[256, 0]]})
    assert status == 400
    assert "JSON Value: 256 Type: Number is not of expected type: uint8" in error


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "gzip, identity", "deflate, gzip"])
def test_packed_bodies(request_: Http, encoding: str) -> None:
    body = gzip.compress(json.dumps({"instances": [1.0]}).encode())
    status, answer = request_("POST", "/v1/models/times:predict", body, {"Content-Encoding": encoding})
    assert (status, answer) == (200, {"predictions": [2.0]})


def test_bodies_with_other_encodings_are_taken_as_they_are(request_: Http) -> None:
    plain = b'{"instances": [1.0]}'
    for encoding in ("identity", "deflate", "br", "GZIP"):
        for body, expected in ((plain, 200), (gzip.compress(plain), 400)):
            status, _ = request_("POST", "/v1/models/times:predict", body, {"Content-Encoding": encoding})
            assert status == expected, encoding


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: b'{"instances": [1.0]}',
        lambda packed: packed[:-4],
        lambda packed: packed[:-12],
        lambda packed: packed[:-8] + b"abcdefgh",
        lambda packed: packed + b"more",
        lambda packed: packed + packed,
        gzip.compress,
        lambda packed: b"",
    ],
)
def test_bodies_that_are_not_what_they_say(request_: Http, change: Callable[[bytes], bytes]) -> None:
    body = change(gzip.compress(b'{"instances": [1.0]}'))
    for encoding in ("gzip", "gzip, gzip"):
        headers = {"Content-Encoding": encoding}
        assert request_("POST", "/v1/models/times:predict", body, headers)[0] == 400


# --- how :predict refuses -------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "body", "status", "message"),
    [
        ("times", b"", 400, "JSON Parse error: The document is empty"),
        ("times", b"{", 400, "JSON Parse error: "),
        ("times", b"\xff\xfe", 400, "JSON Parse error: "),
        ("times", [1], 400, "Is not object"),
        ("times", {}, 400, "Missing 'inputs' or 'instances' key"),
        (
            "times",
            {"instances": [1], "inputs": [1]},
            400,
            "expecting only one of 'inputs' or 'instances' keys",
        ),
        ("times", {"instances": 1}, 400, "Expecting 'instances' to be an list/array"),
        ("times", {"instances": []}, 400, "No values in 'instances' array"),
        (
            "times",
            {"instances": [1, "a"]},
            400,
            "Failed to process element: 1 of 'instances' list. Error: INVALID_ARGUMENT: "
            'JSON Value: "a" Type: String is not of expected type: float',
        ),
        ("times", {"inputs": ["a"]}, 400, 'JSON Value: "a" Type: String is not of expected type: float'),
        ("times", {"instances": [True]}, 400, "JSON Value: true Type: True is not of expected type: float"),
        ("times", {"instances": [None]}, 400, "Type: Null is not of expected type: float"),
        ("times", b'{"instances": [1e400]}', 400, "JSON Parse error: Number too big to be stored in double."),
        ("times", {"instances": [{"y": 1}]}, 400, "Failed to process element: 0 key: y of 'instances' list."),
        ("times", {"instances": [1, [2]]}, 400, "Failed to process element: 1 of 'instances' list."),
        ("times", {"instances": [1, [2]]}, 400, "Expecting shape [] but got: [1]"),
        ("times", {"instances": [1, [2, 3]]}, 400, "Expecting tensor size: 1 but got: 2"),
        ("times", {"inputs": [1, [2]]}, 400, "Encountered list at unexpected level: 1 expected < 1"),
        (
            "times",
            {"inputs": [[1], 2]},
            400,
            "JSON Value: 2 found at incorrect level: 2 in the JSON DOM.",
        ),
        (
            "times",
            {"instances": [1, {"x": 2}]},
            400,
            "Expecting value/list but got object at item 1 of input",
        ),
        ("times", {"instances": [{"x": 1}, 2]}, 400, "Expecting object but got list at item 1 of input list"),
        (
            "times",
            {"signature_name": 1, "instances": [1]},
            400,
            "'signature_name' key must be a string value.",
        ),
        (
            "times",
            {"signature_name": "no", "instances": [1]},
            400,
            'Serving signature name: "no" not found in signature def',
        ),
        ("signatures", {"instances": [[1, 2, 3, 4], [1, 2]]}, 400, "Expecting tensor size: 4 but got: 2"),
        (
            "signatures",
            {"signature_name": "mixed", "instances": [1]},
            400,
            "instances is a plain list, but expecting list of objects as multiple input tensors required",
        ),
        (
            "signatures",
            {"signature_name": "mixed", "inputs": [1]},
            400,
            "inputs is a plain value/list, but expecting an object as multiple input tensors required",
        ),
        (
            "signatures",
            {"signature_name": "mixed", "inputs": {"ids": [1]}},
            400,
            " in 'inputs' object.",
        ),
        (
            "signatures",
            {"signature_name": "gather", "instances": [99]},
            400,
            "indices[0] = 99 is not in [0, 10)",
        ),
        (
            "signatures",
            {"signature_name": "gather", "instances": [1.5]},
            400,
            "is not of expected type: int32",
        ),
        (
            "signatures",
            {"signature_name": "fixed", "instances": [[1, 2, 3], [4, 5, 6]]},
            400,
            "Tensor name: sum has no shape information",
        ),
        ("nobody", {"instances": [1]}, 404, "Servable not found for request: Latest(nobody)"),
        ("times/versions/9", {"instances": [1]}, 404, "Servable not found for request: Specific(times, 9)"),
        ("times/labels/no", {"instances": [1]}, 400, "Unrecognized servable version label: no"),
    ],
)
def test_how_predict_refuses(request_: Http, model: str, body: Any, status: int, message: str) -> None:
    code, error = refusal(request_, f"{model}:predict", body)
    assert code == status, error
    assert message in error


def test_versions_that_are_no_numbers_of_64_bits(embedded: None, request_: Http) -> None:
    for version in (2**63, 10**30, "1" * 5000):
        path = f"times/versions/{version}:predict"
        status, error = refusal(request_, path, {"instances": [1]})
        assert (status, error.startswith("Failed to convert version: ")) == (400, True), error


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models/times:predict"),
        ("POST", "/v1/models/times"),
        ("POST", "/v1/models/times:explain"),
        ("POST", "/v1/models/times:PREDICT"),
        ("GET", "/v1/models/times/versions/x"),
        ("GET", "/v1/models/times/versions/1/labels/a"),
        ("PUT", "/v1/models/times:predict"),
        ("DELETE", "/v1/models/times"),
        ("GET", "/v1/"),
        ("POST", "/v1/models/:predict"),
        ("POST", "/v1/models/times:predict?key=1"),
        ("GET", "/v1/models/times/metadata?key=1"),
    ],
)
def test_malformed_requests(request_: Http, method: str, path: str) -> None:
    status, answer = request_(method, path, {} if method == "POST" else None)
    assert (status, answer) == (400, {"error": f"Malformed request: {method} {path}"})


def test_other_paths_are_not_found(shared: Running) -> None:
    connection = http.client.HTTPConnection(urlsplit(shared.rest_url).netloc, timeout=30)
    others = () if IS_EMBEDDED else ("/v2/models/times",)
    for path in ("/", "/index.html", "/v3/models/times", *others):
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        assert response.status == 404


def test_paths_that_are_escaped_badly(shared: Running) -> None:
    connection = http.client.HTTPConnection(urlsplit(shared.rest_url).netloc, timeout=30)
    connection.request("GET", "/v1/models/%zz")
    assert connection.getresponse().status == 400


def test_names_that_are_no_text(embedded: None, request_: Http) -> None:
    assert refusal(request_, "%ff", None, "GET") == (400, "Failed to decode model name:%ff")


def test_a_query_behind_the_path_of_metrics(embedded: None, shared: Running) -> None:
    connection = http.client.HTTPConnection(urlsplit(shared.rest_url).netloc, timeout=30)
    connection.request("GET", "/monitoring/prometheus/metrics?job=times")
    assert connection.getresponse().status == 200


def test_a_name_is_missing(request_: Http) -> None:
    for path in ("/v1/models", "/v1/models/versions/1", "/v1/models/labels/stable/metadata"):
        status, answer = request_("GET", path)
        assert (status, answer) == (400, {"error": "Missing model name in request."})


# --- :classify and :regress -----------------------------------------------------------

ONES = {"x": [1.0, 1.0, 1.0, 1.0]}
TENS = {"x": [10.0, 10.0, 10.0, 10.0], "bias": 0.5}


def test_classify(request_: Http) -> None:
    body = {"signature_name": "classify", "examples": [ONES, TENS]}
    status, answer = request_("POST", "/v1/models/examples:classify", body)
    assert (status, answer) == (
        200,
        {"results": [[["no", 4.0], ["yes", 4.0]], [["no", 40.5], ["yes", 40.5]]]},
    )


def test_regress(request_: Http) -> None:
    body: dict[str, Any] = {"signature_name": "regress", "examples": [ONES, TENS]}
    status, answer = request_("POST", "/v1/models/examples/versions/1:regress", body)
    assert (status, answer) == (200, {"results": [4.0, 40.5]})
    body = {"signature_name": "regress", "context": {"bias": 2.5}, "examples": [ONES, ONES]}
    status, answer = request_("POST", "/v1/models/examples:regress", body)
    assert (status, answer) == (200, {"results": [6.5, 6.5]})


@pytest.mark.parametrize("method", ["classify", "regress"])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "key 'examples' is expected and was not found"),
        ({"examples": 1}, "Expecting 'examples' value to be an list/array"),
        ({"examples": []}, "'examples' value is an empty array"),
        ({"examples": [1]}, "Example must be JSON object but got JSON Number"),
        ({"examples": [{"x": None}]}, "Feature: x has element with unexpected JSON type: Null"),
        ({"examples": [{"x": [1.5, "a"]}]}, "Unexpected element type in feature: x"),
        ({"signature_name": "no", "examples": [ONES]}, "No signature was found with the name: no"),
    ],
)
def test_how_classify_and_regress_refuse(request_: Http, method: str, body: Any, message: str) -> None:
    status, error = refusal(request_, f"examples:{method}", {"signature_name": method, **body})
    assert status == 400
    assert message in error


# --- status and metadata --------------------------------------------------------------


def available(version: int) -> dict[str, Any]:
    return {
        "version": str(version),
        "state": "AVAILABLE",
        "status": {"error_code": "OK", "error_message": ""},
    }


def test_status(request_: Http) -> None:
    status, answer = request_("GET", "/v1/models/times")
    assert (status, answer) == (200, {"model_version_status": [available(2), available(1)]})
    status, answer = request_("GET", "/v1/models/times/versions/1")
    assert (status, answer) == (200, {"model_version_status": [available(1)]})
    status, answer = request_("GET", "/v1/models/times/labels/canary")
    assert (status, answer) == (200, {"model_version_status": [available(2), available(1)]}), "of no use here"
    assert refusal(request_, "nobody", None, "GET") == (404, "Could not find any versions of model nobody")
    # A query is part of the name, as TensorFlow Serving takes paths.
    assert refusal(request_, "times?key=1", None, "GET") == (
        404,
        "Could not find any versions of model times?key=1",
    )
    assert refusal(request_, "times/versions/9", None, "GET") == (
        404,
        "Could not find version 9 of model times",
    )


def test_metadata(request_: Http) -> None:
    status, answer = request_("GET", "/v1/models/signatures/metadata")
    assert status == 200
    assert answer["model_spec"] == {"name": "signatures", "signature_name": "", "version": "1"}
    signatures = answer["metadata"]["signature_def"]["signature_def"]
    default = signatures["serving_default"]
    assert default["method_name"] == "tensorflow/serving/predict"
    assert default["inputs"]["x"]["dtype"] == "DT_FLOAT"
    assert default["inputs"]["x"]["tensor_shape"] == {
        "dim": [{"size": "-1", "name": ""}, {"size": "4", "name": ""}],
        "unknown_rank": False,
    }
    status, answer = request_("GET", "/v1/models/times/labels/stable/metadata")
    assert answer["model_spec"]["version"] == "1"
    assert refusal(request_, "nobody/metadata", None, "GET") == (
        404,
        "Servable not found for request: Latest(nobody)",
    )


def test_metrics(shared: Running, request_: Http) -> None:
    predict(request_, "times", {"instances": [1.0]})
    request_("GET", "/v1/models/times")
    refusal(request_, "nobody:predict", {"instances": [1.0]})
    connection = http.client.HTTPConnection(urlsplit(shared.rest_url).netloc, timeout=30)
    connection.request("GET", "/monitoring/prometheus/metrics")
    response = connection.getresponse()
    text = response.read().decode()
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/plain")
    assert ':tensorflow:serving:request_count{model_name="times",status="OK"}' in text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def is_there(name: str, **labels: str) -> bool:
        """Whether there is a series with these labels, and perhaps others."""
        # The parser gives counters an ending that they do not have.
        names = {name, f"{name}_total"}
        return any(sample.name in names and labels.items() <= sample.labels.items() for sample in samples)

    # TensorFlow Serving's buckets, and its names for each API: in small letters over
    # REST.
    rest, runtime = {"API": "predict", "entrypoint": "REST"}, {"API": "Predict", "runtime": "TF1"}
    for bound in ("10", "18", "32.4", "188.957", "708235", "1.27482e+06", "+Inf"):
        assert is_there(":tensorflow:serving:request_latency_bucket", model_name="times", le=bound, **rest)
        assert is_there(":tensorflow:serving:runtime_latency_bucket", model_name="times", le=bound, **runtime)
    assert "# TYPE :tensorflow:serving:request_count counter" in text
    assert "# TYPE :tensorflow:serving:request_latency histogram" in text
    # Requests for states and signatures count too, without the name of an API.
    assert is_there(
        ":tensorflow:serving:request_latency_count", model_name="times", API="", entrypoint="REST"
    )
    path = str(shared.server.log_path.parent / "times" / "2")
    assert is_there(":tensorflow:cc:saved_model:load_latency", model_path=path)
    if IS_EMBEDDED:
        assert is_there(":tensorflow:cc:saved_model:load_attempt_count", model_path=path, status="success")
        assert 'spikeless_version_state{model_name="times",state="AVAILABLE",version="2"} 1.0' in text
        assert 'spikeless_version_load_seconds{model_name="times",version="1"}' in text
        assert "nobody" not in text, "names that clients make up are no time series"
        private = next(line for line in text.splitlines() if line.startswith("spikeless_memory_private"))
        assert float(private.split()[1]) > 10e6


# --- a server of one's own ------------------------------------------------------------


def test_timeouts_and_cors(saved_models: Path, tmp_path: Path, serve: ServerFactory) -> None:
    put_version(saved_models / "times_one", tmp_path / "times", 1)
    flags = ("--rest_api_timeout_in_ms=100", "--rest_api_enable_cors_support=true")
    with serve(*flags, model_name="times", model_base_path=tmp_path / "times", rest=True) as running:
        call = Http(running.rest_url)
        status, error = refusal(call, "times:predict", {"signature_name": "spin", "inputs": 1_000_000})
        assert status == 504, error
        assert predict(call, "times", {"instances": [1.5]}) == {"predictions": [1.5]}
        assert call.headers["Access-Control-Allow-Origin"] == "*"
        assert call.headers["Access-Control-Allow-Methods"] == "POST, GET"
        assert call.headers["Access-Control-Allow-Headers"] == "Content-Type"
        status, _ = call("OPTIONS", "/v1/models/times:predict", headers={"Origin": "https://example.org"})
        assert status == 200
        assert call.headers["Access-Control-Allow-Origin"] == "*"


def test_cors_is_off_by_default(request_: Http) -> None:
    predict(request_, "times", {"instances": [1.5]})
    assert "Access-Control-Allow-Origin" not in request_.headers


def test_preflight_requests(request_: Http) -> None:
    """They need an origin, and are answered without the flag too."""
    for path in ("/v1/models/times:predict", "/v1/anything"):
        assert request_("OPTIONS", path, headers={"Origin": "http://example.org"})[0] == 200
        assert "Access-Control-Allow-Origin" not in request_.headers
        for headers in ({}, {"Origin": "null"}):
            assert request_("OPTIONS", path, headers=headers)[0] == 400


def test_methods_that_there_are_not(shared: Running) -> None:
    for method in ("TRACE", "BREW"):
        connection = http.client.HTTPConnection(urlsplit(shared.rest_url).netloc, timeout=30)
        connection.request(method, "/v1/models/times:predict")
        assert connection.getresponse().status == 501
        connection.close()


# --- hard to break --------------------------------------------------------------------


def test_slow_clients_hold_no_worker(
    embedded: None, saved_models: Path, tmp_path: Path, serve: ServerFactory
) -> None:
    """Half-sent requests outnumber the workers; all others are still answered."""
    put_version(saved_models / "times_one", tmp_path / "times", 1)
    flags = ("--rest_api_num_threads=2",)
    with serve(*flags, model_name="times", model_base_path=tmp_path / "times", rest=True) as running:
        address = urlsplit(running.rest_url)
        half = b"POST /v1/models/times:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
        slow = [socket.create_connection((address.hostname, address.port or 0)) for _ in range(20)]
        try:
            for number, connection in enumerate(slow):
                connection.sendall(half[: 20 + 5 * number])
            assert predict(Http(running.rest_url), "times", {"instances": [1.5]}) == {"predictions": [1.5]}
        finally:
            for connection in slow:
                connection.close()
        assert predict(Http(running.rest_url), "times", {"instances": [1.5]}) == {"predictions": [1.5]}


def test_bodies_that_unpack_to_too_much(embedded: None, request_: Http) -> None:
    packer = zlib.compressobj(wbits=31)
    bomb = b"".join([packer.compress(b" " * (1 << 20)) for _ in range(300)]) + packer.flush()
    status, answer = request_("POST", "/v1/models/times:predict", bomb, {"Content-Encoding": "gzip"})
    assert status == 429
    assert "unpacks to more than" in answer["error"]


def test_a_length_over_the_limit_is_refused_at_once(embedded: None, shared: Running) -> None:
    address = urlsplit(shared.rest_url)
    with socket.create_connection((address.hostname, address.port or 0), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/models/times:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("request_line", "status"),
    [("GARBAGE", 400), ("GET http://[ HTTP/1.1", 400), ("GET / HTTP/1.1\r\nContent-Length: -5", 400)],
)
def test_what_is_refused_by_http_has_an_error_body(
    embedded: None, shared: Running, request_line: str, status: int
) -> None:
    address = urlsplit(shared.rest_url)
    with socket.create_connection((address.hostname, address.port or 0), timeout=30) as connection:
        connection.sendall(request_line.encode() + b"\r\n\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == status
        assert set(json.loads(response.read())) == {"error"}


def test_head_gets_no_body(embedded: None, shared: Running) -> None:
    """Or the body would be taken for the beginning of the next answer."""
    address = urlsplit(shared.rest_url)
    with socket.create_connection((address.hostname, address.port or 0), timeout=30) as connection:
        connection.sendall(b"HEAD /v1/models/times HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.endswith(b"\r\n\r\n")


def test_bodies_that_come_in_pieces(request_: Http) -> None:
    body = [b'{"instances"', b": [1.0]}"]
    headers = {"Transfer-Encoding": "chunked"}
    request_.connection.request("POST", "/v1/models/times:predict", iter(body), headers, encode_chunked=True)
    response = request_.connection.getresponse()
    assert (response.status, json.loads(response.read())) == (200, {"predictions": [2.0]})


def test_a_client_that_waits_to_be_told_to_go_on(shared: Running) -> None:
    address = urlsplit(shared.rest_url)
    head = b"POST /v1/models/times:predict HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
    with socket.create_connection((address.hostname, address.port or 0), timeout=30) as connection:
        connection.sendall(head + b"Content-Length: 20\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b'{"instances": [1.0]}')
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(("version", "header"), [("1.0", ""), ("1.1", "Connection: close\r\n")])
def test_connections_that_are_not_kept(shared: Running, version: str, header: str) -> None:
    address = urlsplit(shared.rest_url)
    request = f"GET /v1/models/times HTTP/{version}\r\nHost: x\r\n{header}\r\n"
    with socket.create_connection((address.hostname, address.port or 0), timeout=30) as connection:
        connection.sendall(request.encode())
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b" 200 " in received.splitlines()[0]


@pytest.mark.parametrize(
    "garbage",
    [b"\r\n\r\n", b"\x00" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00"],
)
def test_what_is_no_http(request_: Http, shared: Running, garbage: bytes) -> None:
    address = urlsplit(shared.rest_url)
    with socket.create_connection((address.hostname, address.port or 0), timeout=30) as connection:
        connection.sendall(garbage)
    assert predict(request_, "times", {"instances": [1.0]}) == {"predictions": [2.0]}
