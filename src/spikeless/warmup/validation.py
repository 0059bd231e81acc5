"""Check that a request fits its signature, before any server tries it.

In: a request and the model's signatures. Out: nothing, or an error that
says what does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spikeless.errors import InvalidArgument, Unimplemented
from spikeless.formats.kinds import CLASSIFY, MULTI_INFERENCE, PREDICT, Kind, serialized_examples
from spikeless.formats.protos import example_pb2, input_pb2, predict_pb2, tensor_pb2
from spikeless.formats.savedmodel import Signature, TensorSpec
from spikeless.formats.tensors import dtype_name, shape_text, to_numpy
from spikeless.runtime.model import CLASSES_OUTPUT, REGRESS_OUTPUT, SCORES_OUTPUT
from spikeless.warmup.features import check_example
from spikeless.warmup.requests import TASK_KINDS, Servable, WarmupRequest, at, is_examples_signature

_OUTPUTS = {True: {CLASSES_OUTPUT, SCORES_OUTPUT}, False: {REGRESS_OUTPUT}}


def validate(servable: Servable, request: WarmupRequest) -> None:
    """Raise what is wrong with a request, and where it came from.

    Raises:
        NotFound: there is no such signature.
        InvalidArgument: an input is unknown, missing, or of the wrong dtype or shape;
            examples do not have the features that the model parses; a signature cannot
            answer this kind of request.
        Unimplemented: a MultiInference task of another method than Classify and
            Regress.
    """
    kind, message = request.kind, request.message
    with at(request.source):
        if kind == PREDICT:
            _check_predict(servable, message)
        elif kind == MULTI_INFERENCE:
            _check_multi_inference(servable, message)
        elif kind.takes_examples:
            signature = servable.signature(message.model_spec.signature_name)
            _check_examples(servable, signature, kind, message.input)


def _check_predict(servable: Servable, message: predict_pb2.PredictRequest) -> None:
    signature = servable.signature(message.model_spec.signature_name)
    sent, known = set(message.inputs), set(signature.inputs)
    if unknown := sent - known:
        raise InvalidArgument(
            f"signature {signature.key!r} has no input {_names(unknown)}; it has: {_specs(signature)}"
        )
    if missing := known - sent - servable.defaults(signature.key):
        raise InvalidArgument(
            f"signature {signature.key!r} lacks input {_names(missing)}; it has: {_specs(signature)}"
        )
    if unknown := set(message.output_filter) - set(signature.outputs):
        raise InvalidArgument(f"signature {signature.key!r} has no output {_names(unknown)}")
    for alias, tensor in sorted(message.inputs.items()):
        _check_tensor(signature.inputs[alias], tensor)


def _check_tensor(spec: TensorSpec, tensor: tensor_pb2.TensorProto) -> None:
    if tensor.dtype != spec.dtype:
        raise InvalidArgument(
            f"input {spec.alias!r} is {dtype_name(tensor.dtype)}, but the signature takes {spec}; convert it"
        )
    shape = to_numpy(tensor).shape
    if not spec.allows(shape):
        raise InvalidArgument(
            f"input {spec.alias!r} has shape {shape_text(shape)}, but the signature takes {spec}"
        )


def _check_examples(servable: Servable, signature: Signature, kind: Kind, examples: input_pb2.Input) -> None:
    wanted = _OUTPUTS[kind == CLASSIFY]
    if not is_examples_signature(signature) or not wanted & set(signature.outputs):
        raise InvalidArgument(
            f"signature {signature.key!r} cannot answer {kind}: that takes one string input 'inputs' and "
            f"output {_names(wanted)}; it has: {_specs(signature)} -> {_names(signature.outputs)}"
        )
    serialized = serialized_examples(examples)
    if not serialized:
        raise InvalidArgument("the request holds no example")
    features = servable.features(signature.key)
    for example in serialized:
        check_example(example_pb2.Example.FromString(example), features)


def _check_multi_inference(servable: Servable, message: Any) -> None:
    if not message.tasks:
        raise InvalidArgument("the MultiInference request has no tasks")
    keys = [task.model_spec.signature_name for task in message.tasks]
    if len(set(keys)) < len(keys):
        raise InvalidArgument(f"the MultiInference request asks twice for the same signature: {_names(keys)}")
    for key, task in zip(keys, message.tasks, strict=True):
        if task.method_name not in TASK_KINDS:
            raise Unimplemented(f"MultiInference cannot ask for method {task.method_name!r}")
        _check_examples(servable, servable.signature(key), TASK_KINDS[task.method_name], message.input)


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def _specs(signature: Signature) -> str:
    return "; ".join(map(str, signature.inputs.values()))
