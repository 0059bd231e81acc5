"""The gRPC services, over what all transports share.

``tensorflow.serving.PredictionService`` and ``tensorflow.serving.ModelService``, as
declared in ``tensorflow_serving/apis``, and ``inference.GRPCInferenceService`` of the
Open Inference Protocol. Errors become status codes in one place, ``_answering``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import grpc

from spikeless.engine import transport
from spikeless.engine.handlers import Calls, Waiting, require_spec
from spikeless.engine.open_inference import OpenInference, model_spec
from spikeless.errors import Code, InvalidArgument, SpikelessError
from spikeless.formats import large_tensors, open_inference, open_inference_messages
from spikeless.formats.kinds import KINDS, PREDICT, SERVICE, Kind
from spikeless.formats.protos import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_management_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
)

_log = logging.getLogger(__name__)
_Method = TypeVar("_Method", bound=Callable[..., Any])
_STATUS_CODES = {Code(code.value[0]): code for code in grpc.StatusCode}


def _timeout(context: grpc.ServicerContext) -> float | None:
    """Seconds until the caller's deadline; None without one: gRPC reports years."""
    remaining = context.time_remaining()
    return None if remaining is None or remaining > 1e8 else remaining


def _waiting(context: grpc.ServicerContext) -> Waiting | None:
    """The context of a transport that may wait for the call."""
    return context if isinstance(context, transport.Context) else None


def _answering(method: _Method) -> _Method:
    """Turn a method's errors into the call's status; unforeseen ones are INTERNAL.

    Not a ``grpc.ServerInterceptor``, which would be asked anew for a handler in every
    call.
    """

    @functools.wraps(method)
    def answer(self: Any, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except SpikelessError as error:
            code, message = error.code, str(error)
        except MemoryError:
            code, message = Code.RESOURCE_EXHAUSTED, "not enough memory for this request"
        except Exception as error:
            _log.exception("%s failed", method.__name__)
            code, message = Code.INTERNAL, f"{type(error).__name__}: {error}"
        # The status goes into trailing metadata, which has a size limit of its own.
        *_, context = arguments
        context.abort(_STATUS_CODES[code], message[:4096])

    return cast(_Method, answer)


def _model_spec(kind: Kind, request: Any) -> model_pb2.ModelSpec:
    """The model that a request asks; the parts of one request may not ask several."""
    parts = kind.request_parts(request)
    if not parts:
        raise InvalidArgument(f"{kind.name}Request must have at least one task.")
    if parts[0] is request:
        require_spec(request)
    return parts[0].model_spec


class PredictionServicer:
    """A method for each kind of request, and one for signatures."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        for kind in KINDS:
            if kind is not PREDICT:
                setattr(self, kind.name, functools.partial(self._infer, kind))

    @_answering
    def _infer(self, kind: Kind, request: Any, context: grpc.ServicerContext) -> Any:
        with self._calls.counted(_model_spec(kind, request), kind.name, _waiting(context)) as call:
            return call.answer(kind, request, _timeout(context))

    @_answering
    def Predict(
        self, request: predict_pb2.PredictRequest | large_tensors.LargeRequest, context: grpc.ServicerContext
    ) -> bytes:
        with self._calls.counted(_model_spec(PREDICT, request), PREDICT.name, _waiting(context)) as call:
            return call.model().predict_large(request, _timeout(context)).serialized()

    @_answering
    def GetModelMetadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest, context: grpc.ServicerContext
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        return self._calls.metadata(request)


def add_prediction_service(servicer: PredictionServicer, server: grpc.Server) -> None:
    """Register the methods: as generated code would, but for Predict's messages."""
    handlers = {
        kind.name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, kind.name), kind.request.FromString, kind.response.SerializeToString
        )
        for kind in KINDS
    }
    handlers[PREDICT.name] = grpc.unary_unary_rpc_method_handler(servicer.Predict, large_tensors.read_request)
    handlers["GetModelMetadata"] = grpc.unary_unary_rpc_method_handler(
        servicer.GetModelMetadata,
        get_model_metadata_pb2.GetModelMetadataRequest.FromString,
        get_model_metadata_pb2.GetModelMetadataResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """Model states and configuration."""

    def __init__(self, calls: Calls) -> None:
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
        self._calls.core.reload_config(request.config)
        response = model_management_pb2.ReloadConfigResponse()
        response.status.SetInParent()
        return response


class InferenceServicer:
    """The methods of `spikeless.formats.open_inference_messages.METHODS`.

    Each returns the response's bytes, or the values of its fields.
    """

    def __init__(self, protocol: OpenInference) -> None:
        self._protocol = protocol

    @_answering
    def ServerLive(self, request: Any, context: grpc.ServicerContext) -> dict[str, Any]:
        return {"live": True}

    @_answering
    def ServerReady(self, request: Any, context: grpc.ServicerContext) -> dict[str, Any]:
        return {"ready": self._protocol.is_ready()}

    @_answering
    def ModelReady(self, request: Any, context: grpc.ServicerContext) -> dict[str, Any]:
        return {"ready": self._protocol.model_ready(model_spec(request.name, request.version))}

    @_answering
    def ServerMetadata(self, request: Any, context: grpc.ServicerContext) -> dict[str, Any]:
        return self._protocol.server_metadata()

    @_answering
    def ModelMetadata(self, request: Any, context: grpc.ServicerContext) -> dict[str, Any]:
        return self._protocol.model_metadata(model_spec(request.name, request.version))

    @_answering
    def ModelInfer(self, request: open_inference.InferMessage, context: grpc.ServicerContext) -> Any:
        message = request.message
        return self._protocol.infer(
            model_spec(message.model_name, message.model_version),
            functools.partial(open_inference.read_message, request),
            open_inference.write_message,
            _timeout(context),
            _waiting(context),
        )


def add_inference_service(servicer: InferenceServicer, server: grpc.Server) -> None:
    """Register the methods, as generated code would."""

    def serializer(response: type[Any]) -> Callable[[Any], bytes]:
        def serialize(answer: dict[str, Any] | bytes) -> bytes:
            return bytes(response(**answer).SerializeToString()) if isinstance(answer, dict) else answer

        return serialize

    message_class = open_inference_messages.message_class
    handlers = {
        method: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, method),
            open_inference.parse_message
            if method == "ModelInfer"
            else message_class(f"{method}Request").FromString,
            serializer(message_class(f"{method}Response")),
        )
        for method in open_inference_messages.METHODS
    }
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(open_inference_messages.SERVICE, handlers),)
    )
