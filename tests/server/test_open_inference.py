"""The Open Inference Protocol (V2), which only the embedded engine has."""

from __future__ import annotations

import http.client
import json
import math
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from google.protobuf import descriptor_pool, json_format
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from harness import IS_EMBEDDED, Running, ServerFactory, put_version
from prometheus_client.parser import text_string_to_metric_families

import spikeless
from spikeless.channels import channel
from spikeless.formats.open_inference_messages import METHODS, SERVICE, message_class

pytestmark = pytest.mark.skipif(not IS_EMBEDDED, reason="TensorFlow Serving has no such API")

#: Datatype -> the signature of ``dtypes``, and values that are the same in bits after
#: JSON.
VALUES: dict[str, tuple[str, np.ndarray[Any, Any]]] = {
    "BOOL": ("bool", np.array([[True, False], [False, True]])),
    "UINT8": ("uint8", np.array([[0, 255]], np.uint8)),
    "UINT16": ("uint16", np.array([[0, 65535]], np.uint16)),
    "UINT32": ("uint32", np.array([[0, 2**32 - 1]], np.uint32)),
    "UINT64": ("uint64", np.array([[0, 2**64 - 1]], np.uint64)),
    "INT8": ("int8", np.array([[-128, 127]], np.int8)),
    "INT16": ("int16", np.array([[-32768, 32767]], np.int16)),
    "INT32": ("int32", np.array([[-(2**31), 2**31 - 1]], np.int32)),
    "INT64": ("int64", np.array([[-(2**63), 2**63 - 1]], np.int64)),
    "FP16": ("float16", np.array([[1.5, -65504.0], [0.1, 6e-8]], np.float16)),
    "BF16": ("bfloat16", np.array([[1.5, -2.0], [0.1, 3e38]], ml_dtypes.bfloat16)),
    "FP32": ("float32", np.array([[0.1, -0.0], [1 / 3, 3e38]], np.float32)),
    "FP64": ("float64", np.array([[0.1, -2.5], [1 / 3, 1e300]], np.float64)),
    "BYTES": ("string", np.array([[b"", b'"\\\n'], ["毛刺".encode(), b"x" * 300]], object)),
}
X = np.array([[1.0, 0.5, 0.25, 1e-3], [3, 2, 1, 1 / 3]], np.float32)


class Http:
    """Calls over one connection: the status and the JSON of the answer."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)

    def __call__(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        self._connection.request(method, path, content, headers or {})
        response = self._connection.getresponse()
        return response.status, json.loads(response.read())


@pytest.fixture
def call(shared: Running) -> Http:
    return Http(shared.rest_url)


def tensor(name: str, datatype: str, array: np.ndarray[Any, Any], **more: Any) -> dict[str, Any]:
    data = array.tolist()
    if datatype == "BYTES":
        data = [[string.decode() for string in row] for row in data]
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": data, **more}


def infer(call: Http, path: str, body: Any) -> dict[str, Any]:
    status, answer = call("POST", f"/v2/models/{path}/infer", body)
    assert status == 200, answer
    return dict(answer)


def predict(running: Running, signature: str, x: np.ndarray[Any, Any], model: str = "dtypes") -> Any:
    """The only output that the API of TensorFlow Serving answers with."""
    (output,) = running.client.predict(model, {"x": x}, signature).values()
    return output


# --- REST -----------------------------------------------------------------------------


def test_the_server(call: Http) -> None:
    status, answer = call("GET", "/v2")
    assert (status, answer["name"], answer["version"]) == (200, "spikeless", spikeless.__version__)
    assert call("GET", "/v2/") == (200, answer)
    assert call("GET", "/v2/health/live") == (200, {"live": True})
    assert call("GET", "/v2/health/ready") == (200, {"ready": True})


def test_metadata(call: Http) -> None:
    assert call("GET", "/v2/models/signatures") == (
        200,
        {
            "name": "signatures",
            "versions": ["1"],
            "platform": "tensorflow_savedmodel",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
            "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 2]}],
        },
    )
    status, answer = call("GET", "/v2/models/times/versions/1")
    assert (status, answer["versions"]) == (200, ["1", "2"])
    status, answer = call("GET", "/v2/models/dtypes")
    assert (status, answer) == (404, {"error": "model dtypes has no signature serving_default"})


@pytest.mark.parametrize("where", ["times", "times/versions/1", "times/versions/stable", "%74imes"])
def test_a_model_is_ready(call: Http, where: str) -> None:
    assert call("GET", f"/v2/models/{where}/ready") == (200, {"name": "times", "ready": True})


def test_what_is_not_there_is_not_ready(call: Http) -> None:
    assert call("GET", "/v2/models/nobody/ready") == (503, {"error": "model nobody is not ready"})
    assert call("GET", "/v2/models/times/versions/9/ready")[0] == 503
    assert call("GET", "/v2/models/times/versions/9")[0] == 404
    assert call("GET", "/v2/models/times/versions/nobody")[0] == 400


def test_the_answer_is_that_of_predict(call: Http, shared: Running) -> None:
    expected = predict(shared, "", X, "signatures")
    body = {"id": "42", "inputs": [tensor("x", "FP32", X)]}
    answer = infer(call, "signatures", body)
    assert {key: answer[key] for key in ("id", "model_name", "model_version")} == {
        "id": "42",
        "model_name": "signatures",
        "model_version": "1",
    }
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("scores", "FP32", [2, 2])
    assert np.array(output["data"], np.float32).tobytes() == expected.tobytes()
    # Flat data is the same.
    body["inputs"] = [{**tensor("x", "FP32", X), "data": X.ravel().tolist()}]
    assert infer(call, "signatures", body) == answer


@pytest.mark.parametrize("datatype", VALUES)
def test_every_datatype(call: Http, shared: Running, datatype: str) -> None:
    signature, values = VALUES[datatype]
    body = {"parameters": {"signature_name": signature}, "inputs": [tensor("x", datatype, values)]}
    (output,) = infer(call, "dtypes", body)["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("y", datatype, list(values.shape))
    expected = predict(shared, signature, values)
    if datatype == "BYTES":
        assert [text.encode() for text in output["data"]] == expected.ravel().tolist()
    else:
        assert np.array(output["data"], values.dtype).tobytes() == expected.tobytes()


def test_versions_and_labels(call: Http) -> None:
    body = {"inputs": [tensor("x", "FP32", np.ones(1, np.float32))]}
    for where, version in (("", "2"), ("/versions/1", "1"), ("/versions/stable", "1")):
        answer = infer(call, f"times{where}", body)
        assert (answer["model_version"], answer["outputs"][0]["data"]) == (version, [float(version)])


def test_several_inputs_and_a_choice_of_outputs(call: Http) -> None:
    inputs = [
        tensor("ids", "INT64", np.array([1, 2])),
        {"name": "name", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]},
        tensor("flag", "BOOL", np.array([[True], [False]])),
        tensor("weight", "FP64", np.array([[1, 1.5, 1], [2, 2, 2]])),
    ]
    body: dict[str, Any] = {"parameters": {"signature_name": "mixed"}, "inputs": inputs}
    text = {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["a-1", "b-2"]}
    total = {"name": "total", "datatype": "FP64", "shape": [2], "data": [4.5, -4.0]}
    assert infer(call, "signatures", body)["outputs"] == [text, total]
    body["outputs"] = [{"name": "total"}]
    assert infer(call, "signatures", body)["outputs"] == [total]


def test_scalars_and_nothing(call: Http) -> None:
    body: dict[str, Any] = {"parameters": {"signature_name": "any_rank"}}
    for shape in ([], [1, 1], [0], [2, 0]):
        entry = {"name": "x", "datatype": "FP32", "shape": shape, "data": [1] * math.prod(shape)}
        (output,) = infer(call, "signatures", {**body, "inputs": [entry]})["outputs"]
        assert (output["shape"], output["data"]) == (shape, [2.0] * math.prod(shape))


ONE = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "JSON Parse error"),
        ([ONE], "JSON Value"),
        ({"inputs": ONE}, "inputs must be a list of objects"),
        ({"inputs": [{**ONE, "name": ""}]}, r"inputs\[0\] has no name"),
        ({"inputs": [ONE, ONE]}, "input x is there twice"),
        (
            {"inputs": [{**ONE, "datatype": "FP8"}]},
            "input x: it: there is no datatype 'FP8', but BOOL",
        ),
        ({"inputs": [{**ONE, "shape": [2]}]}, r"input x: data of shape \[1\] does not fit shape \[2\]"),
        ({"inputs": [{**ONE, "shape": [-1]}]}, "input x: tensor shape is not fully known"),
        (
            {"inputs": [{**ONE, "shape": [0, 2**62], "data": []}]},
            "input x: tensor shape .* too many",
        ),
        ({"inputs": [{**ONE, "shape": "1"}]}, "input x: shape must be a list of integers"),
        ({"inputs": [{**ONE, "data": ["a"]}]}, "input x: JSON Value: a|input x: .*not of expected type"),
        ({"inputs": [{**ONE, "datatype": "UINT16", "data": [65536]}]}, "input x: .* too large for UINT16"),
        ({"inputs": [{key: ONE[key] for key in ("name", "datatype", "shape")}]}, "input x: it has no data"),
        ({"inputs": []}, "input size does not match signature"),
        ({"inputs": [{**ONE, "name": "y"}]}, "input alias: x|Inputs contains invalid name"),
        ({"inputs": [ONE], "outputs": [{"name": "z"}]}, "output tensor alias not found in signature: z"),
        ({"inputs": [ONE], "outputs": ["y"]}, "outputs must be a list of objects"),
        ({"inputs": [ONE], "id": 7}, "id must be a string"),
        ({"inputs": [ONE], "parameters": []}, "parameters must be an object"),
        ({"inputs": [ONE], "parameters": {"signature_name": "no"}}, 'Serving signature key "no" not found'),
        ({"inputs": [{**ONE, "parameters": {"binary_data_size": 4}}]}, "input x: binary_data_size: 0 bytes"),
    ],
)
def test_wrong_requests(call: Http, body: Any, message: str) -> None:
    status, answer = call("POST", "/v2/models/times/infer", body)
    assert (status, set(answer)) == (400, {"error"}), answer
    assert re.search(message, answer["error"]), answer


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2/models"),
        ("GET", "/v2/models/times/infer"),
        ("POST", "/v2/models/times"),
        ("POST", "/v2"),
        ("GET", "/v2/health"),
        ("GET", "/v2/models/%zz"),
        ("GET", "/v2/models/%ff"),
    ],
)
def test_paths_that_are_none(call: Http, method: str, path: str) -> None:
    status, answer = call(method, path)
    assert (status, set(answer)) == (400, {"error"})


def test_models_and_versions_that_are_not_there(call: Http) -> None:
    body = {"inputs": [ONE]}
    for where in ("nobody", "times/versions/9"):
        status, answer = call("POST", f"/v2/models/{where}/infer", body)
        assert (status, set(answer)) == (404, {"error"})
    for version in (2**63, "9" * 5000, "nobody"):
        assert call("POST", f"/v2/models/times/versions/{version}/infer", body)[0] == 400


def test_a_header_that_lies(call: Http) -> None:
    body = json.dumps({"inputs": [{**ONE, "parameters": {"binary_data_size": 4}}]}).encode()
    name = "Inference-Header-Content-Length"
    for length in ("x", "-1", str(len(body) + 5), "9" * 5000):
        assert call("POST", "/v2/models/times/infer", body + b"1234", {name: length})[0] == 400
    # More bytes than inputs want, and fewer.
    for more in (b"12345", b"123"):
        assert call("POST", "/v2/models/times/infer", body + more, {name: str(len(body))})[0] == 400


def test_calls_are_counted(call: Http, shared: Running) -> None:
    def count(code: str) -> float:
        connection = http.client.HTTPConnection(urlsplit(shared.rest_url).netloc, timeout=60)
        connection.request("GET", "/monitoring/prometheus/metrics")
        page = connection.getresponse().read().decode()
        connection.close()
        return sum(
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == "spikeless_call_latency_seconds_count"
            and (sample.labels["API"], sample.labels["status"]) == ("ModelInfer", code)
        )

    before = count("OK"), count("INVALID_ARGUMENT")
    infer(call, "times", {"inputs": [ONE]})
    assert call("POST", "/v2/models/times/infer", {"inputs": []})[0] == 400
    assert (count("OK"), count("INVALID_ARGUMENT")) == (before[0] + 1, before[1] + 1)


def test_requests_are_batched(serve: ServerFactory, saved_models: Path, tmp_path: Path) -> None:
    put_version(saved_models / "signatures", tmp_path / "signatures", 1)
    parameters = tmp_path / "batching.config"
    parameters.write_text("max_batch_size { value: 4 } allowed_batch_sizes: 4")
    flags = ("--enable_batching", f"--batching_parameters_file={parameters}")
    base = (f"--model_base_path={tmp_path / 'signatures'}", "--model_name=signatures")
    with serve(*base, *flags, rest=True, wait_for=("signatures",)) as running:
        call = Http(running.rest_url)
        (output,) = infer(call, "signatures", {"inputs": [tensor("x", "FP32", X)]})["outputs"]
        expected = predict(running, "", X, "signatures")
        assert np.array(output["data"], np.float32).tobytes() == expected.tobytes()
        # More rows than a batch may have: the error of batching.
        status, answer = call(
            "POST", "/v2/models/signatures/infer", {"inputs": [tensor("x", "FP32", np.tile(X, (3, 1)))]}
        )
        assert status == 400
        assert "batch" in answer["error"]


# --- gRPC -----------------------------------------------------------------------------


def ask(running: Running, method: str, /, **fields: Any) -> Any:
    """Call a method with messages of our own."""
    request, response = (message_class(f"{method}{what}") for what in ("Request", "Response"))
    with channel(running.server.target) as opened:
        call = opened.unary_unary(f"/{SERVICE}/{method}", request.SerializeToString, response.FromString)
        return call(request(**fields), timeout=60)


def test_the_service_is_described(shared: Running) -> None:
    with channel(shared.server.target) as opened:
        database = ProtoReflectionDescriptorDatabase(opened)
        assert SERVICE in database.get_services()
        service = descriptor_pool.DescriptorPool(database).FindServiceByName(SERVICE)
    assert sorted(service.methods_by_name) == sorted(METHODS)
    assert service.methods_by_name["ModelInfer"].input_type.full_name == "inference.ModelInferRequest"
    assert shared.client.is_serving(SERVICE)


def test_the_messages_are_those_of_the_protocol() -> None:
    """The tables agree with a declaration that others made, name by name."""
    theirs = tritonclient.grpc.service_pb2
    for method in METHODS:
        for name in (f"{method}Request", f"{method}Response"):
            check_message(message_class(name).DESCRIPTOR, getattr(theirs, name).DESCRIPTOR)


def check_message(ours: Any, theirs: Any) -> None:
    for name, field in ours.fields_by_name.items():
        other = theirs.fields_by_name[name]
        assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated)
        if field.message_type is not None:
            check_message(field.message_type, other.message_type)
    assert set(ours.oneofs_by_name) == set(theirs.oneofs_by_name)


def test_grpc_the_server_and_its_models(shared: Running, call: Http) -> None:
    assert ask(shared, "ServerLive").live
    assert ask(shared, "ServerReady").ready
    assert ask(shared, "ModelReady", name="times").ready
    assert ask(shared, "ModelReady", name="times", version="stable").ready
    assert not ask(shared, "ModelReady", name="times", version="9").ready
    assert not ask(shared, "ModelReady", name="nobody").ready
    for answer, path in (
        (ask(shared, "ServerMetadata"), "/v2"),
        (ask(shared, "ModelMetadata", name="signatures"), "/v2/models/signatures"),
    ):
        fields = json_format.MessageToDict(answer, preserving_proto_field_name=True)
        for entry in [*fields.get("inputs", ()), *fields.get("outputs", ())]:
            entry["shape"] = list(map(int, entry["shape"]))  # 64 bits are text in this form
        assert (200, fields) == call("GET", path)


def given(datatype: str, values: Any, **more: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": datatype, "shape": values.shape, **more}


def signature(name: str) -> dict[str, Any]:
    return {"signature_name": message_class("InferParameter")(string_param=name)}


CONTENTS = {
    **{name: f"{name.lower()}_contents" for name in ("BOOL", "INT64", "UINT64", "FP32", "FP64", "BYTES")},
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
}


@pytest.mark.parametrize("datatype", CONTENTS)
def test_grpc_contents_are_answered_by_contents(shared: Running, datatype: str) -> None:
    key, values = VALUES[datatype]
    field = CONTENTS[datatype]
    answer = ask(
        shared,
        "ModelInfer",
        model_name="dtypes",
        id="42",
        parameters=signature(key),
        inputs=[given(datatype, values, contents={field: values.ravel().tolist()})],
    )
    assert (answer.model_name, answer.model_version, answer.id) == ("dtypes", "1", "42")
    (output,) = answer.outputs
    assert (output.name, output.datatype, tuple(output.shape)) == ("y", datatype, values.shape)
    assert not answer.raw_output_contents
    got = np.array(list(getattr(output.contents, field)), values.dtype)
    expected = predict(shared, key, values).ravel()
    assert (got.dtype, got.tolist()) == (expected.dtype, expected.tolist())


@pytest.mark.parametrize("datatype", VALUES)
@pytest.mark.parametrize("count", [0, 1, 400_000])
def test_grpc_raw_contents_are_answered_by_raw_contents(shared: Running, datatype: str, count: int) -> None:
    """Of any size: those of large requests and answers are not copied into messages."""
    key, values = VALUES[datatype]
    flat = np.resize(values.ravel(), count)
    raw = (
        b"".join(len(text).to_bytes(4, "little") + text for text in flat.tolist())
        if datatype == "BYTES"
        else flat.tobytes()
    )
    for name in ("42", "4"):  # so that numbers begin anywhere
        answer = ask(
            shared,
            "ModelInfer",
            model_name="dtypes",
            id=name,
            parameters=signature(key),
            inputs=[given(datatype, flat.reshape(1, -1))],
            raw_input_contents=[raw],
        )
        assert (answer.model_name, answer.model_version, answer.id) == ("dtypes", "1", name)
        (output,) = answer.outputs
        assert (output.name, output.datatype, tuple(output.shape)) == ("y", datatype, (1, count))
        assert list(answer.raw_output_contents) == [raw]


ONE_X = given("FP32", np.ones(1), contents={"fp32_contents": [1]})


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"model_name": "nobody", "inputs": [ONE_X]}, "NOT_FOUND", "nobody"),
        ({"model_version": "9", "inputs": [ONE_X]}, "NOT_FOUND", "9"),
        ({"model_version": "9" * 30, "inputs": [ONE_X]}, "INVALID_ARGUMENT", "is too large"),
        ({"model_version": "no", "inputs": [ONE_X]}, "INVALID_ARGUMENT", "label: no"),
        ({}, "INVALID_ARGUMENT", "input size does not match"),
        ({"inputs": [ONE_X, ONE_X]}, "INVALID_ARGUMENT", "input x is there twice"),
        ({"inputs": [{**ONE_X, "datatype": ""}]}, "INVALID_ARGUMENT", "there is no datatype ''"),
        ({"inputs": [{**ONE_X, "shape": [2]}]}, "INVALID_ARGUMENT", "fp32_contents has 1 values"),
        ({"inputs": [{**ONE_X, "datatype": "FP16"}]}, "INVALID_ARGUMENT", "only goes into raw_input"),
        ({"inputs": [{**ONE_X, "datatype": "FP64"}]}, "INVALID_ARGUMENT", "fp64_contents has 0 values"),
        (
            {"inputs": [given("INT8", np.ones(1), contents={"int_contents": [128]})]},
            "INVALID_ARGUMENT",
            "does not fit INT8",
        ),
        ({"inputs": [ONE_X], "raw_input_contents": [b"1234"]}, "INVALID_ARGUMENT", "raw_input_contents too"),
        ({"inputs": [ONE_X], "raw_input_contents": [b"", b""]}, "INVALID_ARGUMENT", "2 entries for 1 inputs"),
        (
            {"inputs": [given("FP32", np.ones(1))], "raw_input_contents": [b"123"]},
            "INVALID_ARGUMENT",
            "input x: it has 3 bytes",
        ),
        (
            {"inputs": [given("BYTES", np.ones(2))], "raw_input_contents": [b"\x01\0\0\0a\x09\0\0\0a"]},
            "INVALID_ARGUMENT",
            "which are not 2 strings",
        ),
        ({"inputs": [ONE_X], "outputs": [{"name": "z"}]}, "INVALID_ARGUMENT", "signature: z"),
        ({"inputs": [ONE_X], "parameters": signature("no")}, "FAILED_PRECONDITION", 'key "no" not found'),
    ],
)
def test_grpc_wrong_requests(shared: Running, fields: dict[str, Any], code: str, message: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(shared, "ModelInfer", **{"model_name": "times", **fields})
    assert (caught.value.code().name, message in str(caught.value.details())) == (code, True), caught.value


@pytest.mark.parametrize("datatype", VALUES)
def test_triton_client_over_grpc(shared: Running, datatype: str) -> None:
    key, values = VALUES[datatype]
    given = tritonclient.grpc.InferInput("x", list(values.shape), datatype)
    given.set_data_from_numpy(values.astype(np.float32) if datatype == "BF16" else values)
    with tritonclient.grpc.InferenceServerClient(shared.server.target) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("dtypes", "1")
        assert not client.is_model_ready("nobody")
        assert client.get_model_metadata("signatures").inputs[0].datatype == "FP32"
        answer = client.infer("dtypes", [given], request_id="7", parameters={"signature_name": key})
    assert answer.get_response().id == "7"
    expected = predict(shared, key, values)
    got = answer.as_numpy("y")
    if datatype == "BYTES":
        assert got.tolist() == expected.tolist()
    else:
        assert got.astype(expected.dtype).tobytes() == expected.tobytes()


# --- a client of others over HTTP -----------------------------------------------------


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("datatype", VALUES)
def test_triton_client_over_http(shared: Running, datatype: str, binary: bool) -> None:
    signature, values = VALUES[datatype]
    if datatype in ("FP16", "BF16") and not binary:
        pytest.skip("the client has no JSON for it")
    sent = values.astype(np.float32) if datatype == "BF16" else values
    given = tritonclient.http.InferInput("x", list(values.shape), datatype)
    given.set_data_from_numpy(sent, binary_data=binary)
    asked = tritonclient.http.InferRequestedOutput("y", binary_data=binary)
    with tritonclient.http.InferenceServerClient(urlsplit(shared.rest_url).netloc) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("dtypes", "1")
        assert not client.is_model_ready("nobody")
        assert client.get_model_metadata("signatures")["inputs"][0]["datatype"] == "FP32"
        options = {"parameters": {"signature_name": signature}, "request_id": "7"}
        answers = [client.infer("dtypes", [given], outputs=[asked], **options)]
        # Without a choice it asks for bytes.
        answers.append(client.infer("dtypes", [given], **options))
    expected = predict(shared, signature, values)
    for answer in answers:
        assert answer.get_response()["id"] == "7"
        got = answer.as_numpy("y")
        if datatype == "BYTES":
            texts = [text if isinstance(text, bytes) else text.encode() for text in got.ravel().tolist()]
            assert texts == expected.ravel().tolist()
        else:
            assert got.astype(expected.dtype).tobytes() == expected.tobytes()


def test_bytes_that_are_no_text(shared: Running, call: Http) -> None:
    values = np.array([[b"\xff\x00", b"a"]], object)
    given = tritonclient.http.InferInput("x", [1, 2], "BYTES")
    given.set_data_from_numpy(values)
    with tritonclient.http.InferenceServerClient(urlsplit(shared.rest_url).netloc) as client:
        options: dict[str, Any] = {"parameters": {"signature_name": "string"}}
        assert client.infer("dtypes", [given], **options).as_numpy("y").tolist() == values.tolist()
        asked = tritonclient.http.InferRequestedOutput("y", binary_data=False)
        with pytest.raises(
            tritonclient.http.InferenceServerException, match="output y holds bytes"
        ) as caught:
            client.infer("dtypes", [given], outputs=[asked], **options)
        assert "parameter binary_data" in caught.value.message()
