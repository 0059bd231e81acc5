"""Sample files to requests.

In: a file that the user has. Out: the requests in it. The name tells the form:

- ``.json``, ``.jsonl``, ``.ndjson``: TensorFlow Serving REST requests, one document or
  one a line, each a request as it stands: ``instances`` or ``inputs`` (Predict) or
  ``examples`` (Classify, Regress), and where wanted ``signature_name``.
- ``.npz``: one Predict request; each array is named as its input, with the batch in
  front.
- ``.csv``: one Predict request a row. A header that names the inputs makes each column
  an input of one value. Otherwise the columns are, in order, the features of a
  signature with one numeric input [?, N]; a header is skipped.
- anything else: TFRecords, gzip-compressed or not, of ``tf.Example`` (one request each)
  or ``PredictionLog`` (whose responses are dropped).

A folder of captures (``spikeless capture --stream``) gives the first request of each
signature and shape.
"""

from __future__ import annotations

import csv
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from spikeless.errors import InvalidArgument, NotFound, Unimplemented
from spikeless.formats import captures, kinds, rest_json, tfrecord
from spikeless.formats.protos import example_pb2, input_pb2, prediction_log_pb2, types_pb2
from spikeless.formats.savedmodel import DEFAULT_SIGNATURE, Signature, TensorSpec
from spikeless.formats.tensors import dtype_name, numpy_dtype
from spikeless.warmup.requests import TASK_KINDS, Servable, Target, WarmupRequest, at, predict, with_examples

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SampleFile:
    """A file of sample requests, or a folder of captures."""

    path: Path
    #: The signature of samples that name none.
    signature: str | None = None


@dataclass(frozen=True)
class Router:
    """Where samples go: the signature that they or their file name, or the only one.

    Otherwise tensors go to ``serving_default``, and examples to all Classify and
    Regress signatures. Examples that name no signature also go into the requested
    MultiInference requests.
    """

    servable: Servable
    #: The signatures named for the build; empty for all.
    named: Sequence[Target] = ()
    #: The requested MultiInference requests.
    joined: Sequence[Target] = ()

    def for_tensors(self, key: str | None) -> Signature:
        default = self.named[0].keys[0] if len(self.named) == 1 else DEFAULT_SIGNATURE
        return self.servable.signature(key or default)

    def for_examples(self, key: str | None) -> list[Target]:
        if key:
            return [self.servable.target(key)]
        if len(self.named) == 1:
            return [*self.named, *self.joined]
        targets = self.named or [self.servable.target(key) for key in self.servable.signatures]
        chosen = [target for target in targets if target.kind in TASK_KINDS.values()]
        return [*chosen, *self.joined] or [self.servable.target(DEFAULT_SIGNATURE)]


def read(file: SampleFile, router: Router) -> list[WarmupRequest]:
    """The requests in ``file``.

    Raises:
        NotFound: the file is not there, or a signature that it names is not.
        InvalidArgument: the file is empty or does not have its form; names the file and
            the place in it.
        Unimplemented: a PredictionLog holds a kind of request that no server replays.
        DataLoss: a TFRecord file is damaged.
    """
    if file.path.is_dir():
        return list(_read_captures(file, router))
    if not file.path.is_file():
        raise NotFound(f"{file.path} is no file; give a file of sample requests")
    reader = _READERS.get(file.path.suffix.lower(), _read_tfrecords)
    requests = list(reader(file, router))
    if not requests:
        raise InvalidArgument(f"{file.path} holds no sample; give a file with at least one")
    return requests


def _read_captures(folder: SampleFile, router: Router) -> Iterator[WarmupRequest]:
    """The first request of each shape in files that may go away meanwhile."""
    seen = set()
    for path in captures.files(folder.path):
        try:
            for request in _read_tfrecords(SampleFile(path, folder.signature), router):
                shape = captures.shape(request.log)
                if shape not in seen:
                    seen.add(shape)
                    yield request
        except NotFound:
            if path.exists():
                raise


def _read_json(file: SampleFile, router: Router) -> Iterator[WarmupRequest]:
    for source, document in _documents(file.path):
        with at(source):
            key = rest_json.signature_name(document) or file.signature
            if rest_json.EXAMPLES_KEY in document:
                examples = rest_json.examples_input(document)
                for target in router.for_examples(key):
                    yield WarmupRequest(source, with_examples(router.servable, target, examples))
            else:
                signature = router.for_tensors(key)
                inputs = rest_json.predict_inputs(document, signature.inputs, strict=True)
                yield WarmupRequest(source, predict(signature.key, inputs))


def _documents(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON documents of a file, which is one document or has one on each line."""
    content = path.read_bytes()
    lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    if not lines:
        return
    if len(lines) > 1 and _is_document(lines[0][1]):
        documents = [(f"{path}: line {number}", line) for number, line in lines]
    else:
        documents = [(str(path), content)]
    for source, text in documents:
        with at(source):
            document = rest_json.parse(text)
        yield source, document


def _is_document(line: bytes) -> bool:
    try:
        rest_json.parse(line)
    except InvalidArgument:
        return False
    return True


def _read_npz(file: SampleFile, router: Router) -> Iterator[WarmupRequest]:
    read_array: Any = np.lib.format.read_array  # some versions of NumPy have no type for it
    arrays: dict[str, _Array] = {}
    try:
        # Member by member: numpy.load would take a file of another kind for a pickle.
        with zipfile.ZipFile(file.path) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    array = read_array(member, allow_pickle=False)
                    arrays[name.removesuffix(".npy")] = array
    except (ValueError, OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise InvalidArgument(
            f"{file.path} cannot be read as an .npz of numbers and strings ({error}); write it with "
            "numpy.savez, strings as arrays of type S or U"
        ) from None
    if not arrays:
        return
    with at(str(file.path)):
        signature = router.for_tensors(file.signature)
        inputs = {
            alias: _restore_dtype(array, signature.inputs.get(alias)) for alias, array in arrays.items()
        }
        yield WarmupRequest(str(file.path), predict(signature.key, inputs))


def _restore_dtype(array: _Array, spec: TensorSpec | None) -> _Array:
    """NumPy files keep types unknown to NumPy (bfloat16, float8) as raw bytes."""
    if spec is not None and array.dtype.kind == "V":
        dtype = numpy_dtype(spec.dtype)
        if dtype.itemsize == array.dtype.itemsize:
            return array.view(dtype)
    return array


def _read_csv(file: SampleFile, router: Router) -> Iterator[WarmupRequest]:
    try:
        with open(file.path, newline="", encoding="utf-8-sig") as text:
            reader = csv.reader(text, strict=True)
            rows = [(reader.line_num, row) for row in reader if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{file.path} cannot be read as CSV: {error}") from None
    if not rows:
        return
    header = [cell.strip() for cell in rows[0][1]]
    for number, row in rows:
        if len(row) != len(header):
            raise InvalidArgument(
                f"{file.path}: line {number} has {len(row)} columns, but the first line has {len(header)}"
            )
    with at(str(file.path)):
        signature = router.for_tensors(file.signature)
    if set(header) & set(signature.inputs):
        samples, to_inputs = rows[1:], _named_columns
    else:
        samples, to_inputs = rows[0 if _is_numeric(header) else 1 :], _feature_columns
    for number, row in samples:
        source = f"{file.path}: line {number}"
        with at(source):
            yield WarmupRequest(source, predict(signature.key, to_inputs(signature, header, row)))


def _is_numeric(cells: Sequence[str]) -> bool:
    try:
        for cell in cells:
            float(cell)
    except ValueError:
        return False
    return True


def _named_columns(signature: Signature, header: list[str], row: list[str]) -> dict[str, _Array]:
    inputs: dict[str, _Array] = {}
    for alias, cell in zip(header, row, strict=True):
        if alias not in signature.inputs:
            raise InvalidArgument(
                f"column {alias!r} is no input of signature {signature.key!r}, which has: "
                f"{'; '.join(map(str, signature.inputs.values()))}"
            )
        spec = signature.inputs[alias]
        rank = 1 if spec.shape is None else len(spec.shape)
        # A cell is one value: a scalar, or an element of every dimension that the input
        # has.
        inputs[alias] = _values([cell], spec).reshape([1] * rank)
    return inputs


def _feature_columns(signature: Signature, header: list[str], row: list[str]) -> dict[str, _Array]:
    specs = list(signature.inputs.values())
    if [(spec.dtype == types_pb2.DT_STRING, len(spec.shape or ())) for spec in specs] != [(False, 2)]:
        raise InvalidArgument(
            "columns can only be features of a signature with one numeric input [?, N], but "
            f"{signature.key!r} has: {'; '.join(map(str, specs))}; name the inputs in a header"
        )
    return {specs[0].alias: _values(row, specs[0]).reshape(1, -1)}


_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def _values(cells: list[str], spec: TensorSpec) -> _Array:
    """The cells as a flat array of the input's type."""
    dtype = numpy_dtype(spec.dtype)
    try:
        if spec.dtype == types_pb2.DT_STRING:
            return np.array([cell.encode() for cell in cells], dtype=object)
        if spec.dtype == types_pb2.DT_BOOL:
            return np.array([_TRUTH[cell.strip().lower()] for cell in cells])
        if dtype.kind in "iu":
            return _integers([int(cell) for cell in cells], dtype)
        number = complex if dtype.kind == "c" else float
        return np.array([number(cell) for cell in cells]).astype(dtype)
    except (ValueError, KeyError, OverflowError):
        raise InvalidArgument(
            f"{', '.join(map(repr, cells))}: not all are values of type {dtype_name(spec.dtype)}, which "
            f"input {spec.alias!r} takes"
        ) from None


def _integers(numbers: list[int], dtype: np.dtype[Any]) -> _Array:
    limits = np.iinfo(dtype)
    if not limits.min <= min(numbers) <= max(numbers) <= limits.max:
        raise OverflowError
    return np.array(numbers, dtype=dtype)


def _read_tfrecords(file: SampleFile, router: Router) -> Iterator[WarmupRequest]:
    for number, content in enumerate(tfrecord.read(file.path, gzipped=None), 1):
        source = f"{file.path}: record {number}"
        with at(source):
            # The two messages share no field, so whichever finds its own is the right
            # one.
            log = _parse(prediction_log_pb2.PredictionLog, content)
            if log is not None and log.WhichOneof("log_type"):
                yield WarmupRequest(source, _request_only(log))
                continue
            example = _parse(example_pb2.Example, content)
            if example is None:
                raise InvalidArgument("is neither a tf.Example nor a PredictionLog")
            examples = input_pb2.Input(example_list=input_pb2.ExampleList(examples=[example]))
            for target in router.for_examples(file.signature):
                yield WarmupRequest(source, with_examples(router.servable, target, examples))


def _parse(message: Any, content: bytes) -> Any:
    try:
        return message.FromString(content)
    except DecodeError:
        return None


def _request_only(log: prediction_log_pb2.PredictionLog) -> prediction_log_pb2.PredictionLog:
    """The log without its response and metadata, which servers ignore."""
    field = log.WhichOneof("log_type")
    if field not in kinds.BY_LOG_FIELD:
        raise Unimplemented(f"no server replays a {field}, only {', '.join(kinds.BY_NAME)} requests")
    bare = prediction_log_pb2.PredictionLog()
    getattr(bare, field).request.CopyFrom(getattr(log, field).request)
    return bare


_READERS = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".npz": _read_npz,
    ".csv": _read_csv,
}
