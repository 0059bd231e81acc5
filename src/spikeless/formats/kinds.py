"""The kinds of request that a server answers: one table, one row a kind.

In: a ``PredictionLog`` or a response. Out: its kind, which says where to find what is
in it and who answers it. Whatever treats all kinds alike reads this table: warmup,
golden requests, probes, capture, the benchmark and the servers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import numpy as np

from spikeless.formats.protos import (
    classification_pb2,
    inference_pb2,
    input_pb2,
    predict_pb2,
    prediction_log_pb2,
    regression_pb2,
)
from spikeless.formats.savedmodel import CLASSIFY_METHOD, PREDICT_METHOD, REGRESS_METHOD
from spikeless.formats.tensors import to_numpy

#: The gRPC service with a method for each kind.
SERVICE = "tensorflow.serving.PredictionService"
_Arrays = dict[str, np.ndarray[Any, Any]]


def _whole(message: Any) -> Sequence[Any]:
    return [message]


@dataclass(frozen=True)
class Kind:
    """One kind of request."""

    #: Its method of ``PredictionService``, such as ``Predict``.
    name: str
    #: Its field of ``PredictionLog``, whose messages are the request and the response.
    log_field: str
    #: The values in a response, by the name of the output.
    outputs: Callable[[Any], _Arrays]
    #: The method name of the signatures that it is for; None for one that asks
    #: signatures of other kinds, which has no REST call.
    signature_method: str | None = None
    #: The parts of a request that have a ``model_spec`` each.
    request_parts: Callable[[Any], Sequence[Any]] = _whole
    #: The parts of a response that have a ``model_spec`` each.
    response_parts: Callable[[Any], Sequence[Any]] = _whole

    def __str__(self) -> str:
        return self.name

    @cached_property
    def request(self) -> type[Any]:
        return type(getattr(prediction_log_pb2.PredictionLog(), self.log_field).request)

    @cached_property
    def response(self) -> type[Any]:
        return type(getattr(prediction_log_pb2.PredictionLog(), self.log_field).response)

    @property
    def method(self) -> str:
        """The method of `spikeless.runtime.model.Model` that answers it."""
        return self.log_field.removesuffix("_log")

    @property
    def rest_verb(self) -> str | None:
        """What follows the colon in a REST path; None where there is no REST call."""
        return self.method if self.signature_method else None

    @property
    def path(self) -> str:
        """The path of its gRPC method."""
        return f"/{SERVICE}/{self.name}"

    @property
    def takes_examples(self) -> bool:
        """Whether its requests have an ``input`` with examples."""
        return "input" in self.request.DESCRIPTOR.fields_by_name

    def request_specs(self, request: Any) -> list[Any]:
        """Every ``ModelSpec`` in a request; changing them changes it."""
        return [part.model_spec for part in self.request_parts(request)]

    def served_version(self, response: bytes) -> int:
        """The version that a serialized response names; 0 where it names none."""
        parts = self.response_parts(self.response.FromString(response))
        return int(parts[0].model_spec.version.value) if parts else 0


def _tensors(response: predict_pb2.PredictResponse) -> _Arrays:
    return {alias: to_numpy(tensor) for alias, tensor in response.outputs.items()}


def _classes(response: Any) -> _Arrays:
    rows = [list(row.classes) for row in response.result.classifications]
    return {
        "classes": np.array([[one.label for one in row] for row in rows], dtype=object),
        "scores": np.array([[one.score for one in row] for row in rows], dtype=np.float32),
    }


def _values(response: Any) -> _Arrays:
    return {"values": np.array([one.value for one in response.result.regressions], dtype=np.float32)}


def _results(response: inference_pb2.MultiInferenceResponse) -> _Arrays:
    found: _Arrays = {}
    for result in response.results:
        if result.HasField("classification_result"):
            arrays = _classes(classification_pb2.ClassificationResponse(result=result.classification_result))
        else:
            arrays = _values(regression_pb2.RegressionResponse(result=result.regression_result))
        found |= {f"{result.model_spec.signature_name}.{name}": array for name, array in arrays.items()}
    return found


KINDS = (
    Kind("Predict", "predict_log", _tensors, PREDICT_METHOD),
    Kind("Classify", "classify_log", _classes, CLASSIFY_METHOD),
    Kind("Regress", "regress_log", _values, REGRESS_METHOD),
    Kind(
        "MultiInference",
        "multi_inference_log",
        _results,
        request_parts=attrgetter("tasks"),
        response_parts=attrgetter("results"),
    ),
)
PREDICT, CLASSIFY, REGRESS, MULTI_INFERENCE, *_ = KINDS
BY_NAME = {kind.name: kind for kind in KINDS}
BY_LOG_FIELD = {kind.log_field: kind for kind in KINDS}


def of_log(log: prediction_log_pb2.PredictionLog) -> Kind | None:
    """The kind of the request in a log; None where no server answers it."""
    return BY_LOG_FIELD.get(log.WhichOneof("log_type"))


def outputs(response: Any) -> _Arrays:
    """The values in a response of any kind, by the name of the output."""
    return next(kind for kind in KINDS if isinstance(response, kind.response)).outputs(response)


def examples(given: input_pb2.Input) -> Any:
    """The list of examples in an ``Input`` of either form."""
    return getattr(given, given.WhichOneof("kind") or "example_list").examples


def serialized_examples(given: input_pb2.Input) -> list[bytes]:
    """Each example, with the shared context merged into it, as a server parses it."""
    # Concatenated messages merge.
    context = given.example_list_with_context.context.SerializeToString()
    return [context + example.SerializeToString() for example in examples(given)]
