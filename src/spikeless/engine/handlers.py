"""What gRPC and REST calls share: the model that answers, metadata, status, metrics.

In: request messages of ``tensorflow_serving/apis``, or just a ``ModelSpec``. Out:
response messages, or the loaded model, lent for as long as the call lasts. Metrics are
counted here.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from spikeless.engine.served_models import ServedModels
from spikeless.errors import Code, InvalidArgument, SpikelessError
from spikeless.formats import kinds
from spikeless.formats.kinds import Kind
from spikeless.formats.protos import get_model_metadata_pb2, get_model_status_pb2, model_pb2
from spikeless.runtime.model import Model

if TYPE_CHECKING:
    from spikeless.engine.metrics import Metrics  # a server without metrics does without their library

#: The only metadata field that there is.
SIGNATURES = "signature_def"
#: Bytes that one request may have at most, packed or not.
MAX_REQUEST_BYTES = 256 << 20


class Waiting(Protocol):
    """What a transport tells of a call whose end its only thread may wait for."""

    #: The thread waits now.
    is_inline: bool
    #: Told by the call: its model takes no longer than its input's size makes it.
    may_be_inline: bool


class CountedCall:
    """One call in progress, from the beginning of a ``with`` statement to its end."""

    def __init__(
        self, calls: Calls, spec: model_pb2.ModelSpec, api: str, waiting: Waiting | None = None
    ) -> None:
        self._calls = calls
        self._waiting = waiting
        self._spec = spec
        self._api = api
        self._started = 0.0
        self._lent: AbstractContextManager[Model] | None = None
        # The version that answers; None until it is found.
        self._version: int | None = None
        # Examples in its input; None for calls that have none.
        self._examples: int | None = None

    def model(self) -> Model:
        """The model of the call, lent until it ends; raises as `ServedModels.use`."""
        self._lent = self._calls.core.use(self._spec)
        model = self._lent.__enter__()
        self._version = model.version
        waiting = self._waiting
        if waiting is not None:
            waiting.may_be_inline = model.session.is_bounded
            if waiting.may_be_inline and waiting.is_inline:
                return model.on_calling_thread
        return model

    def answer(self, kind: Kind, request: Any, timeout: float | None) -> Any:
        """That model's response to a request message, within ``timeout`` seconds."""
        if kind.takes_examples:
            self._examples = len(kinds.examples(request.input))
        return self.model().answer(kind, request, timeout)

    def __enter__(self) -> CountedCall:
        if self._calls.metrics is not None:
            self._started = time.perf_counter()
            self._calls.metrics.started(self._calls.entrypoint)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._lent is not None:
            self._lent.__exit__(kind, error, trace)
        core, metrics = self._calls.core, self._calls.metrics
        if metrics is None:
            return
        code = Code.OK
        if error is not None:
            code = error.code if isinstance(error, SpikelessError) else Code.INTERNAL
        # A name that nobody configured must not become a time series of its own.
        name = self._spec.name if core.is_configured(self._spec.name) else ""
        elapsed = time.perf_counter() - self._started
        metrics.ended(name, self._version, self._api, self._calls.entrypoint, code, elapsed)
        if self._examples is not None and code is Code.OK:
            metrics.examples(name, self._examples)


class Calls:
    """The calls of one transport: of the ``entrypoint`` ``GRPC`` or ``REST``."""

    def __init__(self, core: ServedModels, entrypoint: str, metrics: Metrics | None = None) -> None:
        self.core = core
        self.entrypoint = entrypoint
        self.metrics = metrics

    def counted(self, spec: model_pb2.ModelSpec, api: str, waiting: Waiting | None = None) -> CountedCall:
        """Count a ``with`` block as a call of ``api``, such as ``Predict``."""
        return CountedCall(self, spec, api, waiting)

    def metadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """The signatures of a model.

        Raises:
            InvalidArgument: no model, no field, or one that does not exist.
            NotFound: the model or version is not available.
        """
        require_spec(request)
        if not request.metadata_field:
            raise InvalidArgument("GetModelMetadataRequest must specify at least one metadata_field")
        for name in request.metadata_field:
            if name != SIGNATURES:
                raise InvalidArgument(f"Metadata field {name} is not supported")
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        signatures = get_model_metadata_pb2.SignatureDefMap()
        with self.core.use(request.model_spec) as model:
            response.model_spec.name = request.model_spec.name
            if model.version is not None:
                response.model_spec.version.value = model.version
            for key, signature in model.signature_defs.items():
                signatures.signature_def[key].CopyFrom(signature)
        response.metadata[SIGNATURES].Pack(signatures)
        return response

    def status(
        self, request: get_model_status_pb2.GetModelStatusRequest
    ) -> get_model_status_pb2.GetModelStatusResponse:
        """The states of a model's versions.

        Raises:
            InvalidArgument: no model.
            NotFound: the model or version was never seen.
        """
        require_spec(request)
        response = get_model_status_pb2.GetModelStatusResponse()
        # The highest version first, as TensorFlow Serving lists them.
        for status in reversed(self.core.statuses(request.model_spec)):
            entry = response.model_version_status.add(version=status.version, state=int(status.state))
            entry.status.SetInParent()
            if status.error is not None:
                entry.status.error_code = int(status.error.code)
                entry.status.error_message = str(status.error)
        return response


def require_spec(request: object) -> None:
    """Refuse a request message that names no model at all."""
    if not request.HasField("model_spec"):  # type: ignore[attr-defined]
        raise InvalidArgument("Missing ModelSpec")
