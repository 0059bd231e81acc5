"""The REST API: HTTP requests in, JSON out, everything between shared with gRPC.

`RestApi` is a WSGI application that knows TensorFlow Serving's paths, status codes and
error bodies (``http_rest_api_handler.cc``, ``http_rest_api_util.cc``,
``http_server.cc``), and gives ``/v2`` to `OpenInferenceRest`. It opens no socket:
`spikeless.engine.rest_server` runs it.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from google.protobuf import json_format
from google.protobuf.message import Message

from spikeless.engine.flags import ServerFlags
from spikeless.engine.handlers import MAX_REQUEST_BYTES, SIGNATURES, Calls, CountedCall
from spikeless.engine.open_inference import OpenInference, OpenInferenceRest
from spikeless.errors import (
    Cancelled,
    Code,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    SpikelessError,
    Unimplemented,
)
from spikeless.formats import rest_json
from spikeless.formats.kinds import KINDS
from spikeless.formats.protos import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
)
from spikeless.formats.savedmodel import DEFAULT_SIGNATURE

_log = logging.getLogger(__name__)

_API_PATH = re.compile("(?i:/v1/)|/v2(?:/|$)")
_VERSION = r"(?:/versions/(\d+)|/labels/([^/:]+))?"
_KINDS = {kind.rest_verb: kind for kind in KINDS if kind.rest_verb}
_CALL_PATH = re.compile(rf"(?i:/v1/models/([^/:]+){_VERSION}):({'|'.join(_KINDS)})", re.ASCII)
#: Without a name it is a path too, which is refused with a message of its own.
_MODEL_PATH = re.compile(rf"(?i:/v1/models(?:/([^/:]+))?{_VERSION})(?:/(metadata))?", re.ASCII)
_MAX_VERSION = (1 << 63) - 1
#: What an answer to each verb that takes examples looks like.
_BODIES: dict[str, Callable[[Any], bytes]] = {
    "classify": rest_json.classify_body,
    "regress": rest_json.regress_body,
}

#: ``ToHTTPStatusCode`` in ``http_server.cc``; whatever is missing here is 500.
_STATUSES = {
    Code.OK: "200 OK",
    Code.CANCELLED: "499 Client Closed Request",
    Code.INVALID_ARGUMENT: "400 Bad Request",
    Code.DEADLINE_EXCEEDED: "504 Gateway Timeout",
    Code.NOT_FOUND: "404 Not Found",
    Code.ALREADY_EXISTS: "409 Conflict",
    Code.PERMISSION_DENIED: "403 Forbidden",
    Code.RESOURCE_EXHAUSTED: "429 Too Many Requests",
    Code.FAILED_PRECONDITION: "400 Bad Request",
    Code.ABORTED: "409 Conflict",
    Code.OUT_OF_RANGE: "400 Bad Request",
    Code.UNIMPLEMENTED: "501 Not Implemented",
    Code.UNAVAILABLE: "503 Service Unavailable",
    Code.UNAUTHENTICATED: "401 Unauthorized",
}
#: The methods that are heard at all.
_METHODS = frozenset({"GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"})
_ORIGIN = re.compile("https?://")
_BAD_ESCAPE = re.compile("%(?![0-9A-Fa-f]{2})")
_INTERNAL_ERROR = "500 Internal Server Error"
_CORS = [
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Allow-Methods", "POST, GET"),
    ("Access-Control-Allow-Headers", "Content-Type"),
]

_Environ = dict[str, Any]
_StartResponse = Callable[[str, list[tuple[str, str]]], Any]


class RestApi:
    """The WSGI application."""

    def __init__(self, calls: Calls, flags: ServerFlags, is_ready: Callable[[], bool] = lambda: True) -> None:
        self._calls = calls
        self._has_cors = flags.rest_api_enable_cors_support
        timeout = flags.rest_api_timeout_in_ms
        self._timeout = timeout / 1000 if timeout > 0 else None
        self._open_inference = OpenInferenceRest(OpenInference(calls, is_ready), self._timeout)

    def __call__(self, environ: _Environ, start_response: _StartResponse) -> Iterable[bytes]:
        parts = urlsplit(environ["REQUEST_URI"])
        metrics = self._calls.metrics
        if metrics is not None and parts.path == metrics.path:
            start_response("200 OK", [("Content-Type", "text/plain; version=0.0.4; charset=utf-8")])
            return [metrics.page()]
        # As for TensorFlow Serving, a query is part of the path, where it fits nothing.
        path = urlunsplit(("", "", *parts[2:])) if parts.query or parts.fragment else parts.path
        cors = _CORS if self._has_cors else []
        code, headers = Code.OK, [rest_json.HEADER]
        if not _API_PATH.match(path):
            start_response("404 Not Found", headers + cors)
            message = f"Not found: {path}: paths begin with /v1/models/ or /v2"
            return [rest_json.error_body(message)]
        try:
            body, headers = self._answer(environ, path)
        except SpikelessError as error:
            code, body = error.code, rest_json.error_body(str(error))
        except MemoryError:
            code = Code.RESOURCE_EXHAUSTED
            body = rest_json.error_body("not enough memory for this request")
        except Exception as error:
            _log.exception("%s %s failed", environ["REQUEST_METHOD"], path)
            code, body = Code.INTERNAL, rest_json.error_body(f"{type(error).__name__}: {error}")
        start_response(_STATUSES.get(code, _INTERNAL_ERROR), headers + cors)
        return [body]

    def _answer(self, environ: _Environ, path: str) -> tuple[bytes, list[tuple[str, str]]]:
        method = environ["REQUEST_METHOD"]
        if method not in _METHODS:
            raise Unimplemented(f"{method} is not supported")
        if method == "OPTIONS":
            if not _ORIGIN.search(environ.get("HTTP_ORIGIN", "")):
                raise FailedPrecondition("Origin header is missing in CORS preflight")
            return b"", [rest_json.HEADER]
        if _BAD_ESCAPE.search(path):
            raise InvalidArgument(f"Malformed request: {method} {path}")
        if path.startswith("/v2"):
            length = environ.get("HTTP_INFERENCE_HEADER_CONTENT_LENGTH", "")
            return self._open_inference.answer(method, path, lambda: self._body(environ), length)
        return self._tensorflow_serving(environ, method, path), [rest_json.HEADER]

    def _tensorflow_serving(self, environ: _Environ, method: str, path: str) -> bytes:
        if method == "POST" and (match := _CALL_PATH.fullmatch(path)):
            return self._call(match[4], _model_spec(match), environ)
        if method == "GET" and (match := _MODEL_PATH.fullmatch(path)):
            if not match[1]:
                raise InvalidArgument("Missing model name in request.")
            spec = _model_spec(match)
            # Counted without the name of an API, as TensorFlow Serving counts them.
            with self._calls.counted(spec, ""):
                return self._metadata(spec) if match[4] else self._status(spec)
        raise InvalidArgument(f"Malformed request: {method} {path}")

    def _call(self, verb: str, spec: model_pb2.ModelSpec, environ: _Environ) -> bytes:
        with self._calls.counted(spec, verb) as call:
            document = rest_json.parse(self._body(environ))
            spec.signature_name = rest_json.signature_name(document)
            kind = _KINDS[verb]
            if not kind.takes_examples:
                return self._predict(call, spec, document)
            request = kind.request(model_spec=spec, input=rest_json.examples_input(document))
            return _BODIES[verb](call.answer(kind, request, self._timeout).result)

    def _predict(self, call: CountedCall, spec: model_pb2.ModelSpec, document: Mapping[str, Any]) -> bytes:
        model = call.model()
        key = spec.signature_name or DEFAULT_SIGNATURE
        if key not in model.signatures:
            raise InvalidArgument(f'Serving signature name: "{key}" not found in signature def')
        inputs = rest_json.predict_inputs(document, model.signatures[key].inputs)
        outputs = model.predict_arrays(key, inputs, self._timeout)
        return rest_json.predict_body(outputs, rest_json.is_row_format(document))

    def _body(self, environ: _Environ) -> bytes:
        """The body of a request, unpacked where it is packed."""
        if environ["waitress.client_disconnected"]():
            raise Cancelled("the client went away before its request was looked at")
        body: bytes = environ["wsgi.input"].read()
        # Whatever else a body may be called, it is taken as it is.
        if "gzip" not in environ.get("HTTP_CONTENT_ENCODING", ""):
            return body
        unpacker = zlib.decompressobj(wbits=31)
        try:
            unpacked = unpacker.decompress(body, MAX_REQUEST_BYTES)
        except zlib.error as error:
            raise InvalidArgument(f"the body cannot be unpacked: {error}") from None
        if unpacker.unconsumed_tail:
            raise ResourceExhausted(f"the body unpacks to more than {MAX_REQUEST_BYTES} bytes")
        if not unpacker.eof or unpacker.unused_data:
            raise InvalidArgument("the body cannot be unpacked: it is cut off, or something follows it")
        return unpacked

    def _status(self, spec: model_pb2.ModelSpec) -> bytes:
        request = get_model_status_pb2.GetModelStatusRequest(model_spec=spec)
        return _to_json(self._calls.status(request)).encode()

    def _metadata(self, spec: model_pb2.ModelSpec) -> bytes:
        request = get_model_metadata_pb2.GetModelMetadataRequest(model_spec=spec, metadata_field=[SIGNATURES])
        response = self._calls.metadata(request)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata[SIGNATURES].Unpack(signatures)
        # Put together by hand, as TensorFlow Serving does: without the type name that
        # an Any has in JSON.
        return (
            f'{{\n"model_spec":{_to_json(response.model_spec)},\n'
            f'"metadata": {{"{SIGNATURES}": {_to_json(signatures)}}}\n}}\n'
        ).encode()


def _model_spec(match: re.Match[str]) -> model_pb2.ModelSpec:
    """The model of a path: name, and version or label where they are given."""
    name, version, label = match.group(1, 2, 3)
    spec = model_pb2.ModelSpec(name=rest_json.path_text(name, "model name"))
    if version is not None:
        digits = version.lstrip("0") or "0"
        if len(digits) > len(str(_MAX_VERSION)) or int(digits) > _MAX_VERSION:
            raise InvalidArgument(f"Failed to convert version: {version} to numeric.")
        spec.version.value = int(digits)
    elif label is not None:
        spec.version_label = rest_json.path_text(label, "model version label")
    return spec


def _to_json(message: Message) -> str:
    return json_format.MessageToJson(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True, indent=1
    )
