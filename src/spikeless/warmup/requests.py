"""Requests on their way into a warmup file, and the signatures that they are for.

In: tensors or examples. Out: ``PredictionLog`` messages that hold a request and no
response.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spikeless.errors import InvalidArgument, NotFound, SpikelessError
from spikeless.formats import kinds, savedmodel
from spikeless.formats.kinds import KINDS, MULTI_INFERENCE, PREDICT, Kind, serialized_examples
from spikeless.formats.protos import input_pb2, meta_graph_pb2, prediction_log_pb2, types_pb2
from spikeless.formats.savedmodel import Signature
from spikeless.formats.tensors import to_proto
from spikeless.runtime.model import EXAMPLES_INPUT
from spikeless.warmup.features import FeatureSpec, parsed_features

#: Method name of a signature -> the kind of request that it is for.
_METHOD_KINDS = {kind.signature_method: kind for kind in KINDS if kind.signature_method}
#: Method name of a MultiInference task -> its kind.
TASK_KINDS = {method: kind for method, kind in _METHOD_KINDS.items() if kind.takes_examples}


@contextmanager
def at(source: str) -> Iterator[None]:
    """Say in the block's errors which request they are about."""
    try:
        yield
    except SpikelessError as error:
        raise type(error)(f"{source}: {error}") from None


@dataclass(frozen=True)
class WarmupRequest:
    """One request and where it came from, for messages."""

    source: str
    #: Of one of the kinds that servers replay.
    log: prediction_log_pb2.PredictionLog

    @property
    def kind(self) -> Kind:
        return kinds.BY_LOG_FIELD[self.log.WhichOneof("log_type")]

    @property
    def message(self) -> Any:
        """The request message inside the log."""
        return getattr(self.log, self.kind.log_field).request

    @property
    def model_specs(self) -> list[Any]:
        """Every ModelSpec in the request; changing them changes it."""
        return self.kind.request_specs(self.message)


@dataclass(frozen=True)
class Target:
    """What requests are sent to: a signature, or for MultiInference several."""

    kind: Kind
    keys: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind} {'+'.join(self.keys)}"


@dataclass(frozen=True)
class Servable:
    """A SavedModel as requests see it."""

    meta_graph: meta_graph_pb2.MetaGraphDef
    signatures: Mapping[str, Signature]
    #: Signature key -> kind of request, where it is not the one that the method name
    #: says.
    kinds: Mapping[str, str]
    _features: dict[str, dict[str, FeatureSpec]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def read(cls, path: str | os.PathLike[str], kinds: Mapping[str, str] | None = None) -> Servable:
        """Read the SavedModel in ``path``; ``NotFound`` where there is none."""
        meta_graph = savedmodel.read(path).meta_graph()
        return cls(meta_graph, savedmodel.signatures_of(meta_graph), kinds or {})

    def signature(self, key: str) -> Signature:
        """The signature ``key``, or ``NotFound`` with those that there are."""
        if key not in self.signatures:
            raise NotFound(f"there is no signature {key!r}; the model has: {', '.join(self.signatures)}")
        return self.signatures[key]

    def target(self, key: str) -> Target:
        """The signature ``key`` with its own kind of request."""
        own = _METHOD_KINDS.get(self.signature(key).method_name, PREDICT)
        return Target(kinds.BY_NAME[self.kinds[key]] if key in self.kinds else own, (key,))

    def multi_inference(self, keys: Sequence[str]) -> Target:
        """Several Classify and Regress signatures in one request.

        Raises:
            InvalidArgument: one of them is of another kind.
        """
        for key in keys:
            if (kind := self.target(key).kind) not in TASK_KINDS.values():
                raise InvalidArgument(
                    f"MultiInference joins Classify and Regress signatures, but {key!r} is {kind}"
                )
        return Target(MULTI_INFERENCE, tuple(keys))

    def features(self, key: str) -> dict[str, FeatureSpec]:
        """The features that the signature ``key`` parses out of its examples."""
        if key not in self._features:
            self._features[key] = parsed_features(self.meta_graph, self.signature(key))
        return self._features[key]

    def defaults(self, key: str) -> set[str]:
        """The inputs that a request may leave out."""
        return set(self.meta_graph.signature_def[key].defaults)


def predict(key: str, inputs: Mapping[str, np.ndarray[Any, Any]]) -> prediction_log_pb2.PredictionLog:
    """A Predict request with these tensors for the signature ``key``."""
    log = prediction_log_pb2.PredictionLog()
    request = log.predict_log.request
    request.model_spec.signature_name = key
    for alias, array in inputs.items():
        request.inputs[alias].CopyFrom(to_proto(array))
    return log


def with_examples(
    servable: Servable, target: Target, examples: input_pb2.Input
) -> prediction_log_pb2.PredictionLog:
    """A request with these examples; Predict takes them serialized, in its only input.

    Raises:
        InvalidArgument: a Predict signature that has no such input.
    """
    key = target.keys[0]
    if target.kind == PREDICT:
        specs = list(servable.signature(key).inputs.values())
        if len(specs) != 1 or specs[0].dtype != types_pb2.DT_STRING:
            raise InvalidArgument(
                f"examples cannot be sent to Predict signature {key!r}: it has not one string input but "
                + "; ".join(map(str, specs))
            )
        serialized = np.array(serialized_examples(examples), dtype=object)
        return predict(key, {specs[0].alias: serialized})
    log = prediction_log_pb2.PredictionLog()
    request = getattr(log, target.kind.log_field).request
    request.input.CopyFrom(examples)
    if target.kind == MULTI_INFERENCE:
        for key in target.keys:
            task = request.tasks.add(method_name=servable.target(key).kind.signature_method)
            task.model_spec.signature_name = key
    else:
        request.model_spec.signature_name = key
    return log


def is_examples_signature(signature: Signature) -> bool:
    """Whether Classify and Regress can feed it: one string input named ``inputs``."""
    spec = signature.inputs.get(EXAMPLES_INPUT)
    return len(signature.inputs) == 1 and spec is not None and spec.dtype == types_pb2.DT_STRING
