"""What reads bytes from outside, fuzzed along its branches with atheris.

    python tests/fuzz/coverage_guided.py json -max_total_time=600

In: the name of a target and options of libFuzzer. Out: nothing, or the input that made
the target raise something else than a `SpikelessError`, take more than a few seconds,
or ask for gigabytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import atheris
import hpack
import msgspec
import numpy as np
import zstandard
from google.protobuf.message import DecodeError
from waitress.adjustments import Adjustments

with atheris.instrument_imports(include=["spikeless"]):
    from spikeless.engine import rest_server
    from spikeless.engine.flags import ServerFlags
    from spikeless.engine.handlers import Calls
    from spikeless.engine.rest_api import RestApi
    from spikeless.engine.served_models import ServedModels
    from spikeless.engine.transport import calls, http2
    from spikeless.errors import Internal, NotFound, SpikelessError
    from spikeless.formats import (
        captures,
        checkpoint,
        checksum,
        large_tensors,
        open_inference,
        rest_json,
        string_table,
        tensors,
        tfrecord,
        wire,
    )
    from spikeless.formats.savedmodel import TensorSpec
    from spikeless.http2 import client as http2_client
    from spikeless.http2 import frames
    from spikeless.mapping import manifest as mapping_manifest
    from spikeless.mapping.plan import VariableState
    from spikeless.repository import golden, models_config, origin
    from spikeless.store import changes, manifest, pieces, reports
    from spikeless.warmup import inspection, records

from spikeless.formats.open_inference_messages import message_class
from spikeless.formats.protos import predict_pb2, prediction_log_pb2, tensor_bundle_pb2, tensor_pb2, types_pb2

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
_ANSWER = [(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "0")]
_EXAMPLE = {"features": {"feature": {"x": {"float_list": {"value": [1.5]}}}}}
_IN_CONTEXT = {"examples": [_EXAMPLE], "context": _EXAMPLE}
_DIGEST = "0123456789abcdef" * 4
_PIECE = manifest.Stored(_DIGEST, "zstd", _DIGEST, 9)
_MANIFEST = manifest.VersionManifest(
    format=manifest.FORMAT,
    tool="1",
    model="m",
    version=1,
    base=None,
    trained=1.0,
    pushed=2.0,
    warmup=False,
    mapped=("a/b",),
    piece_bytes=4096,
    files=(
        manifest.File("saved_model.pb", 0o644, 5000, _DIGEST, ((_PIECE,), (_PIECE,))),
        manifest.File("a/b", 0o444, 0, _DIGEST, ()),
    ),
)
_MAPPED = mapping_manifest.Manifest(
    tool="1",
    source="s",
    source_sha256=_DIGEST,
    min_bytes=1,
    optimized=False,
    files=(mapping_manifest.FileRecord("variables/a", 4, _DIGEST, True),),
    variables=(
        mapping_manifest.VariableRecord(
            ("serve",), "v", "DT_FLOAT", (1,), 4, VariableState.MAPPED, reason="", file="variables/a"
        ),
    ),
)
_CONFIG = (
    b'model_config_list {\n  config {\n    name: "m"\n    base_path: "/models/m"\n'
    b"    model_version_policy { specific { versions: 1 versions: 2 } }\n"
    b'    version_labels { key: "stable" value: 1 }\n  }\n}\n'
)
_CHANGE = {
    **{"format": changes.FORMAT, "number": 1, "action": "wave", "model": "m", "label": "stable"},
    **{"version": 2, "previous": 1, "reason": "", "user": "u", "host": "h", "time": 1.0},
    "config": _CONFIG.decode(),
}
_REPORT = {
    **{"format": reports.FORMAT, "node": "n", "number": 1, "time": 1.0, "every": 5.0, "change": 1},
    **{"busy": False, "servers": 1, "models": []},
}
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
    "http2_answer": [
        b"\xff"
        + frames.frame(frames.SETTINGS, 0, 0, b"\0\1\0\0\0\0\0\3\0\0\0\1\0\4\0\0\0\1\0\5\0\1\0\0")
        + frames.frame(frames.WINDOW_UPDATE, 0, 0, b"\0\0\0\1")
        + frames.frame(frames.HEADERS, 4, 1, hpack.Encoder().encode(_ANSWER[:1]))
        + frames.frame(frames.DATA, 8, 1, b"\1\0\0\0\0\1x\0")
        + frames.frame(frames.PING, 0, 0, bytes(8))
        + frames.frame(frames.HEADERS, 1, 1, b"")
        + frames.frame(frames.CONTINUATION, 4, 1, hpack.Encoder().encode(_ANSWER[1:])),
        b"\x20"
        + frames.frame(frames.RST_STREAM, 0, 1, b"\0\0\0\7")
        + frames.frame(frames.HEADERS, 0x2D, 3, b"\1\0\0\0\0\0" + hpack.Encoder().encode(_ANSWER) + b"\0")
        + frames.frame(frames.GOAWAY, 0, 0, bytes(8)),
    ],
    "tfrecord": [tfrecord.frame(b"abc") + tfrecord.frame(b"")],
    "warmup": [
        prediction_log_pb2.PredictionLog(
            **{f"{kind}_log": {"request": {"model_spec": {"name": "m"}, **request}}}
        ).SerializeToString()
        for kind, request in (
            ("predict", {"inputs": {"x": tensors.to_proto(np.ones(2, np.float32))}}),
            ("classify", {"input": {"example_list": {"examples": [_EXAMPLE]}}}),
            (
                "regress",
                {"input": {"example_list_with_context": {"examples": [_EXAMPLE], "context": _EXAMPLE}}},
            ),
        )
    ],
    "checkpoint": [],
    "rest": [
        b"POST /v1/models/m/versions/1:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 17\r\n\r\n"
        b'{"instances":[1]}',
        b"POST /v2/models/m%20n/versions/stable/infer HTTP/1.1\r\nInference-Header-Content-Length: 2\r\n"
        b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        *(
            f"{method} {path} HTTP/1.1\r\nOrigin: http://x\r\n\r\n".encode()
            for method, path in (
                ("GET", "/v1/models/m/labels/stable/metadata"),
                ("GET", "/v1/models/m/versions/9223372036854775808"),
                ("GET", "//v2/health/ready?x=1#y"),
                ("GET", "http://h/v2/models/m/ready"),
                ("OPTIONS", "/v1/models/m:predict"),
            )
        ),
    ],
    "store": [
        bytes([kind]) + msgspec.json.encode(document)
        for kind, document in (
            (0, _MANIFEST),
            (1, manifest.Index(1, "m", (manifest.Entry(1, _DIGEST, 9), manifest.Entry(2, _DIGEST, 9)))),
            (2, _CHANGE),
            (3, _REPORT),
        )
    ]
    + [b"\4" + zstandard.compress(bytes(300)), b"\5" + zstandard.compress(b"abc" * 9)],
    "version": [
        b"\0" + _MAPPED.to_json().encode(),
        b'\1{"origin": {"source": "models:/m/1", "run": "r", "created": 1}, "gates": ["finite"],'
        b' "findings": {"warmup": 3}}',
        b'\2{"rtol": 1e-5, "atol": 1e-6}',
    ],
    "models_config": [
        _CONFIG,
        b"model_config_list { config: [{name: 'm' base_path: \"/a\\x62\" \"c\"}, <name: 'n'>] } # end",
        b'model_config_list: { config {\n  name: "m"\n  # c\n  version_labels { key: "a" value: 1 }\n }\n}',
        b'[a.b/C.D] { x: -1.5e3f, y: [] }; model_config_list { config { name: "m" z: - inf } }',
    ],
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


def read_http2_answer(content: bytes) -> None:
    """No more calls end than were begun, whatever a server says to a client."""
    client = http2_client.Http2Client()
    headers = tuple((name.encode(), value.encode()) for name, value in _CALL)
    body = bytes(70_000)
    step = content[0] * 8 + 1 if content else 1
    ended: list[int] = []
    try:
        for at in range(1, len(content), step):
            client.call(at, headers, body)
            ended += [answer.tag for answer in client.receive(content[at : at + step])]
    except frames.BrokenProtocol:
        return
    assert sorted(ended + client.waiting()) == list(range(1, len(content), step))


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
    path = _file(tfrecord.frame(content))
    for record in records.read(path):
        captures.arrived(record.log)
        captures.shape(record.log)
    list(inspection.inspect(path))


def read_checkpoint(content: bytes) -> None:
    """A table as it is, and a block of one, whose checksums are right."""
    source = _directory / "source"
    index = checkpoint.index_file(source)
    checkpoint.data_file(source, 0, 1).write_bytes(bytes(64))
    for table in (content, _table(content)):
        index.write_bytes(table)
        with contextlib.suppress(SpikelessError):
            read = checkpoint.Checkpoint.read(source)
            apart = [read.find(key.decode("utf-8", "surrogateescape")) for key in read.entries]
            target = _directory / "target"
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            checkpoint.rewrite(read, target / "variables", [found for found in apart if found])


def _table(block: bytes) -> bytes:
    """A string table with one block."""

    def sealed(content: bytes) -> bytes:
        return content + b"\0" + struct.pack("<I", checksum.masked_crc32c(content + b"\0"))

    def handle(offset: int, size: int) -> bytes:
        return wire.write_varint(offset) + wire.write_varint(size)

    entry = handle(0, len(block))
    index = b"\0\0" + bytes([len(entry)]) + entry + struct.pack("<II", 0, 1)
    footer = handle(0, 0) + handle(len(block) + 5, len(index))
    return sealed(block) + sealed(index) + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def _blocks() -> Iterator[bytes]:
    """The indexes of the fixtures as blocks, and one of a tensor in slices."""
    tables = [dict(string_table.read(path.read_bytes())) for path in _FIXTURES.rglob("*.index")]
    header = tensor_bundle_pb2.BundleHeaderProto(num_shards=1, version={"producer": 1})
    part = {"extent": [{"start": 0, "length": 2}, {}]}
    entry = {"dtype": types_pb2.DT_FLOAT, "shape": {"dim": [{"size": 2}, {"size": 3}]}}
    sliced = tensor_bundle_pb2.BundleEntryProto(**entry, slices=[part])
    stored = tensor_bundle_pb2.BundleEntryProto(**entry, size=24, crc32c=checksum.masked_crc32c(bytes(24)))
    key = checkpoint._slice_key(b"v", [(0, 2), (0, -1)])
    tables.append({b"": header, key: stored, b"v": sliced, b"w": stored})
    for table in tables:
        pairs = [
            (key, value if isinstance(value, bytes) else value.SerializeToString())
            for key, value in table.items()
        ]
        yield string_table._block(sorted(pairs))


class _NoModels(ServedModels):
    """One model is configured, and none is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self._labels = {"m": {"stable": 1}}

    def available(self, name: str) -> list[int]:
        return []

    version_statuses: Any = available

    def add_listener(self, listener: Any) -> None:
        pass

    def reload_config(self, config: Any) -> None:
        pass

    def stop(self) -> None:
        pass

    def _lend(self, name: str, version: int | None) -> Any:
        raise NotFound(name)


_REST = RestApi(Calls(_NoModels(), "REST"), ServerFlags())
_HTTP = Adjustments(host="127.0.0.1", port=0)


def read_rest(content: bytes) -> None:
    """Requests that waitress hands on are answered, but never with 500."""
    parser = rest_server._RequestParser(_HTTP)
    while content and not parser.completed:
        content = content[parser.received(content) or len(content) :]
    if parser.error or not parser.completed or parser.empty:
        return
    environ = {
        **{f"HTTP_{name}": value for name, value in parser.headers.items()},
        "REQUEST_METHOD": parser.command.upper(),
        "REQUEST_URI": parser.request_uri,
        "wsgi.input": parser.get_body_stream(),
        "waitress.client_disconnected": lambda: False,
    }
    answers: list[str] = []
    body = b"".join(_REST(environ, lambda status, headers: answers.append(status)))
    assert len(answers) == 1
    assert not answers[0].startswith("500"), body
    json.loads(body or b"null")


def read_store(content: bytes) -> None:
    """The first byte says what of a store the rest is."""
    kind, data = content[:1], content[1:]
    if kind == b"\0":
        version = manifest.read_manifest(data, "here", "m", 1)
        assert manifest.read_manifest(version.to_json(), "here", "m", 1) == version
        for file in version.files:
            extents = list(version.extents(file))
            assert sum(size for _, size, _ in extents) == file.size
            assert not Path(file.path).is_absolute()
            assert ".." not in Path(file.path).parts
    elif kind == b"\1":
        index = manifest.read_index(data, "here", "m")
        assert manifest.read_index(index.to_json(), "here", "m") == index
    elif kind == b"\2":
        change = changes.READER.read(data, "here")
        config = changes.parse(change.config.encode(), "here")
        assert changes.parse(change.content, "here").message == config.message
    elif kind == b"\3":
        reports.READER.read(data, "here")
    else:
        encoding: Any = "xor" if kind == b"\5" else "zstd"
        piece = bytearray(300 if kind == b"\4" else 27)
        pieces.apply(manifest.Stored(_DIGEST, encoding, _DIGEST, len(data)), data, memoryview(piece))


def read_version(content: bytes) -> None:
    """Files beside a model that come with it; the first byte says which."""
    extra = _directory / "version" / "assets.extra"
    extra.mkdir(parents=True, exist_ok=True)
    readers: tuple[tuple[str, Callable[[Path], Any]], ...] = (
        (mapping_manifest.MANIFEST_FILE, lambda version: _check_mapped(version)),
        (Path(origin.FILE_NAME).name, origin.read),
        (golden.TOLERANCE_FILE, golden.of_version),
    )
    (extra / golden.REQUESTS_FILE).write_bytes(tfrecord.frame(b""))
    name, read = readers[content[0] % len(readers) if content else 0]
    (extra / name).write_bytes(content[1:])
    read(extra.parent)


def _check_mapped(version: Path) -> None:
    read = mapping_manifest.read_manifest(version)
    read.files_read_by_row()
    mapping_manifest.check_files(version, read)


def read_models_config(content: bytes) -> None:
    """An edit changes what it should, and nothing else."""
    config = models_config.parse(content.decode("utf-8", "replace"))
    try:
        for name in {"m", *config.names}:
            block = config.block(name) or models_config.new_block(name, "/models/m")
            edited = config.with_block(name, models_config.with_versions(block, [3, 4], {"canary": 4}))
            found = edited.model(name)
            assert found is not None
            assert list(found.model_version_policy.specific.versions) == [3, 4]
            assert dict(found.version_labels) == {"canary": 4}
            removed = edited.with_block(name, None)
            assert len(removed.names) == len(edited.names) - 1
    except Internal as error:
        raise AssertionError from error


TARGETS: dict[str, Callable[[bytes], None]] = {
    "json": read_json,
    "tensor": read_tensor,
    "request": read_request,
    "infer_json": read_infer_json,
    "infer_message": read_infer_message,
    "http2": read_http2,
    "http2_answer": read_http2_answer,
    "tfrecord": read_tfrecord,
    "warmup": read_warmup,
    "checkpoint": read_checkpoint,
    "rest": read_rest,
    "store": read_store,
    "version": read_version,
    "models_config": read_models_config,
}


def _file(content: bytes) -> Path:
    path = _directory / "input"
    path.write_bytes(content)
    return path


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def main() -> None:
    global _directory
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"usage: {sys.argv[0]} {{{','.join(TARGETS)}}} [options of libFuzzer]")
    target = TARGETS[sys.argv.pop(1)]

    def test(content: bytes) -> None:
        with contextlib.suppress(SpikelessError):
            target(content)

    # In memory where that is a folder: targets write files.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        _directory = Path(directory)
        corpus = _directory / "corpus"
        corpus.mkdir()
        name = target.__name__.removeprefix("read_")
        seeds = [
            *SEEDS[name],
            *(path.read_bytes() for path in _FIXTURES.rglob("*.index") if name == "checkpoint"),
            *(_blocks() if name == "checkpoint" else ()),
        ]
        for number, seed in enumerate(seeds):
            (corpus / str(number)).write_bytes(seed)
        words = {word for seed in seeds for word in re.findall(rb'"[^"]*"|[a-zA-Z][\w-]*|[0-9]+', seed)}
        dictionary = _directory / "dictionary"
        dictionary.write_text("".join(f'"{_escaped(word)}"\n' for word in sorted(words)))
        # An empty one is refused.
        options = (*LIBFUZZER, *([f"-dict={dictionary}"] if words else []), *sys.argv[1:])
        atheris.Setup([sys.argv[0], *options, str(corpus)], test)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
