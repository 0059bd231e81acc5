"""Predict messages with large tensors: the same contents, and how often copied."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from spikeless.errors import SpikelessError
from spikeless.formats import large_tensors, open_inference, wire
from spikeless.formats.large_tensors import (
    LARGE,
    LargeRequest,
    Response,
    array_of,
    read_request,
)
from spikeless.formats.protos import model_pb2, predict_pb2
from spikeless.formats.tensors import NUMPY_DTYPES, to_numpy, to_proto
from spikeless.runtime import Session, session
from spikeless.runtime.model import Model

SIZE = 16 << 20
#: What small objects and the interpreter take meanwhile.
SLACK = 1 << 18

_ARRAYS: list[Any] = [
    *(np.arange(6).reshape(2, 3).astype(dtype) for dtype in NUMPY_DTYPES.values() if dtype.kind != "O"),
    np.array([[b"a", b""], [b"\0\xff", b"text"]], object),
    np.array(3.5, np.float32),
    np.array(b"scalar", object),
    np.empty([0, 4], np.int32),
    np.empty([2, 0], object),
    np.array([True, False]),
]


@st.composite
def _requests(draw: st.DrawFn) -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest(output_filter=draw(st.lists(st.text(max_size=3), max_size=2)))
    if draw(st.booleans()):
        request.model_spec.name = draw(st.text(max_size=5))
    for alias in draw(st.sets(st.text(max_size=4), max_size=4)):
        array = draw(st.sampled_from(_ARRAYS))
        request.inputs[alias].CopyFrom(to_proto(array, as_field=draw(st.booleans())))
    return request


def same(one: Callable[[], Any], other: Callable[[], Any]) -> None:
    """Both give the same value or raise the same."""
    outcomes = []
    for call in (one, other):
        try:
            outcomes.append(call())
        except (SpikelessError, DecodeError) as error:
            outcomes.append((type(error), str(error) if isinstance(error, SpikelessError) else ""))
    assert outcomes[0] == outcomes[1]


def contents(request: predict_pb2.PredictRequest | LargeRequest) -> Any:
    arrays = {alias: array_of(value) for alias, value in request.inputs.items()}
    return (
        request.HasField("model_spec"),
        request.model_spec,
        list(request.output_filter),
        {alias: (array.dtype, array.shape, array.tolist()) for alias, array in arrays.items()},
    )


@given(_requests())
def test_a_request_has_the_same_contents(request: predict_pb2.PredictRequest) -> None:
    content = request.SerializeToString()
    read = read_request(content, large=0)
    assert isinstance(read, LargeRequest)
    assert contents(read) == contents(predict_pb2.PredictRequest.FromString(content))


@given(_requests(), st.data())
def test_so_has_one_that_is_broken_or_strange(
    request: predict_pb2.PredictRequest, data: st.DataObject
) -> None:
    """Fields that come twice are merged; what no parser takes is refused by it."""
    content = request.SerializeToString() + request.SerializeToString()
    content = content[: data.draw(st.integers(0, len(content)))]
    same(
        lambda: contents(read_request(content, large=0)),
        lambda: contents(predict_pb2.PredictRequest.FromString(content)),
    )
    if content:
        position = data.draw(st.integers(0, len(content) - 1))
        changed = content[:position] + bytes([data.draw(st.integers(0, 255))]) + content[position + 1 :]
        same(
            lambda: contents(read_request(changed, large=0)),
            lambda: contents(predict_pb2.PredictRequest.FromString(changed)),
        )


@pytest.mark.parametrize("where", ["request", "entry", "tensor"])
def test_small_fields_take_no_memory_each(where: str) -> None:
    """A field of two bytes must not become an object of two hundred."""
    many = b"\x78\x05" * LARGE
    tensor = to_proto(np.ones(LARGE, np.float32)).SerializeToString() + many * (where == "tensor")
    entry = wire.field(1, b"x") + wire.field(2, tensor) + many * (where == "entry")
    content = wire.field(2, entry) + many * (where == "request")
    taken, read = peak(lambda: read_request(content))
    assert taken < 512 * wire.MAX_FIELDS + SLACK
    assert contents(read) == contents(predict_pb2.PredictRequest.FromString(content))


def test_nor_do_those_of_the_open_inference_protocol() -> None:
    content = b"\x78\x05" * LARGE + wire.field(7, bytes(SIZE))
    taken, parsed = peak(lambda: open_inference.parse_message(content))
    assert taken < 512 * wire.MAX_FIELDS + SLACK
    assert list(parsed.raw) == [bytes(SIZE)]


def test_entries_that_nobody_writes() -> None:
    """Without a key or a value, with two, with text that is none, with numbers."""
    value = wire.field(2, to_proto(np.ones(2, np.float32)).SerializeToString())
    for entry in (
        b"",
        value,
        wire.field(1, b"x"),
        value + value + wire.field(1, b"x"),
        wire.field(1, b"\xff") + value,
        b"\x08\x05" + value,
        wire.field(1, b"x") + b"\x10\x05",
        wire.field(1, b"x") + wire.field(2, b"\x08\x01\x20\x05"),
    ):
        content = wire.field(2, entry) + b"\x10\x05"
        same(
            lambda: contents(read_request(content, large=0)),  # noqa: B023
            lambda: contents(predict_pb2.PredictRequest.FromString(content)),  # noqa: B023
        )


@pytest.mark.parametrize("tensor_content", [False, True])
@pytest.mark.parametrize("array", _ARRAYS, ids=lambda array: f"{array.dtype} {array.shape}")
def test_a_response_has_the_same_contents(array: Any, tensor_content: bool) -> None:
    spec = model_pb2.ModelSpec(name="m", signature_name="s")
    spec.version.value = 7
    response = Response(spec, {"y": array, "": array, "a": array.T}, tensor_content)
    read = predict_pb2.PredictResponse.FromString(response.serialized())
    assert read == response.message()
    assert predict_pb2.PredictResponse.FromString(response.serialized()) == read


def test_few_of_many_shapes_are_remembered() -> None:
    """Clients choose batch sizes: what is kept of them has a limit."""
    numbers = np.arange(5000, dtype=np.float32)
    for size in range(1, len(numbers)):
        response = Response(model_pb2.ModelSpec(name="m"), {"y": numbers[:size]}, tensor_content=True)
        read = predict_pb2.PredictResponse.FromString(response.serialized())
        assert read.outputs["y"].tensor_content == numbers[:size].tobytes()
        assert [dim.size for dim in read.outputs["y"].tensor_shape.dim] == [size]
    for remembered in (large_tensors._before_numbers, wire.head):
        limit = remembered.cache_info().maxsize
        assert limit is not None
        assert remembered.cache_info().currsize <= limit < size


def peak(call: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes that Python and NumPy took meanwhile, and the result."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        result = call()
        return tracemalloc.get_traced_memory()[1] - before, result
    finally:
        tracemalloc.stop()


def test_a_large_input_is_a_view_of_the_request() -> None:
    request = predict_pb2.PredictRequest()
    request.inputs["x"].CopyFrom(to_proto(np.arange(SIZE // 4, dtype=np.float32)))
    content = request.SerializeToString()
    taken, read = peak(lambda: read_request(content))
    assert taken < SLACK
    taken, array = peak(lambda: array_of(read.inputs["x"]))
    assert taken < SLACK
    assert np.shares_memory(array, np.frombuffer(content, np.uint8))
    assert array[-1] == SIZE // 4 - 1


@pytest.mark.parametrize("tensor_content", [False, True])
def test_a_large_output_is_copied_once(tensor_content: bool) -> None:
    output = np.arange(SIZE // 4, dtype=np.float32)
    response = Response(model_pb2.ModelSpec(name="m"), {"y": output}, tensor_content)
    taken, content = peak(response.serialized)
    assert SIZE < len(content) <= taken < SIZE + SLACK
    read = predict_pb2.PredictResponse.FromString(content)
    np.testing.assert_array_equal(to_numpy(read.outputs["y"]), output)


def test_a_call_copies_its_tensors_once_each_way(saved_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the request's bytes into TensorFlow's tensor, and from another one back."""
    copied: list[int] = []
    copy = session._copy

    def counted(target: int, array: np.ndarray[Any, Any]) -> None:
        copied.append(array.nbytes)
        copy(target, array)

    monkeypatch.setattr(session, "_copy", counted)
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "dtypes", "float32"
    sent = np.arange(SIZE // 4, dtype=np.float32).reshape(-1, 2)
    request.inputs["x"].CopyFrom(to_proto(sent))
    content = request.SerializeToString()
    with Session.load(saved_models / "dtypes") as loaded:
        model = Model(loaded, 1, tensor_content=True)
        model.predict_large(read_request(content))
        copied.clear()
        taken, answer = peak(lambda: model.predict_large(read_request(content)).serialized())
    assert copied == [SIZE]
    # What Python and NumPy hold is the answer; the tensors are TensorFlow's.
    assert len(answer) <= taken < SIZE + SLACK
    read = predict_pb2.PredictResponse.FromString(answer)
    np.testing.assert_array_equal(to_numpy(read.outputs["y"]), sent)
