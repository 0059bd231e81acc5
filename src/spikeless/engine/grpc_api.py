"""The gRPC services: each call unpacks a request, asks the core, and packs the answer. Nothing else.

``tensorflow.serving.PredictionService`` and ``tensorflow.serving.ModelService``, as declared in
``tensorflow_serving/apis``. Errors become status codes in one place, ``_answering``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import grpc

from spikeless.engine.core import ServerCore
from spikeless.engine.handlers import Calls, require_spec
from spikeless.errors import Code, InvalidArgument, SpikelessError
from spikeless.formats.protos import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

_log = logging.getLogger(__name__)
_Method = TypeVar("_Method", bound=Callable[..., Any])
_STATUS_CODES = {Code(code.value[0]): code for code in grpc.StatusCode}


def _timeout(context: grpc.ServicerContext) -> float | None:
    """Seconds until the caller's deadline; None without one (gRPC then reports years)."""
    remaining = context.time_remaining()
    return None if remaining is None or remaining > 1e8 else remaining


def _answering(method: _Method) -> _Method:
    """A method whose errors become the call's status; whatever was not foreseen becomes INTERNAL.

    Not a ``grpc.ServerInterceptor``, which would be asked anew for a handler in every call.
    """

    @functools.wraps(method)
    def answer(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(self, request, context)
        except SpikelessError as error:
            code, message = error.code, str(error)
        except MemoryError:
            code, message = Code.RESOURCE_EXHAUSTED, "not enough memory for this request"
        except Exception as error:
            _log.exception("%s failed", method.__name__)
            code, message = Code.INTERNAL, f"{type(error).__name__}: {error}"
        # The status goes into trailing metadata, which has a size limit of its own.
        context.abort(_STATUS_CODES[code], message[:4096])

    return cast(_Method, answer)


class PredictionServicer(prediction_service_pb2_grpc.PredictionServiceServicer):  # type: ignore[misc]
    """Inference."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    @_answering
    def Predict(
        self, request: predict_pb2.PredictRequest, context: grpc.ServicerContext
    ) -> predict_pb2.PredictResponse:
        require_spec(request)
        with self._calls.counted(request.model_spec, "Predict") as call:
            return call.model().predict(request, _timeout(context))

    @_answering
    def Classify(
        self, request: classification_pb2.ClassificationRequest, context: grpc.ServicerContext
    ) -> classification_pb2.ClassificationResponse:
        require_spec(request)
        with self._calls.counted(request.model_spec, "Classify") as call:
            call.note_examples(request.input)
            return call.model().classify(request, _timeout(context))

    @_answering
    def Regress(
        self, request: regression_pb2.RegressionRequest, context: grpc.ServicerContext
    ) -> regression_pb2.RegressionResponse:
        require_spec(request)
        with self._calls.counted(request.model_spec, "Regress") as call:
            call.note_examples(request.input)
            return call.model().regress(request, _timeout(context))

    @_answering
    def MultiInference(
        self, request: inference_pb2.MultiInferenceRequest, context: grpc.ServicerContext
    ) -> inference_pb2.MultiInferenceResponse:
        if not request.tasks:
            raise InvalidArgument("MultiInferenceRequest must have at least one task.")
        spec = request.tasks[0].model_spec
        with self._calls.counted(spec, "MultiInference") as call:
            call.note_examples(request.input)
            return call.model().multi_inference(request, _timeout(context))

    @_answering
    def GetModelMetadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest, context: grpc.ServicerContext
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        return self._calls.metadata(request)


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):  # type: ignore[misc]
    """Model states and configuration."""

    def __init__(self, core: ServerCore, calls: Calls) -> None:
        self._core = core
        self._calls = calls

    @_answering
    def GetModelStatus(
        self, request: get_model_status_pb2.GetModelStatusRequest, context: grpc.ServicerContext
    ) -> get_model_status_pb2.GetModelStatusResponse:
        return self._calls.status(request)

    @_answering
    def HandleReloadConfigRequest(
        self, request: model_management_pb2.ReloadConfigRequest, context: grpc.ServicerContext
    ) -> model_management_pb2.ReloadConfigResponse:
        if request.config.WhichOneof("config") != "model_config_list":
            raise InvalidArgument(
                "ServerModelConfig type not supported by HandleReloadConfigRequest. "
                "Only ModelConfigList is currently supported"
            )
        _log.info("reloading the configuration: %d models", len(request.config.model_config_list.config))
        self._core.reload_config(request.config)
        response = model_management_pb2.ReloadConfigResponse()
        response.status.SetInParent()
        return response
