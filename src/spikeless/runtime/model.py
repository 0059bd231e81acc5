"""A loaded model's answer to each kind of request, without a transport.

In: the request messages of ``tensorflow_serving/apis``. Out: its response messages, or
a ``SpikelessError`` with the status code and message of TensorFlow Serving's own
``predict_util.cc``, ``classifier.cc``, ``regressor.cc`` and ``multi_inference.cc``.
gRPC, REST and warmup replay all go through here, so they cannot differ.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from spikeless.errors import FailedPrecondition, Internal, InvalidArgument, SpikelessError, Unimplemented
from spikeless.formats import kinds, large_tensors
from spikeless.formats.kinds import Kind
from spikeless.formats.protos import (
    classification_pb2,
    inference_pb2,
    input_pb2,
    meta_graph_pb2,
    model_pb2,
    predict_pb2,
    regression_pb2,
    types_pb2,
)
from spikeless.formats.savedmodel import (
    CLASSIFY_METHOD,
    DEFAULT_SIGNATURE,
    PREDICT_METHOD,
    REGRESS_METHOD,
    Signature,
    signatures_of,
)
from spikeless.formats.tensors import data_type as data_type_of
from spikeless.formats.tensors import dtype_name, shape_text, to_numpy
from spikeless.runtime.session import CALLING_THREAD

#: The aliases that Classify and Regress signatures use (``signature_constants.h``).
EXAMPLES_INPUT = "inputs"
CLASSES_OUTPUT = "classes"
SCORES_OUTPUT = "scores"
REGRESS_OUTPUT = "outputs"

_METHODS = (PREDICT_METHOD, CLASSIFY_METHOD, REGRESS_METHOD)
_Array = np.ndarray[Any, Any]
_T = TypeVar("_T")


class Runner(Protocol):
    """What runs a model: a `spikeless.runtime.Session`, or one in front of it."""

    @property
    def meta_graph(self) -> meta_graph_pb2.MetaGraphDef: ...

    @property
    def is_bounded(self) -> bool: ...

    def run(
        self,
        feeds: Mapping[str, _Array],
        fetches: Sequence[str],
        timeout: float | None = None,
        inter_op_thread_pool: int | None = None,
    ) -> list[_Array]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Model:
    """A loaded model and the version that its responses name."""

    session: Runner
    #: Goes into the ``model_spec`` of every response; None leaves it out.
    version: int | None = None
    #: Outputs go into ``tensor_content`` instead of the typed fields
    #: (``--enable_serialization_as_tensor_content``).
    tensor_content: bool = False
    #: A signature's method name must fit the call. Off by default, as in TensorFlow
    #: Serving, because TensorFlow 2 exports know no method but Predict
    #: (``--enable_signature_method_name_check``).
    check_method_names: bool = False
    #: Told of each run of the session: ``Predict``, ``Classify``, ..., and its seconds.
    on_run: Callable[[str, float], None] | None = None
    #: Where operations run, as in `Session.load`; None is the requests' pool.
    inter_op_thread_pool: int | None = None

    @property
    def signature_defs(self) -> dict[str, meta_graph_pb2.SignatureDef]:
        """The model's signatures by key, as stored in its meta graph."""
        signatures: dict[str, meta_graph_pb2.SignatureDef] = self.session.meta_graph.signature_def
        return signatures

    @functools.cached_property
    def signatures(self) -> dict[str, Signature]:
        """The same, parsed, without the initialiser."""
        return signatures_of(self.session.meta_graph)

    @functools.cached_property
    def on_calling_thread(self) -> Model:
        """The same, whose operations run on the threads that ask it."""
        return dataclasses.replace(self, inter_op_thread_pool=CALLING_THREAD)

    @functools.cached_property
    def _names(self) -> dict[str, _TensorNames]:
        return {}

    def close(self) -> None:
        """Free the session, after the calls that are running."""
        self.session.close()

    def answer(self, kind: Kind, request: Any, timeout: float | None = None) -> Any:
        """A request of any kind; ``DEADLINE_EXCEEDED`` after ``timeout`` seconds."""
        return getattr(self, kind.method)(request, timeout)

    def predict(
        self, request: predict_pb2.PredictRequest, timeout: float | None = None
    ) -> predict_pb2.PredictResponse:
        """Named tensors in, named tensors out."""
        return self.predict_large(request, timeout).message()

    def predict_large(
        self, request: predict_pb2.PredictRequest | large_tensors.LargeRequest, timeout: float | None = None
    ) -> large_tensors.Response:
        """The same without a copy of large tensors in message objects."""
        spec = request.model_spec
        key = spec.signature_name or DEFAULT_SIGNATURE
        outputs = self._run(key, request.inputs, large_tensors.array_of, request.output_filter, timeout)
        return large_tensors.Response(self._model_spec(spec.name, key), outputs, self.tensor_content)

    def predict_arrays(
        self,
        signature: str,
        inputs: Mapping[str, _Array],
        timeout: float | None = None,
        output_filter: Iterable[str] = (),
    ) -> dict[str, _Array]:
        """The same with arrays by alias instead of messages."""
        return self._run(signature or DEFAULT_SIGNATURE, inputs, _as_it_is, output_filter, timeout)

    def _run(
        self,
        key: str,
        inputs: Mapping[str, _T],
        convert: Callable[[_T], _Array],
        output_filter: Iterable[str],
        timeout: float | None,
    ) -> dict[str, _Array]:
        names = self._names.get(key)
        if names is None:
            names = self._names[key] = _TensorNames.of(self._predict_signature(key))
        # Message maps compare their keys slowly.
        if len(inputs) == len(names.inputs) and all(alias in inputs for alias in names.inputs):
            feeds = {name: _converted(alias, inputs[alias], convert) for alias, name in names.inputs.items()}
        else:
            feeds = _feeds(names.signature, inputs, convert)
        aliases = _requested_outputs(names.signature, output_filter) if output_filter else names.all_outputs
        fetches = [names.outputs[alias] for alias in aliases]
        return dict(zip(aliases, self._run_session(kinds.PREDICT.name, feeds, fetches, timeout), strict=True))

    def _predict_signature(self, key: str) -> meta_graph_pb2.SignatureDef:
        signature = self.signature_defs.get(key)
        if signature is None:
            raise FailedPrecondition(f'Serving signature key "{key}" not found.')
        if self.check_method_names and signature.method_name not in _METHODS:
            raise Internal(
                "Expected prediction signature method_name to be one of "
                f"{{{', '.join(_METHODS)}}}. Was: {signature.method_name}"
            )
        return signature

    def _run_session(
        self, api: str, feeds: dict[str, _Array], fetches: list[str], timeout: float | None
    ) -> list[_Array]:
        if self.on_run is None:
            return self.session.run(feeds, fetches, timeout, self.inter_op_thread_pool)
        started = time.perf_counter()
        outputs = self.session.run(feeds, fetches, timeout, self.inter_op_thread_pool)
        self.on_run(api, time.perf_counter() - started)
        return outputs

    def classify(
        self, request: classification_pb2.ClassificationRequest, timeout: float | None = None
    ) -> classification_pb2.ClassificationResponse:
        """Examples in, classes with scores out."""
        return self._run_head(kinds.CLASSIFY, request, timeout)

    def regress(
        self, request: regression_pb2.RegressionRequest, timeout: float | None = None
    ) -> regression_pb2.RegressionResponse:
        """Examples in, one number each out."""
        return self._run_head(kinds.REGRESS, request, timeout)

    def _run_head(self, kind: Kind, request: Any, timeout: float | None) -> Any:
        head = _HEADS[kind.signature_method]
        key = request.model_spec.signature_name or DEFAULT_SIGNATURE
        signature = self.signature_defs.get(key)
        if signature is None:
            raise InvalidArgument(f"No signature was found with the name: {key}")
        self._check_method(signature, head)
        feed, fetches = head.tensors(signature)
        count, outputs = self._run_examples(kind.name, request.input, [feed], fetches, timeout)
        return kind.response(
            model_spec=self._model_spec(request.model_spec.name, key),
            result=head.result(signature, count, outputs),
        )

    def multi_inference(
        self, request: inference_pb2.MultiInferenceRequest, timeout: float | None = None
    ) -> inference_pb2.MultiInferenceResponse:
        """Several Classify and Regress signatures on the same examples, in one run.

        Each signature may have an input tensor of its own, as in what TensorFlow 2
        exports: all are fed with the examples.
        """
        name = ""
        tasks: dict[str, tuple[meta_graph_pb2.SignatureDef, _Head]] = {}
        feeds: set[str] = set()
        fetches: set[str] = set()
        for task in request.tasks:
            if not task.model_spec.name:
                raise InvalidArgument("Found ModelSpec with an empty model name.")
            name = name or task.model_spec.name
            if name != task.model_spec.name:
                raise InvalidArgument(
                    "All ModelSpecs in a MultiInferenceRequest must access the same model name."
                )
            key = task.model_spec.signature_name or DEFAULT_SIGNATURE
            if key in tasks:
                raise InvalidArgument(f"Duplicate evaluation of signature: {key}")
            if key not in self.signature_defs:
                raise InvalidArgument(f"Requested signature not found in model graph: {key}")
            if task.method_name not in _HEADS:
                raise Unimplemented(f"Unsupported signature method_name: {task.method_name}")
            signature, head = tasks[key] = self.signature_defs[key], _HEADS[task.method_name]
            self._check_method(signature, head)
            feed, outputs = head.tensors(signature)
            feeds.add(feed)
            fetches.update(outputs)
        if not tasks:
            raise InvalidArgument("MultiInferenceRequest has no tasks.")
        count, values = self._run_examples(
            kinds.MULTI_INFERENCE.name, request.input, sorted(feeds), sorted(fetches), timeout
        )
        response = inference_pb2.MultiInferenceResponse()
        for key, (signature, head) in tasks.items():
            result = response.results.add(model_spec=self._model_spec(name, key))
            getattr(result, head.field).CopyFrom(head.result(signature, count, values))
        return response

    def _check_method(self, signature: meta_graph_pb2.SignatureDef, head: _Head) -> None:
        if self.check_method_names and signature.method_name != head.method:
            raise InvalidArgument(
                f"Expected {head.name} signature method_name to be {head.method}. "
                f"Was: {signature.method_name}"
            )

    def _run_examples(
        self,
        api: str,
        examples: input_pb2.Input,
        inputs: list[str],
        fetches: list[str],
        timeout: float | None,
    ) -> tuple[int, dict[str, _Array]]:
        serialized = kinds.serialized_examples(examples)
        if not serialized:
            raise InvalidArgument("Input is empty.")
        feeds = dict.fromkeys(inputs, np.array(serialized, dtype=object))
        outputs = self._run_session(api, feeds, fetches, timeout)
        return len(serialized), dict(zip(fetches, outputs, strict=True))

    def _model_spec(self, name: str, signature: str) -> model_pb2.ModelSpec:
        spec = model_pb2.ModelSpec(name=name, signature_name=signature)
        if self.version is not None:
            spec.version.value = self.version
        return spec


def _as_it_is(value: _Array) -> _Array:
    return value


@dataclass(frozen=True)
class _TensorNames:
    """The tensors of a signature by alias, without a look into its message."""

    #: The message, for requests that name other tensors than all of them.
    signature: meta_graph_pb2.SignatureDef
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    all_outputs: list[str]

    @classmethod
    def of(cls, signature: meta_graph_pb2.SignatureDef) -> _TensorNames:
        inputs = {alias: info.name for alias, info in signature.inputs.items()}
        outputs = {alias: info.name for alias, info in signature.outputs.items()}
        return cls(signature, inputs, outputs, sorted(outputs))


def _converted(alias: str, value: Any, convert: Callable[[Any], _Array]) -> _Array:
    try:
        return convert(value)
    except SpikelessError as error:
        raise InvalidArgument(f"tensor parsing error: {alias}: {error}") from None


def _feeds(
    signature: meta_graph_pb2.SignatureDef, inputs: Mapping[str, _T], convert: Callable[[_T], _Array]
) -> dict[str, _Array]:
    """The inputs by tensor name; those with a default may be missing."""
    required = set(signature.inputs)
    if len(inputs) > len(required) or (len(inputs) < len(required) and not signature.defaults):
        sent = set(inputs)
        raise InvalidArgument(
            f"input size does not match signature: {len(sent)}!={len(required)} "
            f"len({_braces(sent)}) != len({_braces(required)}). Sent extra: {_braces(sent - required)}. "
            f"Missing but required: {_braces(required - sent)}."
        )
    feeds: dict[str, _Array] = {}
    for alias, info in signature.inputs.items():
        if alias not in inputs and alias not in signature.defaults:
            raise InvalidArgument(
                f"Signature input alias: {alias}(feed name: {info.name}) not found in request and no default "
                f"value provided. Inputs expected to be in the request {_braces(inputs)}, or default input "
                f"alias set: {','.join(sorted(signature.defaults))}"
            )
        if alias in inputs:
            feeds[info.name] = _converted(alias, inputs[alias], convert)
        else:
            feeds[info.name] = _converted(alias, signature.defaults[alias], to_numpy)
    if not set(inputs) <= required:
        raise InvalidArgument(
            f"Inputs contains invalid name. Used request inputs: {','.join(sorted(required & set(inputs)))}, "
            f"request input: {','.join(sorted(inputs))}"
        )
    return feeds


def _requested_outputs(signature: meta_graph_pb2.SignatureDef, output_filter: Iterable[str]) -> list[str]:
    """The output aliases that the filter names, or all of them without one."""
    aliases: list[str] = []
    for alias in output_filter:
        if alias not in signature.outputs:
            raise InvalidArgument(
                f"output tensor alias not found in signature: {alias} Outputs expected to be in the set "
                f"{_braces(signature.outputs)}."
            )
        if alias in aliases:
            raise InvalidArgument(f"duplicate output tensor alias: {alias}")
        aliases.append(alias)
    return aliases or sorted(signature.outputs)


def _braces(names: Iterable[str]) -> str:
    return "{" + ",".join(sorted(names)) + "}"


def _examples_feed(signature: meta_graph_pb2.SignatureDef, kind: str) -> str:
    if len(signature.inputs) != 1:
        raise InvalidArgument("Expected one input Tensor.")
    if EXAMPLES_INPUT not in signature.inputs:
        raise InvalidArgument(f"No {kind} inputs found in SignatureDef: {signature}")
    return str(signature.inputs[EXAMPLES_INPUT].name)


def _classify_tensors(signature: meta_graph_pb2.SignatureDef) -> tuple[str, list[str]]:
    """The tensor to feed and the tensors to fetch for a Classify signature."""
    feed = _examples_feed(signature, "classification")
    if len(signature.outputs) not in (1, 2):
        raise InvalidArgument(f"Expected one or two output Tensors, found {len(signature.outputs)}")
    fetches = [
        signature.outputs[alias].name
        for alias in (CLASSES_OUTPUT, SCORES_OUTPUT)
        if alias in signature.outputs
    ]
    if not fetches:
        raise InvalidArgument(
            f'Expected classification signature outputs to contain at least one of "{CLASSES_OUTPUT}" or '
            f'"{SCORES_OUTPUT}". Signature was: {signature}'
        )
    return feed, fetches


def _regress_tensors(signature: meta_graph_pb2.SignatureDef) -> tuple[str, list[str]]:
    """The tensor to feed and the tensor to fetch for a Regress signature."""
    feed = _examples_feed(signature, "regression")
    if len(signature.outputs) != 1:
        raise InvalidArgument("Expected one output Tensor.")
    if REGRESS_OUTPUT not in signature.outputs:
        raise InvalidArgument(f"No regression outputs found in SignatureDef: {signature}")
    return feed, [signature.outputs[REGRESS_OUTPUT].name]


def _classification_result(
    signature: meta_graph_pb2.SignatureDef, count: int, outputs: dict[str, _Array]
) -> classification_pb2.ClassificationResult:
    classes = _class_output(signature, CLASSES_OUTPUT, types_pb2.DT_STRING, np.dtype(object), count, outputs)
    scores = _class_output(signature, SCORES_OUTPUT, types_pb2.DT_FLOAT, np.dtype(np.float32), count, outputs)
    if classes is not None and scores is not None and classes.shape[1] != scores.shape[1]:
        raise InvalidArgument(
            "Tensors class and score should match in dim_size(1). Got "
            f"{classes.shape[1]} vs. {scores.shape[1]}"
        )
    result = classification_pb2.ClassificationResult()
    for row in range(count):
        entry = result.classifications.add()
        labels = None if classes is None else classes[row].tolist()
        values = None if scores is None else scores[row].tolist()
        for index in range(len(labels if labels is not None else values or [])):
            entry.classes.add(
                # Labels are text in the message; bytes that are not UTF-8 cannot be
                # sent.
                label="" if labels is None else labels[index].decode("utf-8", "replace"),
                score=0.0 if values is None else values[index],
            )
    return result


def _class_output(
    signature: meta_graph_pb2.SignatureDef,
    alias: str,
    data_type: int,
    dtype: np.dtype[Any],
    count: int,
    outputs: dict[str, _Array],
) -> _Array | None:
    if alias not in signature.outputs:
        return None
    values = outputs[signature.outputs[alias].name]
    if values.ndim != 2:
        raise InvalidArgument(
            f"Expected Tensor shape: [batch_size num_classes] but got {shape_text(values.shape)}"
        )
    if values.dtype != dtype:
        got = dtype_name(data_type_of(values.dtype))
        raise InvalidArgument(f"Expected {alias} Tensor of {dtype_name(data_type)}. Got: {got}")
    if values.shape[0] != count:
        raise InvalidArgument(f"Expected {alias} output batch size of {count}. Got: {values.shape[0]}")
    return values


def _regression_result(
    signature: meta_graph_pb2.SignatureDef, count: int, outputs: dict[str, _Array]
) -> regression_pb2.RegressionResult:
    values = outputs[signature.outputs[REGRESS_OUTPUT].name]
    if values.ndim != 1 and not (values.ndim == 2 and values.shape[1] == 1):
        raise InvalidArgument(
            "Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got "
            f"{shape_text(values.shape)}"
        )
    if values.shape[0] != count:
        raise InvalidArgument(
            f"Input batch size did not match output batch size: {count} vs. {values.shape[0]}"
        )
    if values.dtype != np.float32:
        raise InvalidArgument(
            f"Expected output Tensor of DT_FLOAT.  Got: {dtype_name(data_type_of(values.dtype))}"
        )
    result = regression_pb2.RegressionResult()
    for value in values.reshape(-1).tolist():
        result.regressions.add(value=value)
    return result


@dataclass(frozen=True)
class _Head:
    """How signatures of one method are read, and what their outputs become."""

    #: The method name of its signatures.
    method: str
    name: str
    #: The tensor to feed and the tensors to fetch.
    tensors: Callable[[meta_graph_pb2.SignatureDef], tuple[str, list[str]]]
    #: From the number of examples and the fetched values.
    result: Callable[[meta_graph_pb2.SignatureDef, int, dict[str, _Array]], Any]
    #: Where the result of one task of a MultiInference call goes.
    field: str


_HEADS: dict[str | None, _Head] = {
    head.method: head
    for head in (
        _Head(
            CLASSIFY_METHOD,
            "classification",
            _classify_tensors,
            _classification_result,
            "classification_result",
        ),
        _Head(REGRESS_METHOD, "regression", _regress_tensors, _regression_result, "regression_result"),
    )
}
