"""The Open Inference Protocol (V2), over the calls that all APIs share.

In: requests of its REST or its gRPC form. Out: answers. The inputs and outputs of a
model are those of a signature, by their aliases: of ``serving_default``, unless the
parameter ``signature_name`` of a request names another. A version is a number, or a
label.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from spikeless import __version__
from spikeless.engine.handlers import Calls, Waiting
from spikeless.errors import InvalidArgument, NotFound, Unavailable
from spikeless.formats import open_inference, rest_json
from spikeless.formats.open_inference import InferRequest
from spikeless.formats.protos import model_pb2
from spikeless.formats.savedmodel import DEFAULT_SIGNATURE
from spikeless.runtime.model import Model

#: What calls are counted as.
_API = "ModelInfer"
_PLATFORM = "tensorflow_savedmodel"
_MAX_VERSION = (1 << 63) - 1
_MODEL_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?(?:/(ready|infer))?")
_Headers = list[tuple[str, str]]


def model_spec(name: str, version: str) -> model_pb2.ModelSpec:
    """The model of a request; an empty version stands for the latest."""
    spec = model_pb2.ModelSpec(name=name)
    if version.isascii() and version.isdigit():
        if len(version) > len(str(_MAX_VERSION)) or int(version) > _MAX_VERSION:
            raise InvalidArgument(f"version {version[:40]} is too large")
        spec.version.value = int(version)
    elif version:
        spec.version_label = version
    return spec


class OpenInference:
    """What both forms of the protocol answer with."""

    def __init__(self, calls: Calls, is_ready: Callable[[], bool]) -> None:
        self._calls = calls
        #: Whether the server is ready.
        self.is_ready = is_ready

    def server_metadata(self) -> dict[str, Any]:
        """The fields of ``ServerMetadataResponse``."""
        return {"name": "spikeless", "version": __version__, "extensions": open_inference.EXTENSIONS}

    def model_ready(self, spec: model_pb2.ModelSpec) -> bool:
        """Whether a model, or that version of it, is available."""
        try:
            with self._calls.core.use(spec):
                return True
        except NotFound:
            return False

    def model_metadata(self, spec: model_pb2.ModelSpec) -> dict[str, Any]:
        """The fields of ``ModelMetadataResponse``; raises as `ServedModels.use`."""
        with self._calls.core.use(spec) as model:
            if DEFAULT_SIGNATURE not in model.signatures:
                raise NotFound(f"model {spec.name} has no signature {DEFAULT_SIGNATURE}")
            return {
                "name": spec.name,
                "versions": [str(version) for version in self._calls.core.available(spec.name)],
                "platform": _PLATFORM,
                **open_inference.signature_metadata(model.signatures[DEFAULT_SIGNATURE]),
            }

    def infer(
        self,
        spec: model_pb2.ModelSpec,
        read: Callable[[], InferRequest],
        write: Callable[[str, int | None, InferRequest, Mapping[str, Any]], Any],
        timeout: float | None,
        waiting: Waiting | None = None,
    ) -> Any:
        """Answer a request, which ``read`` reads and whose answer ``write`` makes.

        Args:
            spec: the model.
            read: reads the request.
            write: of the model, version, request and outputs makes the answer.
            timeout: in seconds.
            waiting: a transport whose only thread may wait for the call.
        """
        with self._calls.counted(spec, _API, waiting) as call:
            request = read()
            model: Model = call.model()
            outputs = model.predict_arrays(request.signature, request.inputs, timeout, request.outputs)
            return write(spec.name, model.version, request, outputs)


class OpenInferenceRest:
    """The REST form: paths and bodies."""

    def __init__(self, protocol: OpenInference, timeout: float | None) -> None:
        self._protocol = protocol
        self._timeout = timeout

    def answer(
        self, method: str, path: str, read_body: Callable[[], bytes], json_length: str
    ) -> tuple[bytes, _Headers]:
        """The body of an answer and its headers.

        Args:
            method: ``GET`` or ``POST``.
            path: still encoded, and without a query.
            read_body: the body, read when it is needed.
            json_length: the value of `JSON_LENGTH_HEADER`, empty without one.

        Raises:
            InvalidArgument: no such path, or a request that is wrong.
            Unavailable: what was asked is not ready.
            NotFound: the model or version is not available.
        """
        protocol = self._protocol
        if method == "GET" and path.rstrip("/") == "/v2":
            return _json(protocol.server_metadata())
        if method == "GET" and path == "/v2/health/live":
            return _json({"live": True})
        if method == "GET" and path == "/v2/health/ready":
            if not protocol.is_ready():
                raise Unavailable("the server is not ready")
            return _json({"ready": True})
        match = _MODEL_PATH.fullmatch(path)
        if match and method == ("POST" if match[3] == "infer" else "GET"):
            name, version = rest_json.path_text(match[1], "model name"), match[2] or ""
            what = match[3]
            spec = model_spec(name, rest_json.path_text(version, "version"))
            if what == "infer":
                return self._infer(spec, read_body, json_length)
            if what == "ready":
                if not protocol.model_ready(spec):
                    raise Unavailable(f"model {name} is not ready")
                return _json({"name": name, "ready": True})
            return _json(protocol.model_metadata(spec))
        raise InvalidArgument(f"Malformed request: {method} {path}")

    def _infer(
        self, spec: model_pb2.ModelSpec, read_body: Callable[[], bytes], json_length: str
    ) -> tuple[bytes, _Headers]:
        if json_length and not (json_length.isascii() and json_length.isdigit() and len(json_length) < 20):
            raise InvalidArgument(f"{open_inference.JSON_LENGTH_HEADER} must be a number of bytes")
        length = int(json_length) if json_length else None
        body, written = self._protocol.infer(
            spec,
            lambda: open_inference.read_json(read_body(), length),
            open_inference.write_json,
            self._timeout,
        )
        if written is None:
            return body, [rest_json.HEADER]
        return body, [
            ("Content-Type", "application/octet-stream"),
            (open_inference.JSON_LENGTH_HEADER, str(written)),
        ]


def _json(document: dict[str, Any]) -> tuple[bytes, _Headers]:
    return orjson.dumps(document), [rest_json.HEADER]
