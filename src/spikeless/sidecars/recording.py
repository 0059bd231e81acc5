"""Recording: write real requests and answers to a file of ``PredictionLog`` records.

In: calls as bytes, from whoever relays them. Out: a TFRecord file to build warmup from
and to publish golden requests with. Calls are handed over without waiting; a thread of
its own parses, thins out and writes. What does not fit into its memory, or cannot be
written, is counted and forgotten.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message

from spikeless.errors import DataLoss, FailedPrecondition, InvalidArgument
from spikeless.formats import tfrecord
from spikeless.formats.kinds import KINDS, Kind, examples
from spikeless.formats.protos import input_pb2, prediction_log_pb2, tensor_pb2, types_pb2
from spikeless.warmup.records import Record, read

_log = logging.getLogger(__name__)

#: Methods whose calls can be recorded -> the kind of record.
METHODS = {kind.path: kind for kind in KINDS}
#: Bytes of calls that may wait for the writer.
MAX_PENDING_BYTES = 64 << 20

#: What makes two requests alike: kind, model, signature, and the types and shapes of
#: what they send.
Shape = tuple[Any, ...]


@dataclass(frozen=True)
class RecorderSettings:
    """What is recorded, and how much of it."""

    #: The file; an existing one is continued.
    out: Path
    #: Records at most.
    limit: int = 1000
    #: Records at most of requests with the same signature and shapes.
    per_shape: int = 1
    #: Size of the file at most.
    max_bytes: int = 256 << 20
    #: Inputs (of Predict) and features (of examples) whose values become zeros or empty
    #: strings. The answer to such a request is left out.
    redact: Collection[str] = ()

    def __post_init__(self) -> None:
        if self.limit < 1 or self.per_shape < 1 or self.max_bytes < 1:
            raise InvalidArgument("--limit, --per-shape and --max-bytes must be 1 or more")


@dataclass
class Counts:
    """Calls that were handed over, and what became of them."""

    recorded: int = 0
    #: As many as wanted had the same signature and shapes already.
    alike: int = 0
    #: They did not fit into memory or the file, or could not be parsed.
    dropped: int = 0
    #: The disk did not take them.
    unwritten: int = 0


@dataclass(frozen=True)
class _RelayedCall:
    kind: Kind
    request: bytes
    response: bytes

    @property
    def size(self) -> int:
        return len(self.request) + len(self.response)


class Recorder:
    """Writes calls to a file, on a thread of its own."""

    def __init__(self, settings: RecorderSettings) -> None:
        self.settings = settings
        self.counts = Counts()
        self._seen: Counter[Shape] = Counter()
        self._records = 0
        self._file, self._end = self._open()
        self._queue: queue.SimpleQueue[_RelayedCall | None] = queue.SimpleQueue()
        self._pending = 0
        self._lock = threading.Lock()
        self._complained = False
        self._thread = threading.Thread(target=self._write_all, name="recorder", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether the file has all the records or bytes that it may have."""
        return self._records >= self.settings.limit or self._end >= self.settings.max_bytes

    def offer(self, method: str, request: bytes, response: bytes) -> None:
        """Hand a call over; returns at once, whatever becomes of it."""
        kind = METHODS.get(method)
        if kind is None or self.full:
            return
        call = _RelayedCall(kind, request, response)
        with self._lock:
            if self._pending + call.size > MAX_PENDING_BYTES:
                self.counts.dropped += 1
                return
            self._pending += call.size
        self._queue.put(call)

    def close(self) -> None:
        """Write what was handed over, and close the file."""
        self._queue.put(None)
        self._thread.join()
        try:
            self._file.truncate(self._end)
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            self._complain(error)

    def _open(self) -> tuple[FileIO, int]:
        """The file to append to, and where its last whole record ends."""
        out = self.settings.out
        try:
            if out.exists():
                self._continue(out)
            # Without a buffer, in which bytes that did not fit onto the disk would
            # stay.
            file = open(out, "ab", buffering=0)  # noqa: SIM115 (closed by close)
            return file, file.seek(0, os.SEEK_END)
        except OSError as error:
            raise FailedPrecondition(f"{out} cannot be written: {error.strerror}") from None

    def _continue(self, out: Path) -> None:
        """Count the records in the file, and cut off an unfinished one."""
        whole = []
        try:
            for record in read(out):
                self._seen[_shape(record)] += 1
                whole.append(record.log.SerializeToString())
        except DataLoss as error:
            if not whole:
                raise FailedPrecondition(f"{error}; name another file with --out") from None
            tfrecord.write(out, whole)
        self._records = len(whole)

    def _write_all(self) -> None:
        while (call := self._queue.get()) is not None:
            with self._lock:
                self._pending -= call.size
            if self.full:
                continue
            try:
                self._write(call)
            except (DecodeError, ValueError) as error:
                self.counts.dropped += 1
                _log.warning("a %s call could not be recorded: %s", call.kind, error)
            except OSError as error:
                self.counts.unwritten += 1
                self._complain(error)

    def _write(self, call: _RelayedCall) -> None:
        record = Record(self._records + 1, _prediction_log(call), call.size)
        shape = _shape(record)
        if self._seen[shape] >= self.settings.per_shape:
            self.counts.alike += 1
            return
        if self.settings.redact and _redact(record.request, self.settings.redact):
            record.entry.ClearField("response")
        framed = tfrecord.frame(record.log.SerializeToString())
        if self._end + len(framed) > self.settings.max_bytes:
            self.counts.dropped += 1
            return
        # Where the last write failed half way, its part is still there.
        self._file.truncate(self._end)
        left = memoryview(framed)
        while left:
            left = left[self._file.write(left) :]
        self._end += len(framed)
        self._records += 1
        self._seen[shape] += 1
        self.counts.recorded += 1

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            _log.error("%s cannot be written: %s; calls go on", self.settings.out, error.strerror)
        self._complained = True


def _prediction_log(call: _RelayedCall) -> prediction_log_pb2.PredictionLog:
    log = prediction_log_pb2.PredictionLog()
    entry = getattr(log, call.kind.log_field)
    entry.request.ParseFromString(call.request)
    entry.response.ParseFromString(call.response)
    return log


def _shape(record: Record) -> Shape:
    kind, request = record.kind, record.request
    if kind is None:
        return (record.log_field,)
    targets = tuple(
        (getattr(part, "method_name", ""), part.model_spec.name, part.model_spec.signature_name)
        for part in kind.request_parts(request)
    )
    if kind.takes_examples:
        given = _examples(request.input)
        features = tuple(sorted({name for example in given for name in example.features.feature}))
        return (kind.name, targets, len(given), features)
    inputs = tuple(
        (alias, tensor.dtype, tuple(dim.size for dim in tensor.tensor_shape.dim))
        for alias, tensor in sorted(getattr(request, "inputs", {}).items())
    )
    return (kind.name, targets, tuple(sorted(getattr(request, "output_filter", ()))), inputs)


def _examples(given: input_pb2.Input) -> list[Any]:
    """All examples of an input, the context that they share included."""
    shared = [given.example_list_with_context.context] if given.HasField("example_list_with_context") else []
    return [*shared, *examples(given)]


def _redact(request: Message, names: Collection[str]) -> bool:
    """Empty the named inputs or features of a request; whether it has any of them."""
    if hasattr(request, "inputs"):
        holders = [request.inputs]
    else:
        given = _examples(getattr(request, "input", input_pb2.Input()))
        holders = [example.features.feature for example in given]
    found = [holder[name] for holder in holders for name in names if name in holder]
    for value in found:
        _empty(value)
    return bool(found)


def _empty(value: Any) -> None:
    """Empty a tensor or a feature, which keeps its type and shape."""
    if isinstance(value, tensor_pb2.TensorProto):
        # No values at all mean zeros, or empty strings (``tensor.proto``).
        value.CopyFrom(tensor_pb2.TensorProto(dtype=value.dtype, tensor_shape=value.tensor_shape))
        if value.dtype == types_pb2.DT_STRING:
            value.string_val.append(b"")
    elif kind := value.WhichOneof("kind"):
        values = getattr(value, kind).value
        count = len(values)
        del values[:]
        values.extend([b"" if kind == "bytes_list" else 0] * count)
