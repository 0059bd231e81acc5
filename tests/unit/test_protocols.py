"""Requests of gRPC as bodies of REST: what their readers understand is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikeless.bench.protocols import PROTOCOLS
from spikeless.bench.replayed import read_requests
from spikeless.bench.run_file import ServerFacts, Settings
from spikeless.errors import InvalidArgument, SpikelessError
from spikeless.formats import open_inference, rest_json, tfrecord
from spikeless.formats.kinds import CLASSIFY, KINDS, MULTI_INFERENCE, PREDICT, REGRESS
from spikeless.formats.protos import classification_pb2, predict_pb2, prediction_log_pb2
from spikeless.formats.savedmodel import TensorSpec
from spikeless.formats.tensors import data_type, to_proto

REST, OPEN_INFERENCE = PROTOCOLS["rest"], PROTOCOLS["open-inference"]
ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "floats": np.array([[1.5, -0.1], [np.nan, np.inf]], np.float32),
    "doubles": np.array(3.25, np.float64),
    "ids": np.array([[1, 2, 3]], np.int64),
    "flags": np.array([True, False]),
    "words": np.array([b"text", "wörter".encode()], object),
    "none": np.zeros((0, 2), np.int32),
}


def request_of(arrays: dict[str, Any], signature: str = "") -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest()
    request.model_spec.signature_name = signature
    for alias, array in arrays.items():
        request.inputs[alias].CopyFrom(to_proto(array))
    return request


def spec(alias: str, array: np.ndarray[Any, Any]) -> TensorSpec:
    return TensorSpec(alias, f"{alias}:0", data_type(array.dtype), array.shape)


@pytest.mark.parametrize("signature", ["", "other"])
def test_predict_over_rest(signature: str) -> None:
    arrays = ARRAYS | {"bytes": np.array([b"\xff\x00"], object)}
    path, body = REST.encode(PREDICT, request_of(arrays, signature), "a/b")
    assert path == "/v1/models/a%2Fb:predict"
    document = rest_json.parse(body)
    assert rest_json.signature_name(document) == signature
    read = rest_json.predict_inputs(document, {alias: spec(alias, array) for alias, array in arrays.items()})
    assert read.keys() == arrays.keys()
    for alias, array in arrays.items():
        # JSON has no lists of nothing with a width.
        np.testing.assert_array_equal(read[alias].reshape(array.shape), array)


@pytest.mark.parametrize("signature", ["", "other"])
def test_predict_over_open_inference(signature: str) -> None:
    request = request_of(ARRAYS, signature)
    request.output_filter.append("scores")
    path, body = OPEN_INFERENCE.encode(PREDICT, request, "boston")
    assert path == "/v2/models/boston/infer"
    read = open_inference.read_json(body, None)
    assert (read.signature, list(read.outputs)) == (signature, ["scores"])
    assert read.inputs.keys() == ARRAYS.keys()
    for alias, array in ARRAYS.items():
        assert read.inputs[alias].dtype == array.dtype
        np.testing.assert_array_equal(read.inputs[alias], array)


@pytest.mark.parametrize("with_context", [False, True])
def test_examples_over_rest(with_context: bool) -> None:
    request = classification_pb2.ClassificationRequest()
    listed: Any = request.input.example_list
    if with_context:
        listed = request.input.example_list_with_context
        listed.context.features.feature["age"].int64_list.value[:] = [7]
    features = listed.examples.add().features.feature
    features["x"].float_list.value[:] = [1.0, 0.1]
    features["words"].bytes_list.value[:] = [b"a", b"\xff"]
    features["nothing"].SetInParent()
    path, body = REST.encode(CLASSIFY, request, "boston")
    assert path == "/v1/models/boston:classify"
    assert rest_json.examples_input(rest_json.parse(body)) == request.input
    assert REST.encode(REGRESS, request, "boston")[0] == "/v1/models/boston:regress"


def test_what_has_no_call_is_refused() -> None:
    for kind in KINDS:
        request = kind.request()
        for protocol, has_it in ((REST, kind is not MULTI_INFERENCE), (OPEN_INFERENCE, kind is PREDICT)):
            if not has_it:
                with pytest.raises(SpikelessError, match=f"{kind} has no"):
                    protocol.encode(kind, request, "boston")


def test_a_record_that_cannot_be_sent_is_named(tmp_path: Path) -> None:
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.CopyFrom(request_of({"x": np.array([b"\xff"], object)}))
    tfrecord.write(tmp_path / "w", [log.SerializeToString()])
    with pytest.raises(InvalidArgument, match=r"w: record 1: input x holds bytes that are no text"):
        read_requests(tmp_path / "w", "boston", "open-inference")
    assert read_requests(tmp_path / "w", "boston", "rest", "/mine")[0].path == "/mine"
    log.predict_log.request.CopyFrom(request_of({"x": np.array([1], np.float16)}))
    tfrecord.write(tmp_path / "h", [log.SerializeToString()])
    with pytest.raises(InvalidArgument, match=r"h: record 1: input x: REST has no JSON for half"):
        read_requests(tmp_path / "h", "boston", "rest")


@pytest.mark.parametrize(
    ("protocol", "answer", "version"),
    [
        (REST, b'{"outputs": {\n "version": [\n  12\n ], "scores": [3]}}', 12),
        (REST, b'{"predictions": [{"scores": 0.5, "version": 4}]}', 4),
        (REST, b'{"version":[[5]]}', 5),
        (REST, b'{"outputs": [0.5]}', 0),
        (OPEN_INFERENCE, b'{"model_name":"m","model_version":"3","outputs":[]}', 3),
        (OPEN_INFERENCE, b'{"model_name":"m","model_version":"stable"}', 0),
        (OPEN_INFERENCE, b'{"outputs": [{"name": "version", "parameters": {}, "data": [6]}]}', 6),
    ],
)
def test_what_an_answer_says_of_its_version(protocol: Any, answer: bytes, version: int) -> None:
    assert protocol.served_version(PREDICT, answer) == version


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(InvalidArgument, match="unknown protocol 'soap': choose one of grpc, rest"):
        Settings("m", "r", protocol="soap")
    with pytest.raises(InvalidArgument, match="'/predict' is no path to send requests over HTTP to"):
        Settings("m", "r", url_path="/predict")
    with pytest.raises(InvalidArgument, match="'predict' is no path"):
        Settings("m", "r", protocol="rest", url_path="predict")
    with pytest.raises(InvalidArgument, match="no address for rest"):
        ServerFacts("127.0.0.1:1").address("rest")
