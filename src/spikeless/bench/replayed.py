"""The requests that are replayed: those of a model's own warmup file, as bytes ready to send.

In: ``assets.extra/tf_serving_warmup_requests``, or any TFRecord file of ``PredictionLog``. Out: gRPC
messages. TensorFlow is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from spikeless.errors import InvalidArgument
from spikeless.formats import tfrecord
from spikeless.formats.protos import (
    classification_pb2,
    inference_pb2,
    predict_pb2,
    prediction_log_pb2,
    regression_pb2,
)

_SERVICE = "/tensorflow.serving.PredictionService/"


@dataclass(frozen=True)
class Request:
    """One request: the gRPC method's path, the serialised message, and how to read an answer's version."""

    path: str
    message: bytes
    served_version: Callable[[bytes], int]

    @property
    def method(self) -> str:
        """The method's name, for example ``Predict``."""
        return self.path.rpartition("/")[2]


def read_requests(path: str | os.PathLike[str], model_name: str) -> list[Request]:
    """The replayable records of a file, addressed to `model_name` without a version, so that they follow a
    swap.

    Raises:
        NotFound: there is no such file.
        DataLoss: the file is truncated or damaged.
        InvalidArgument: a record is no PredictionLog, is of a kind that cannot be replayed, or there is none.
    """
    requests = [
        _request(record, model_name, f"{os.fspath(path)}: record {number}")
        for number, record in enumerate(tfrecord.read(path), start=1)
    ]
    if not requests:
        raise InvalidArgument(f"{os.fspath(path)} holds no requests: build it with `spikeless warmup build`")
    return requests


def _request(record: bytes, model_name: str, where: str) -> Request:
    try:
        log = prediction_log_pb2.PredictionLog.FromString(record)
    except DecodeError:
        raise InvalidArgument(f"{where} is no PredictionLog") from None
    kind = log.WhichOneof("log_type")
    if kind not in _KINDS:
        raise InvalidArgument(
            f"{where} is of kind {kind or 'none'}: only {', '.join(_KINDS)} can be replayed"
        )
    method, served_version = _KINDS[kind]
    request = getattr(log, kind).request
    specs = (
        [task.model_spec for task in request.tasks] if kind == "multi_inference_log" else [request.model_spec]
    )
    for spec in specs:
        spec.name = model_name
        spec.ClearField("version_choice")
    return Request(_SERVICE + method, request.SerializeToString(), served_version)


def _first_result_version(message: bytes) -> int:
    results = inference_pb2.MultiInferenceResponse.FromString(message).results
    return int(results[0].model_spec.version.value) if results else 0


def _version_reader(response: Any) -> Callable[[bytes], int]:
    return lambda message: int(response.FromString(message).model_spec.version.value)


#: Field of PredictionLog -> method of PredictionService, and the reader of the version in its answers.
_KINDS: dict[str, tuple[str, Callable[[bytes], int]]] = {
    "predict_log": ("Predict", _version_reader(predict_pb2.PredictResponse)),
    "classify_log": ("Classify", _version_reader(classification_pb2.ClassificationResponse)),
    "regress_log": ("Regress", _version_reader(regression_pb2.RegressionResponse)),
    "multi_inference_log": ("MultiInference", _first_result_version),
}
