"""PredictionService over gRPC: answers, and the status and message of refusals."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from harness import Running, refused

from spikeless.client import Client, model_spec
from spikeless.errors import Code
from spikeless.formats.protos import (
    classification_pb2,
    example_pb2,
    get_model_metadata_pb2,
    inference_pb2,
    input_pb2,
    predict_pb2,
    regression_pb2,
    tensor_pb2,
    types_pb2,
)
from spikeless.formats.tensors import to_numpy, to_proto

X = np.arange(8, dtype=np.float32).reshape(2, 4)
SCORES = X @ np.arange(8, dtype=np.float32).reshape(4, 2)


@pytest.fixture
def client(shared: Running) -> Client:
    return shared.client


def predict(
    client: Client,
    model: str,
    signature: str,
    outputs: tuple[str, ...] = (),
    /,
    **inputs: tensor_pb2.TensorProto,
) -> predict_pb2.PredictResponse:
    request = predict_pb2.PredictRequest(
        model_spec=model_spec(model, signature=signature), output_filter=outputs
    )
    for alias, value in inputs.items():
        request.inputs[alias].CopyFrom(value)
    return client.call(client.prediction.Predict, request)


# --- Predict --------------------------------------------------------------------------


def test_predict_answers_with_values_version_and_signature(client: Client) -> None:
    response = predict(client, "signatures", "", x=to_proto(X))
    assert response.model_spec.name == "signatures"
    assert response.model_spec.version.value == 1
    assert response.model_spec.signature_name == "serving_default"
    np.testing.assert_array_equal(to_numpy(response.outputs["scores"]), SCORES)
    assert response.outputs["scores"].dtype == types_pb2.DT_FLOAT
    assert len(response.outputs["scores"].float_val) == 4, "outputs go into the typed fields by default"


@pytest.mark.parametrize("encoding", ["tensor_content", "typed field"])
@pytest.mark.parametrize(
    ("signature", "values"),
    [
        ("float32", np.array([[1.5, -0.0], [np.inf, 3e38]], np.float32)),
        ("float64", np.array([[1e-300, -2.5], [np.inf, 1 / 3]], np.float64)),
        ("float16", np.array([[1.5, -65504.0], [np.inf, 6e-8]], np.float16)),
        ("bfloat16", np.array([[1.5, -2.0], [np.inf, 3e38]], ml_dtypes.bfloat16)),
        ("complex64", np.array([[1 + 2j, -3.5j], [0, 1e30]], np.complex64)),
        ("complex128", np.array([[1 + 2j, -3.5j], [0, 1e300]], np.complex128)),
        ("int8", np.array([[-128, 127], [0, -1]], np.int8)),
        ("int16", np.array([[-32768, 32767], [0, -1]], np.int16)),
        ("int32", np.array([[-(2**31), 2**31 - 1], [0, -1]], np.int32)),
        ("int64", np.array([[-(2**63), 2**63 - 1], [0, -1]], np.int64)),
        ("uint8", np.array([[0, 255], [1, 2]], np.uint8)),
        ("uint16", np.array([[0, 65535], [1, 2]], np.uint16)),
        ("uint32", np.array([[0, 2**32 - 1], [1, 2]], np.uint32)),
        ("uint64", np.array([[0, 2**64 - 1], [1, 2]], np.uint64)),
        ("bool", np.array([[True, False], [False, True]])),
        ("string", np.array([[b"", b"a\x00\xff"], ["毛刺".encode(), b"x" * 1000]], dtype=object)),
    ],
)
def test_every_dtype_comes_back_as_sent(
    client: Client, signature: str, values: np.ndarray[Any, Any], encoding: str
) -> None:
    sent = to_proto(values, as_field=encoding == "typed field")
    answer = to_numpy(predict(client, "dtypes", signature, x=sent).outputs["y"])
    assert answer.dtype == values.dtype
    assert answer.shape == values.shape
    assert answer.tolist() == values.tolist()


def test_nan_is_a_value(client: Client) -> None:
    answer = predict(client, "dtypes", "float32", x=to_proto(np.full([1, 2], np.nan, np.float32)))
    assert np.isnan(to_numpy(answer.outputs["y"])).all()


def shaped(dtype: int, *dims: int, **fields: object) -> tensor_pb2.TensorProto:
    proto = tensor_pb2.TensorProto(dtype=dtype, **fields)
    for dim in dims:
        proto.tensor_shape.dim.add(size=dim)
    return proto


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (shaped(types_pb2.DT_FLOAT, 2, 2, float_val=[7]), [[7, 7], [7, 7]]),
        (shaped(types_pb2.DT_FLOAT, 2, 2, float_val=[1, 2, 3]), [[1, 2], [3, 3]]),
        (shaped(types_pb2.DT_FLOAT, 2, 2), [[0, 0], [0, 0]]),
        (shaped(types_pb2.DT_FLOAT, 1, 2, float_val=[1, 2, 3]), [[1, 2]]),
    ],
    ids=["one value fills", "the last value repeats", "no value is zero", "more values than fit are dropped"],
)
def test_typed_fields_need_not_be_complete(
    client: Client, sent: tensor_pb2.TensorProto, expected: list[list[float]]
) -> None:
    answer = predict(client, "dtypes", "float32", x=sent)
    assert to_numpy(answer.outputs["y"]).tolist() == expected


def test_strings_repeat_too(client: Client) -> None:
    sent = shaped(types_pb2.DT_STRING, 2, 2, string_val=[b"a", b"b"])
    answer = to_numpy(predict(client, "dtypes", "string", x=sent).outputs["y"])
    assert answer.tolist() == [[b"a", b"b"], [b"b", b"b"]]


def test_scalars_and_empty_tensors(client: Client) -> None:
    answer = predict(
        client, "signatures", "scaled", x=to_proto(np.array([1, 2], np.float32)), rate=to_proto(np.float32(3))
    )
    assert to_numpy(answer.outputs["y"]).tolist() == [3, 6]
    total = predict(client, "signatures", "fixed", x=to_proto(np.ones([2, 3], np.float32)))
    assert total.outputs["sum"].tensor_shape.dim == []
    assert to_numpy(total.outputs["sum"]) == 6
    empty = predict(client, "signatures", "", x=to_proto(np.empty([0, 4], np.float32)))
    assert to_numpy(empty.outputs["scores"]).shape == (0, 2)


@pytest.mark.parametrize("shape", [(), (1,), (2, 0, 3), (1, 2, 1, 2, 1, 2)])
def test_any_rank(client: Client, shape: tuple[int, ...]) -> None:
    answer = predict(client, "signatures", "any_rank", x=to_proto(np.zeros(shape, np.float32)))
    np.testing.assert_array_equal(to_numpy(answer.outputs["y"]), np.ones(shape))


@pytest.mark.parametrize("as_field", [False, True])
@pytest.mark.parametrize("signature", ["float32", "complex64", "int64", "bool", "string", "bfloat16"])
def test_large_tensors(client: Client, signature: str, as_field: bool) -> None:
    """Of half a megabyte or more."""
    numbers = np.arange(1 << 19).reshape(-1, 2) % 251
    if signature == "string":
        values = np.array([[b"a" * (1 << 19), b""]], object)
    else:
        values = numbers.astype({"bfloat16": ml_dtypes.bfloat16}.get(signature, signature))
    answer = predict(client, "dtypes", signature, x=to_proto(values, as_field=as_field))
    np.testing.assert_array_equal(to_numpy(answer.outputs["y"]), values)


def test_several_inputs_and_outputs(client: Client) -> None:
    answer = client.predict(
        "signatures",
        {
            "ids": np.array([1, 2]),
            "name": np.array([b"a", b"b"], dtype=object),
            "flag": np.array([[True], [False]]),
            "weight": np.array([[1, 1, 1], [2.0, 2, 2]]),
        },
        signature="mixed",
    )
    assert answer["total"].tolist() == [4.0, -4.0]
    assert answer["text"].tolist() == [b"a-1", b"b-2"]


def test_output_filter(client: Client) -> None:
    inputs = {
        "ids": to_proto(np.array([1])),
        "name": to_proto(np.array([b"a"], dtype=object)),
        "flag": to_proto(np.array([[True]])),
        "weight": to_proto(np.ones([1, 3])),
    }
    both = predict(client, "signatures", "mixed", ("text", "total"), **inputs)
    assert set(both.outputs) == {"text", "total"}
    one = predict(client, "signatures", "mixed", ("text",), **inputs)
    assert set(one.outputs) == {"text"}
    with refused(
        Code.INVALID_ARGUMENT,
        r"^output tensor alias not found in signature: other "
        r"Outputs expected to be in the set \{text,total\}\.$",
    ):
        predict(client, "signatures", "mixed", ("other",), **inputs)
    with refused(Code.INVALID_ARGUMENT, "^duplicate output tensor alias: text$"):
        predict(client, "signatures", "mixed", ("text", "text"), **inputs)


def test_version_and_label_choose_the_model(client: Client) -> None:
    x = {"x": np.array([3.0], np.float32)}
    assert client.predict("times", x)["y"] == [6], "the highest version answers"
    assert client.predict("times", x, version=1)["y"] == [3]
    assert client.predict("times", x, version=2)["y"] == [6]
    assert client.predict("times", x, label="stable")["y"] == [3]
    assert client.predict("times", x, label="canary")["y"] == [6]


# --- how Predict refuses --------------------------------------------------------------


def test_unknown_models_versions_labels_and_signatures(client: Client) -> None:
    x = {"x": X}
    with refused(Code.NOT_FOUND, r"^Servable not found for request: Latest\(nobody\)$"):
        client.predict("nobody", x)
    with refused(Code.NOT_FOUND, r"^Servable not found for request: Specific\(signatures, 9\)$"):
        client.predict("signatures", x, version=9)
    with refused(Code.INVALID_ARGUMENT, "^Unrecognized servable version label: beta$"):
        client.predict("times", x, label="beta")
    with refused(Code.FAILED_PRECONDITION, '^Serving signature key "nothing" not found.$'):
        client.predict("signatures", x, signature="nothing")
    with refused(Code.INVALID_ARGUMENT, "^ModelSpec has no name specified.$"):
        client.predict("", x)
    with refused(Code.INVALID_ARGUMENT, "^Missing ModelSpec$"):
        client.call(client.prediction.Predict, predict_pb2.PredictRequest())


def test_missing_and_additional_inputs(client: Client) -> None:
    value = to_proto(X)
    with refused(
        Code.INVALID_ARGUMENT,
        r"^input size does not match signature: 0!=1 len\(\{\}\) != len\(\{x\}\)\. Sent extra: \{\}\. "
        r"Missing but required: \{x\}\.$",
    ):
        predict(client, "signatures", "")
    with refused(
        Code.INVALID_ARGUMENT,
        r"^input size does not match signature: 2!=1 len\(\{x,z\}\) != len\(\{x\}\)\. Sent extra: \{z\}\. "
        r"Missing but required: \{\}\.$",
    ):
        predict(client, "signatures", "", x=value, z=value)
    with refused(Code.INVALID_ARGUMENT, r"z|x"):
        predict(client, "signatures", "", z=value)


def test_wrong_dtypes_and_shapes(client: Client) -> None:
    with refused(Code.INVALID_ARGUMENT, "float but (int32|double)|to be float|float"):
        predict(client, "signatures", "", x=to_proto(X.astype(np.int32)))
    with refused(Code.INVALID_ARGUMENT, "Matrix size-incompatible"):
        predict(client, "signatures", "", x=to_proto(np.ones([2, 5], np.float32)))
    # The second is said by the kernel that TensorFlow takes on some processors.
    with refused(Code.INVALID_ARGUMENT, "ndims must be >= 2|has different ndims"):
        predict(client, "signatures", "", x=to_proto(np.ones([4], np.float32)))


@pytest.mark.parametrize(
    "sent",
    [
        shaped(types_pb2.DT_FLOAT, 1, 4, tensor_content=b"123"),
        shaped(types_pb2.DT_FLOAT, 1, 4, tensor_content=b"1" * 17),
        shaped(types_pb2.DT_FLOAT, -1, 4, float_val=[1]),
        shaped(types_pb2.DT_FLOAT, 1 << 40, 1 << 40),
        shaped(types_pb2.DT_INVALID, 1, 4),
        shaped(99, 1, 4),
    ],
    ids=["short", "long", "negative", "huge", "no type", "unknown type"],
)
def test_tensors_that_are_none(client: Client, sent: tensor_pb2.TensorProto) -> None:
    with refused(Code.INVALID_ARGUMENT, "^tensor parsing error: x"):
        predict(client, "signatures", "", x=sent)


def test_a_short_tensor_that_stands_for_a_huge_one(embedded: None, client: Client) -> None:
    with refused(Code.INVALID_ARGUMENT, "^tensor parsing error: x: .*send them all$"):
        predict(client, "signatures", "", x=shaped(types_pb2.DT_FLOAT, 1 << 28, 4, float_val=[1]))


@pytest.mark.parametrize(
    "sent",
    [
        shaped(types_pb2.DT_RESOURCE),
        shaped(types_pb2.DT_VARIANT),
        shaped(types_pb2.DT_QINT8, 1, int_val=[1]),
        shaped(types_pb2.DT_FLOAT, *[1] * 33, float_val=[1]),
    ],
    ids=["resource", "variant", "quantized", "33 dimensions"],
)
def test_tensors_of_other_types(embedded: None, client: Client, sent: tensor_pb2.TensorProto) -> None:
    with refused(Code.INVALID_ARGUMENT, "^tensor parsing error: x: "):
        predict(client, "signatures", "any_rank", x=sent)


def test_an_error_of_a_kernel_reaches_the_caller(client: Client) -> None:
    with refused(Code.INVALID_ARGUMENT, r"indices\[1\] = 99 is not in \[0, 10\)"):
        predict(client, "signatures", "gather", ids=to_proto(np.array([1, 99], np.int32)))


def test_a_deadline_ends_the_call(shared: Running) -> None:
    impatient = Client(shared.server.target, timeout=0.2)
    with impatient, refused(Code.DEADLINE_EXCEEDED):
        impatient.predict("times", {"steps": np.array(1_000_000, np.int32)}, signature="spin")
    assert shared.client.predict("times", {"x": np.ones(1, np.float32)})["y"] == [2]


# --- Classify, Regress, MultiInference ------------------------------------------------


def example(x: list[float], **more: float) -> example_pb2.Example:
    result = example_pb2.Example()
    result.features.feature["x"].float_list.value.extend(x)
    for name, value in more.items():
        result.features.feature[name].float_list.value.append(value)
    return result


def examples(*listed: example_pb2.Example, context: example_pb2.Example | None = None) -> input_pb2.Input:
    result = input_pb2.Input()
    if context is None:
        result.example_list.examples.extend(listed)
    else:
        result.example_list_with_context.context.CopyFrom(context)
        result.example_list_with_context.examples.extend(listed)
    return result


ONES, TENS = example([1, 1, 1, 1]), example([10, 10, 10, 10])


def classify(
    client: Client, given: input_pb2.Input, signature: str = "classify", name: str = "examples"
) -> classification_pb2.ClassificationResponse:
    request = classification_pb2.ClassificationRequest(
        model_spec=model_spec(name, signature=signature), input=given
    )
    return client.call(client.prediction.Classify, request)


def regress(
    client: Client, given: input_pb2.Input, signature: str = "regress", name: str = "examples"
) -> regression_pb2.RegressionResponse:
    request = regression_pb2.RegressionRequest(model_spec=model_spec(name, signature=signature), input=given)
    return client.call(client.prediction.Regress, request)


def test_classify(client: Client) -> None:
    response = classify(client, examples(ONES, TENS))
    assert response.model_spec.version.value == 1
    assert response.model_spec.signature_name == "classify"
    rows = [[(entry.label, entry.score) for entry in row.classes] for row in response.result.classifications]
    assert rows == [[("no", 4), ("yes", 4)], [("no", 40), ("yes", 40)]]


def test_classify_needs_no_classes(client: Client) -> None:
    (row,) = classify(client, examples(ONES), "classes", "signatures").result.classifications
    assert [entry.label for entry in row.classes] == ["", ""]
    assert [entry.score for entry in row.classes] == [12, 16]


def test_regress(client: Client) -> None:
    response = regress(client, examples(ONES, TENS))
    assert [row.value for row in response.result.regressions] == [4, 40]
    assert response.model_spec.signature_name == "regress"


def test_the_context_joins_every_example(client: Client) -> None:
    context = example([], bias=0.5)
    del context.features.feature["x"]
    response = regress(client, examples(ONES, TENS, context=context))
    assert [row.value for row in response.result.regressions] == [4.5, 40.5]


def test_how_classify_and_regress_refuse(client: Client) -> None:
    for call in (classify, regress):
        with refused(Code.INVALID_ARGUMENT, "^Input is empty.$"):
            call(client, examples())
        with refused(Code.INVALID_ARGUMENT, "^No signature was found with the name: nothing$"):
            call(client, examples(ONES), "nothing")
        with refused(Code.NOT_FOUND, r"^Servable not found for request: Latest\(nobody\)$"):
            call(client, examples(ONES), name="nobody")
        with refused(Code.INVALID_ARGUMENT, "Expected one input Tensor."):
            call(client, examples(ONES), "mixed", "signatures")
        with refused(Code.INVALID_ARGUMENT, "x"):
            call(client, examples(example_pb2.Example()))
    with refused(Code.INVALID_ARGUMENT, "^No classification inputs found in SignatureDef: "):
        classify(client, examples(ONES), "serving_default")
    with refused(Code.INVALID_ARGUMENT, "^No regression inputs found in SignatureDef: "):
        regress(client, examples(ONES), "serving_default")
    with refused(Code.INVALID_ARGUMENT, "^Missing ModelSpec$"):
        client.call(client.prediction.Classify, classification_pb2.ClassificationRequest())
    with refused(Code.INVALID_ARGUMENT, "^Missing ModelSpec$"):
        client.call(client.prediction.Regress, regression_pb2.RegressionRequest())


def multi_inference(
    client: Client, *tasks: tuple[str, str], name: str = "examples", given: input_pb2.Input | None = None
) -> inference_pb2.MultiInferenceResponse:
    request = inference_pb2.MultiInferenceRequest(input=examples(ONES, TENS) if given is None else given)
    for method, signature in tasks:
        request.tasks.add(
            model_spec=model_spec(name, signature=signature), method_name=f"tensorflow/serving/{method}"
        )
    return client.call(client.prediction.MultiInference, request)


def test_multi_inference(client: Client) -> None:
    response = multi_inference(client, ("classify", "classify"), ("regress", "regress"))
    first, second = response.results
    assert first.model_spec.signature_name == "classify"
    assert first.model_spec.version.value == 1
    assert [row.classes[1].score for row in first.classification_result.classifications] == [4, 40]
    assert second.model_spec.signature_name == "regress"
    assert [row.value for row in second.regression_result.regressions] == [4, 40]


def test_multi_inference_with_an_input_for_each_signature(client: Client) -> None:
    """As TensorFlow 2 exports them."""
    response = multi_inference(client, ("regress", "elsewhere"), ("classify", "classify"))
    first, second = response.results
    assert first.model_spec.signature_name == "elsewhere"
    alone = client.call(
        client.prediction.Regress,
        regression_pb2.RegressionRequest(
            model_spec=model_spec("examples", signature="elsewhere"), input=examples(ONES, TENS)
        ),
    )
    assert first.regression_result == alone.result
    assert [row.classes[1].score for row in second.classification_result.classifications] == [4, 40]


def test_how_multi_inference_refuses(client: Client) -> None:
    with refused(Code.INVALID_ARGUMENT, "^Duplicate evaluation of signature: regress$"):
        multi_inference(client, ("regress", "regress"), ("regress", "regress"))
    with refused(Code.INVALID_ARGUMENT, "^Requested signature not found in model graph: nothing$"):
        multi_inference(client, ("regress", "nothing"))
    with refused(Code.UNIMPLEMENTED, "^Unsupported signature method_name: tensorflow/serving/predict$"):
        multi_inference(client, ("predict", "regress"))
    with refused(Code.INVALID_ARGUMENT, "^ModelSpec has no name specified.$"):
        multi_inference(client, ("regress", "regress"), name="")
    with refused(Code.NOT_FOUND, r"^Servable not found for request: Latest\(nobody\)$"):
        multi_inference(client, ("regress", "regress"), name="nobody")
    with refused(Code.INVALID_ARGUMENT, "^Input is empty.$"):
        multi_inference(client, ("regress", "regress"), given=input_pb2.Input())
    with refused(Code.INVALID_ARGUMENT):
        multi_inference(client)


# --- GetModelMetadata -----------------------------------------------------------------


def metadata(client: Client, *fields: str, name: str = "signatures") -> Any:
    request = get_model_metadata_pb2.GetModelMetadataRequest(
        model_spec=model_spec(name), metadata_field=fields
    )
    return client.call(client.prediction.GetModelMetadata, request)


def test_metadata_holds_the_signatures(client: Client) -> None:
    response = metadata(client, "signature_def")
    assert response.model_spec.name == "signatures"
    assert response.model_spec.version.value == 1
    signatures = client.signatures("signatures")
    assert {"serving_default", "mixed", "any_rank"} <= set(signatures)
    default = signatures["serving_default"]
    assert default.method_name == "tensorflow/serving/predict"
    assert default.inputs["x"].dtype == types_pb2.DT_FLOAT
    assert [dim.size for dim in default.inputs["x"].tensor_shape.dim] == [-1, 4]
    assert signatures["any_rank"].inputs["x"].tensor_shape.unknown_rank


def test_how_metadata_refuses(client: Client) -> None:
    with refused(Code.INVALID_ARGUMENT, "must specify at least one metadata_field$"):
        metadata(client)
    with refused(Code.INVALID_ARGUMENT, "^Metadata field .* is not supported"):
        metadata(client, "graph_def")
    with refused(Code.NOT_FOUND, r"^Servable not found for request: Latest\(nobody\)$"):
        metadata(client, "signature_def", name="nobody")
    with refused(Code.INVALID_ARGUMENT, "^Missing ModelSpec$"):
        client.call(client.prediction.GetModelMetadata, get_model_metadata_pb2.GetModelMetadataRequest())
