"""Whatever is sent, the answer is a status, and the server goes on answering."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np
import pytest
from harness import Running
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from spikeless.formats.protos import predict_pb2, tensor_pb2, types_pb2

EXAMPLES = settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NUMBERS = sorted(types_pb2.DataType.values())

# --- gRPC: TensorProtos and messages of all kinds -------------------------------------

_DIMS = st.integers(-2, 4) | st.sampled_from([-(2**63), -1, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1])
_INT32 = st.integers(-(2**31), 2**31 - 1)
_FLOATS = st.floats(width=32)


@st.composite
def tensors(draw: st.DrawFn) -> tensor_pb2.TensorProto:
    proto = tensor_pb2.TensorProto(dtype=draw(st.sampled_from(NUMBERS) | st.integers(0, 300)))
    for size in draw(st.lists(_DIMS, max_size=4) | st.integers(5, 300).map(lambda rank: [1] * rank)):
        proto.tensor_shape.dim.add(size=size)
    proto.tensor_shape.unknown_rank = draw(st.booleans())
    proto.tensor_content = draw(st.just(b"") | st.binary(max_size=64))
    small: Any
    for field, small in {
        "float_val": _FLOATS,
        "double_val": st.floats(),
        "int_val": _INT32,
        "string_val": st.binary(max_size=8),
        "scomplex_val": _FLOATS,
        "int64_val": st.integers(-(2**63), 2**63 - 1),
        "bool_val": st.booleans(),
        "half_val": _INT32,
        "uint32_val": st.integers(0, 2**32 - 1),
        "uint64_val": st.integers(0, 2**64 - 1),
    }.items():
        getattr(proto, field).extend(draw(st.lists(small, max_size=4)))
    if draw(st.booleans()):
        proto.variant_val.add(type_name="tensorflow::TensorList", metadata=draw(st.binary(max_size=16)))
        proto.resource_handle_val.add(name=draw(st.text(max_size=5)))
    return proto


SIGNATURES = ("float32", "string", "bool", "bfloat16", "int8", "complex64")


def status_of(shared: Running, method: str, content: bytes) -> grpc.StatusCode:
    """The status that a call with these bytes as its message gets."""
    with grpc.insecure_channel(shared.server.target) as channel:
        call = channel.unary_unary(method, None, None)
        try:
            call(content, timeout=30)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


PREDICT = "/tensorflow.serving.PredictionService/Predict"
METHODS = (
    PREDICT,
    "/tensorflow.serving.PredictionService/Classify",
    "/tensorflow.serving.PredictionService/Regress",
    "/tensorflow.serving.PredictionService/MultiInference",
    "/tensorflow.serving.PredictionService/GetModelMetadata",
    "/tensorflow.serving.ModelService/GetModelStatus",
)


@EXAMPLES
@given(tensor=tensors(), signature=st.sampled_from(SIGNATURES))
@example(tensor=tensor_pb2.TensorProto(dtype=types_pb2.DT_RESOURCE), signature="float32")
@example(tensor=tensor_pb2.TensorProto(dtype=types_pb2.DT_VARIANT), signature="float32")
@example(tensor=tensor_pb2.TensorProto(dtype=types_pb2.DT_QINT8, int_val=[1]), signature="int8")
def test_any_tensor(shared: Running, tensor: tensor_pb2.TensorProto, signature: str) -> None:
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "dtypes", signature
    request.inputs["x"].CopyFrom(tensor)
    status = status_of(shared, PREDICT, request.SerializeToString())
    assert status in (
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )


@EXAMPLES
@given(content=st.binary(max_size=200), method=st.sampled_from(METHODS))
@example(content=b"\x0a\x04\x0a\x02\xff\xfe", method=PREDICT)  # a model name that is no UTF-8
@example(content=b"\x0b" * 200, method=PREDICT)  # groups within groups
def test_any_bytes(shared: Running, content: bytes, method: str) -> None:
    status = status_of(shared, method, content)
    assert status is not grpc.StatusCode.OK
    # What is no message never reaches the service; gRPC itself answers.
    assert status in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.UNIMPLEMENTED,
    )


@settings(EXAMPLES, max_examples=60)
@given(data=st.data())
def test_damaged_requests(shared: Running, data: st.DataObject) -> None:
    """A proper request with a few bytes changed, dropped or put in."""
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "signatures"
    request.inputs["x"].dtype = types_pb2.DT_FLOAT
    request.inputs["x"].tensor_shape.dim.add(size=1)
    request.inputs["x"].tensor_shape.dim.add(size=4)
    request.inputs["x"].tensor_content = np.ones(4, np.float32).tobytes()
    content = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(content) - 1))
        change = data.draw(st.sampled_from(["set", "drop", "insert"]))
        byte = data.draw(st.integers(0, 255))
        if change == "set":
            content[where] = byte
        elif change == "drop":
            del content[where]
        else:
            content.insert(where, byte)
    status_of(shared, PREDICT, bytes(content))


# --- REST -----------------------------------------------------------------------------

_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.just({"b64": "AP8="})
)
_JSON = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["x", "b64", "ids", "name", "flag", "weight", "y"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)
_BODIES = st.fixed_dictionaries(
    {},
    optional={
        "instances": _JSON,
        "inputs": _JSON,
        "examples": _JSON,
        "context": _JSON,
        "signature_name": st.sampled_from([*SIGNATURES, "mixed", "any_rank", "classify", ""]) | _LEAVES,
    },
)


@pytest.fixture(scope="module")
def connection(shared: Running) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(shared.rest_url).netloc, timeout=60)


def post(connection: http.client.HTTPConnection, path: str, body: bytes) -> int:
    connection.request("POST", path, body)
    response = connection.getresponse()
    answer = json.loads(response.read().decode("utf-8", "replace"))
    assert ("error" in answer) == (response.status != 200)
    return response.status


PATHS = [
    f"/v1/models/{model}:{method}"
    for model, methods in {
        "signatures": ["predict"],
        "dtypes": ["predict"],
        "examples": ["predict", "classify", "regress"],
    }.items()
    for method in methods
]


@EXAMPLES
@given(body=_BODIES, path=st.sampled_from(PATHS))
@example(body={"instances": [10**400]}, path="/v1/models/times:predict")
def test_any_json(connection: http.client.HTTPConnection, body: dict[str, Any], path: str) -> None:
    assert post(connection, path, json.dumps(body).encode()) in (200, 400, 404, 501)


@EXAMPLES
@given(body=st.binary(max_size=60) | st.text(alphabet='{}[]":,0123456789.eE+-tfnu\\b64x ', max_size=60))
@example(body='{"instances": [' + "9" * 100_000 + "]}")
@example(body='{"instances": ["\\ud800"]}')
def test_any_body(connection: http.client.HTTPConnection, body: bytes | str) -> None:
    content = body if isinstance(body, bytes) else body.encode()
    assert post(connection, "/v1/models/times:predict", content) in (200, 400)


@pytest.mark.parametrize(
    "body",
    [
        "[" * 100_000,
        '{"instances":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"instances":' + '{"x":' * 50_000 + "1" + "}" * 50_000 + "}",
    ],
    ids=["open", "lists", "objects"],
)
def test_deep_bodies(embedded: None, connection: http.client.HTTPConnection, body: str) -> None:
    """TensorFlow Serving crashes."""
    assert post(connection, "/v1/models/times:predict", body.encode()) == 400


@settings(EXAMPLES, max_examples=60)
@given(path=st.text(alphabet="/:%.?#1times23labelsversionsmetadatapredict ~é\x00", max_size=40))
def test_any_path(shared: Running, path: str) -> None:

    address = urlsplit(shared.rest_url)
    with socket.create_connection((address.hostname, address.port or 0), timeout=60) as raw:
        raw.sendall(b"GET /v1/models/" + path.encode() + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = b""
        while part := raw.recv(65536):
            received += part
    assert received.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 ", b"HTTP/1.1 404 ", b"HTTP/1.0 400 "))
