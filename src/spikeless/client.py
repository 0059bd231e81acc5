"""A small gRPC client for TensorFlow Serving and the embedded engine.

In: a target such as ``127.0.0.1:8500``. Out: response messages; gRPC errors become
``SpikelessError`` with the same code and message.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import attrgetter
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc

from spikeless.channels import channel
from spikeless.errors import Code, SpikelessError, Unavailable
from spikeless.formats import wire
from spikeless.formats.protos import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    meta_graph_pb2,
    model_management_pb2,
    model_pb2,
    model_server_config_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)
from spikeless.formats.states import State, VersionStatus
from spikeless.formats.tensors import to_numpy, to_proto


class RemoteError(SpikelessError):
    """An error that a server answered with."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def _translated(target: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        code, message = Code(error.code().value[0]), error.details() or ""
        if code is Code.UNAVAILABLE:
            raise Unavailable(f"no server answers at {target}: {message}") from None
        raise RemoteError(code, message) from None


class Client(AbstractContextManager["Client"]):
    """Calls one server; safe to use from several threads.

    Args:
        target: ``host:port``, or ``grpcs://host:port`` for a server with TLS.
        timeout: seconds that each call may take.
    """

    def __init__(self, target: str, timeout: float = 10.0) -> None:
        self.target = target
        self.timeout = timeout
        self._channel = channel(target)
        self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        # As the stub's method, but for messages that are no UTF-8: a server passes on
        # what a damaged file holds.
        self._model_status = self._channel.unary_unary(
            "/tensorflow.serving.ModelService/GetModelStatus",
            request_serializer=get_model_status_pb2.GetModelStatusRequest.SerializeToString,
            response_deserializer=_decoded_status,
        )
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def call(self, method: Any, request: Any) -> Any:
        """Call a stub's method, with this client's timeout and error translation."""
        with _translated(self.target):
            return method(request, timeout=self.timeout)

    def predict(
        self,
        name: str,
        inputs: dict[str, np.ndarray[Any, Any]],
        signature: str = "",
        version: int | None = None,
        label: str = "",
        outputs: Sequence[str] = (),
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Predict with arrays in and arrays out."""
        request = predict_pb2.PredictRequest(
            model_spec=model_spec(name, version, label, signature), output_filter=outputs
        )
        for alias, value in inputs.items():
            request.inputs[alias].CopyFrom(to_proto(value))
        response = self.call(self.prediction.Predict, request)
        return {alias: to_numpy(proto) for alias, proto in response.outputs.items()}

    def statuses(self, name: str, version: int | None = None) -> list[VersionStatus]:
        """The states of all versions of a model, lowest first, or of the given one."""
        request = get_model_status_pb2.GetModelStatusRequest(model_spec=model_spec(name, version))
        response = self.call(self._model_status, request)
        return sorted(map(_version_status, response.model_version_status), key=attrgetter("version"))

    def signatures(self, name: str, version: int | None = None) -> dict[str, meta_graph_pb2.SignatureDef]:
        """The signatures of a model that is being served."""
        response = self._metadata(model_spec(name, version))
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        return dict(signatures.signature_def)

    def version_of(self, name: str, label: str = "") -> int:
        """The version that answers requests with this label, or without one."""
        return int(self._metadata(model_spec(name, label=label)).model_spec.version.value)

    def _metadata(self, spec: model_pb2.ModelSpec) -> get_model_metadata_pb2.GetModelMetadataResponse:
        request = get_model_metadata_pb2.GetModelMetadataRequest(
            model_spec=spec, metadata_field=["signature_def"]
        )
        return self.call(self.prediction.GetModelMetadata, request)

    def reload_config(self, config: model_server_config_pb2.ModelServerConfig) -> None:
        """Replace the whole model configuration, and wait for new models."""
        self.start_reload(config, self.timeout)(None)

    def start_reload(
        self, config: model_server_config_pb2.ModelServerConfig, timeout: float
    ) -> Callable[[float | None], bool]:
        """Begin to replace the server's whole model configuration.

        Returns:
            A function that waits at most its argument in seconds (None: to the end) and
            tells whether the server has answered; it raises the error that it answered
            with.
        """
        request = model_management_pb2.ReloadConfigRequest(config=config)
        pending = self.models.HandleReloadConfigRequest.future(request, timeout=timeout)
        # Not the future's own wait, which a clock that is set back makes longer.
        done = threading.Event()
        pending.add_done_callback(lambda _: done.set())

        def answered(wait: float | None) -> bool:
            if not done.wait(wait):
                return False
            with _translated(self.target):
                pending.result()
            return True

        return answered

    def is_serving(self, service: str = "") -> bool:
        """What the standard health service says of a server, or of one of its services.

        TensorFlow Serving has it with ``--enable_grpc_healthcheck_service``. The
        embedded engine's services are also its models and versions: ``name`` and
        ``name/version``.
        """
        response = self.call(self._health.Check, health_pb2.HealthCheckRequest(service=service))
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        self._channel.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def model_spec(
    name: str, version: int | None = None, label: str = "", signature: str = ""
) -> model_pb2.ModelSpec:
    """A ``ModelSpec``: by version, by label, or, with neither, the latest version."""
    spec = model_pb2.ModelSpec(name=name, signature_name=signature)
    if version is not None:
        spec.version.value = version
    elif label:
        spec.version_label = label
    return spec


def _decoded_status(content: bytes) -> get_model_status_pb2.GetModelStatusResponse:
    """A response, with replacement characters for what is no UTF-8 in its messages."""
    response = get_model_status_pb2.GetModelStatusResponse
    try:
        return response.FromString(content)
    except DecodeError:
        # Fields 1: model_version_status, 3: status, 2: error_message.
        return response.FromString(_readable(content, (1, 3, 2)))


def _readable(content: bytes | memoryview, path: tuple[int, ...]) -> bytes:
    """A message in which the text at a path of fields is UTF-8, or the text itself."""
    if not path:
        return bytes(content).decode(errors="replace").encode()
    return b"".join(
        wire.field(number, _readable(value, path[1:])) if number == path[0] else bytes(whole)
        for number, whole, value in wire.fields(memoryview(content))
    )


def _version_status(status: get_model_status_pb2.ModelVersionStatus) -> VersionStatus:
    error: SpikelessError | None = None
    if status.status.error_code:
        error = RemoteError(Code(status.status.error_code), status.status.error_message)
    return VersionStatus(status.version, State(status.state), error)
