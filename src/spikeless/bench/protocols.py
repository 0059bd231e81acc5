"""How the load is sent: gRPC, TensorFlow Serving's REST API, or Open Inference's.

In: a request of gRPC. Out: the path and the body of the same request in a `Protocol`,
and what an answer says of the version that made it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from spikeless.errors import Unimplemented
from spikeless.formats import open_inference, rest_json
from spikeless.formats.kinds import PREDICT, Kind
from spikeless.formats.tensors import to_numpy

#: TensorFlow Serving's answers do not say which version made them. A model may, by an
#: output of this name.
_VERSION_OUTPUT = re.compile(rb'"version"\s*:[\s\[]*(\d+)')
#: Open Inference has a field for it, which servers may leave out.
_MODEL_VERSION = re.compile(
    rb'"model_version"\s*:\s*"(\d+)"|"name"\s*:\s*"version".*?"data"\s*:[\s\[]*(\d+)', re.DOTALL
)


@dataclass(frozen=True)
class Protocol:
    """A way to send requests."""

    #: What it is called on the command line and in results.
    name: str
    #: Kind, request and name of the model -> path and body.
    encode: Callable[[Kind, Any, str], tuple[str, bytes]]
    #: Kind and answer -> the version; 0 where it says none.
    served_version: Callable[[Kind, bytes], int]
    #: Whether TensorFlow Serving does not speak it.
    only_embedded: bool = False

    @property
    def is_http(self) -> bool:
        """Whether it is POST over HTTP/1.1, and not gRPC."""
        return self is not _GRPC


def _grpc(kind: Kind, request: Any, model: str) -> tuple[str, bytes]:
    return kind.path, request.SerializeToString()


def _rest(kind: Kind, request: Any, model: str) -> tuple[str, bytes]:
    if kind.rest_verb is None:
        raise Unimplemented(f"{kind} has no REST call")
    signature = request.model_spec.signature_name
    if kind.takes_examples:
        body = rest_json.examples_request_body(signature, request.input)
    else:
        body = rest_json.predict_request_body(signature, _inputs(request))
    return f"/v1/models/{quote(model, safe='')}:{kind.rest_verb}", body


def _open_inference(kind: Kind, request: Any, model: str) -> tuple[str, bytes]:
    if kind is not PREDICT:
        raise Unimplemented(f"{kind} has no call in the Open Inference Protocol")
    outputs = list(request.output_filter)
    body = open_inference.request_body(request.model_spec.signature_name, _inputs(request), outputs)
    return f"/v2/models/{quote(model, safe='')}/infer", body


def _inputs(request: Any) -> dict[str, Any]:
    return {alias: to_numpy(tensor) for alias, tensor in sorted(request.inputs.items())}


def _found(pattern: re.Pattern[bytes]) -> Callable[[Kind, bytes], int]:
    def served_version(kind: Kind, response: bytes) -> int:
        found = pattern.search(response)
        return int(found[found.lastindex or 0]) if found else 0

    return served_version


_GRPC = Protocol("grpc", _grpc, Kind.served_version)
#: By their names.
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        _GRPC,
        Protocol("rest", _rest, _found(_VERSION_OUTPUT)),
        Protocol("open-inference", _open_inference, _found(_MODEL_VERSION), only_embedded=True),
    )
}
GRPC = _GRPC.name
