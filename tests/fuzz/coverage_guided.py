"""What reads bytes from outside, fuzzed along its branches with atheris.

    python tests/fuzz/coverage_guided.py json -max_total_time=600

In: the name of a target and options of libFuzzer. Out: nothing, or the input that made
the target raise something else than a `SpikelessError`, take more than a few seconds,
or ask for gigabytes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import hpack
import numpy as np

with atheris.instrument_imports(include=["spikeless"]):
    from spikeless.engine.transport import calls, frames, http2
    from spikeless.errors import SpikelessError
    from spikeless.formats import large_tensors, open_inference, rest_json, tensors, tfrecord, wire
    from spikeless.formats.checkpoint import Checkpoint, index_file
    from spikeless.formats.savedmodel import TensorSpec
    from spikeless.warmup import records

import contextlib

from google.protobuf.message import DecodeError

from spikeless.formats.open_inference_messages import message_class
from spikeless.formats.protos import predict_pb2, tensor_pb2, types_pb2

_InferRequest, _InferResponse = message_class("ModelInferRequest"), message_class("ModelInferResponse")
LIBFUZZER = ("-rss_limit_mb=2048", "-timeout=10", "-close_fd_mask=0")
SPECS = {
    alias: TensorSpec(alias, f"{alias}:0", dtype, (None, 2))
    for alias, dtype in (("x", types_pb2.DT_FLOAT), ("s", types_pb2.DT_STRING), ("i", types_pb2.DT_INT8))
}
_CALL = [
    (":method", "POST"),
    (":path", "/a.B/C"),
    ("te", "trailers"),
    ("grpc-encoding", "gzip"),
    ("grpc-timeout", "1S"),
]
#: What each target is to begin with, so that it need not find the formats by itself.
SEEDS: dict[str, list[bytes]] = {
    "json": [
        b'{"instances": [{"x": [1, 2.5e3], "s": ["a", {"b64": "YQ=="}], "i": [1, -1]}]}',
        b'{"signature_name": "f", "inputs": {"x": [[NaN, Infinity]], "s": [["\\u00e4", ""]], "i": [[0, 1]]}}',
        b'{"context": {"a": 1}, "examples": [{"x": [1.5], "s": {"b64": "YQ=="}}]}',
    ],
    "tensor": [
        tensors.to_proto(np.arange(6, dtype=np.float32).reshape(2, 3)).SerializeToString(),
        tensors.to_proto(np.array([b"a", b""], object), as_field=True).SerializeToString(),
        tensors.to_proto(np.ones((2, 0), np.int8), as_field=True).SerializeToString(),
    ],
    "request": [
        predict_pb2.PredictRequest(
            model_spec={"name": "m"},
            inputs={
                "x": tensors.to_proto(np.ones(2, np.float32)),
                "s": tensors.to_proto([b"a"], as_field=True),
            },
            output_filter=["y"],
        ).SerializeToString(),
    ],
    "infer_json": [
        b'{"id": "7", "inputs": [{"name": "x", "datatype": "FP16", "shape": [1, 2], "data": [[1, 2.5]]}]}',
        b'{"inputs": [{"name": "s", "datatype": "BYTES", "shape": [2], "data": ["a", ""]}], "outputs": []}',
        b'{"inputs": [{"name": "s", "datatype": "BYTES", "shape": [1],'
        b'"parameters": {"binary_data_size": 5}},'
        b'{"name": "b", "datatype": "BOOL", "shape": [2], "parameters": {"binary_data_size": 2}}]}'
        b"\x01\0\0\0a\x01\0",
    ],
    "infer_message": [
        _InferRequest(
            inputs=[{"name": "i", "datatype": "INT8", "shape": [2], "contents": {"int_contents": [1, -1]}}],
            outputs=[{"name": "y"}],
        ).SerializeToString(),
        _InferRequest(
            inputs=[
                {"name": "s", "datatype": "BYTES", "shape": [1]},
                {"name": "f", "datatype": "BF16", "shape": [1, 1]},
            ],
            raw_input_contents=[b"\x01\0\0\0a", b"\x80\x3f"],
        ).SerializeToString(),
    ],
    "http2": [
        b"\x20"
        + frames.PREFACE
        + frames.frame(frames.SETTINGS, 0, 0, b"\0\4\0\0\0\1")
        + frames.frame(frames.HEADERS, 4, 1, hpack.Encoder().encode(_CALL))
        + frames.frame(frames.DATA, 1, 1, b"\0\0\0\0\1x")
        + frames.frame(frames.WINDOW_UPDATE, 0, 1, b"\0\0\0\1"),
        b"\x20"
        + frames.PREFACE
        + frames.frame(frames.HEADERS, 0x2C, 1, b"\1\0\0\0\0\0" + hpack.Encoder().encode(_CALL) + b"\0")
        + frames.frame(frames.DATA, 8, 1, b"\1\1\0\0\0\1\0")
        + frames.frame(frames.RST_STREAM, 0, 1, bytes(4)),
    ],
    "tfrecord": [tfrecord.frame(b"abc") + tfrecord.frame(b"")],
    "warmup": [tfrecord.frame(b"")],
    "checkpoint": [],
}
_FIXTURES = Path(__file__).parents[1] / "fixtures"
#: Where a target puts its input, if it reads files.
_directory: Path


def read_json(content: bytes) -> None:
    document = rest_json.parse(content)
    rest_json.signature_name(document)
    for read in (
        lambda: rest_json.predict_inputs(document, SPECS),
        lambda: rest_json.examples_input(document),
    ):
        with contextlib.suppress(SpikelessError):
            read()


def read_tensor(content: bytes) -> None:
    for _ in wire.fields(memoryview(content)):
        pass
    try:
        proto = tensor_pb2.TensorProto.FromString(content)
    except DecodeError:
        return  # gRPC answers that
    array = tensors.to_numpy(proto)
    again = tensors.to_numpy(tensors.to_proto(array))
    assert array.shape == again.shape
    assert array.dtype == again.dtype


def read_request(content: bytes) -> None:
    """What a large request is must not depend on how it is read."""
    try:
        message = predict_pb2.PredictRequest.FromString(content)
    except DecodeError:
        message = None
    try:
        request = large_tensors.read_request(content, large=0)
    except DecodeError:
        request = None
    assert (message is None) == (request is None)
    if message is None or request is None:
        return
    assert message.model_spec == request.model_spec
    assert list(message.output_filter) == list(request.output_filter)
    assert message.inputs.keys() == request.inputs.keys()
    for alias, proto in message.inputs.items():
        assert _value(proto) == _value(request.inputs[alias])


def _value(value: Any) -> Any:
    try:
        array = large_tensors.array_of(value)
    except SpikelessError as error:
        return str(error)
    return array.dtype, array.shape, array.tolist() if array.dtype == object else array.tobytes()


def read_http2(content: bytes) -> None:
    """Every stream that has a message is answered, in whatever windows there are."""
    connection = http2.Http2()
    # The first byte says how the rest is cut.
    step = content[0] * 8 + 1 if content else 1
    try:
        for at in range(1, len(content), step):
            for stream in connection.receive(content[at : at + step]):
                if stream.closed or stream.headers.refusal is not None:
                    continue
                try:
                    message = calls.take_message(stream, 1 << 16)
                except calls.Refused as refused:
                    connection.fail(stream, refused.code.value[0], refused.details)
                    continue
                if message is not None:
                    connection.answer(stream, message)
    except frames.BrokenProtocol as broken:
        connection.refuse(broken.code)


def read_infer_json(content: bytes) -> None:
    end = content.rfind(b"}") + 1
    for length in (None, end):
        with contextlib.suppress(SpikelessError):
            request = open_inference.read_json(content, length)
            open_inference.write_json("m", 1, request, request.inputs)


def read_infer_message(content: bytes) -> None:
    """What is read is written, and read as the same again."""
    try:
        parsed = open_inference.parse_message(content)
    except DecodeError:
        return  # gRPC answers that
    # As if it were large.
    apart = open_inference.parse_message(content, large=0)
    assert list(map(bytes, apart.raw)) == list(parsed.raw)
    if not apart.message.raw_input_contents:
        apart.message.raw_input_contents.extend(parsed.raw)
    assert apart.message == parsed.message or "nan" in str(parsed.message)
    request = open_inference.read_message(parsed)
    answer = _InferResponse.FromString(open_inference.write_message("m", 1, request, request.inputs))
    message = _InferRequest(
        inputs=[
            {"name": output.name, "datatype": output.datatype, "shape": output.shape}
            | ({} if answer.raw_output_contents else {"contents": output.contents})
            for output in answer.outputs
        ],
        raw_input_contents=answer.raw_output_contents,
    )
    again = open_inference.read_message(open_inference.parse_message(message.SerializeToString()))
    assert again.inputs.keys() == request.inputs.keys()
    for name, array in request.inputs.items():
        other = again.inputs[name]
        assert (array.dtype, array.shape) == (other.dtype, other.shape)
        # As text, for which NaN is NaN.
        assert str(array.reshape(-1).tolist()) == str(other.reshape(-1).tolist())


def read_tfrecord(content: bytes) -> None:
    for gzipped in (False, None):
        for _ in tfrecord.read(_file(content), gzipped=gzipped):
            pass


def read_warmup(content: bytes) -> None:
    # The framing has checksums, which nobody finds by chance.
    for _ in records.read(_file(tfrecord.frame(content))):
        pass


def read_checkpoint(content: bytes) -> None:
    prefix = _directory / "variables"
    index_file(prefix).write_bytes(content)
    Checkpoint.read(prefix)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "json": read_json,
    "tensor": read_tensor,
    "request": read_request,
    "infer_json": read_infer_json,
    "infer_message": read_infer_message,
    "http2": read_http2,
    "tfrecord": read_tfrecord,
    "warmup": read_warmup,
    "checkpoint": read_checkpoint,
}


def _file(content: bytes) -> Path:
    path = _directory / "input"
    path.write_bytes(content)
    return path


def main() -> None:
    global _directory
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"usage: {sys.argv[0]} {{{','.join(TARGETS)}}} [options of libFuzzer]")
    target = TARGETS[sys.argv.pop(1)]

    def test(content: bytes) -> None:
        with contextlib.suppress(SpikelessError):
            target(content)

    with tempfile.TemporaryDirectory() as directory:
        _directory = Path(directory)
        corpus = _directory / "corpus"
        corpus.mkdir()
        name = target.__name__.removeprefix("read_")
        seeds = [
            *SEEDS[name],
            *(path.read_bytes() for path in _FIXTURES.rglob("*.index") if name == "checkpoint"),
        ]
        for number, seed in enumerate(seeds):
            (corpus / str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], *LIBFUZZER, *sys.argv[1:], str(corpus)], test)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
