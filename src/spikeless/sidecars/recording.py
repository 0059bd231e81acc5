"""Recording: write real requests and answers to a file of ``PredictionLog`` records.

In: calls as bytes, from whoever relays them. Out: a TFRecord file, or a folder that is
added to all the time, to build warmup from, to publish golden requests with and to
replay. Calls are handed over without waiting; a thread of its own parses, thins out and
writes. What does not fit into its memory, or cannot be written, is counted and
forgotten.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message

from spikeless.errors import InvalidArgument, SpikelessError
from spikeless.formats import captures, tfrecord
from spikeless.formats.kinds import KINDS
from spikeless.formats.protos import input_pb2, prediction_log_pb2, tensor_pb2, types_pb2
from spikeless.sidecars.captured_files import CapturedFile, CapturedFolder, Rotation

_log = logging.getLogger(__name__)

#: Methods whose calls can be recorded -> the kind of record.
METHODS = {kind.path: kind for kind in KINDS}
#: Bytes of calls that may wait for the writer.
MAX_PENDING_BYTES = 64 << 20


@dataclass(frozen=True)
class RecorderSettings:
    """What is recorded, and how much of it."""

    #: The file; an existing one is continued. With ``rotation`` a folder.
    out: Path
    #: Records at most; None: any number, which a folder has always.
    limit: int | None = 1000
    #: Records at most of requests with the same signature and shapes, in a folder in
    #: each file; None: any number.
    per_shape: int | None = 1
    #: Size of the file or folder at most.
    max_bytes: int = 256 << 20
    #: Inputs (of Predict) and features (of examples) whose values become zeros or empty
    #: strings. The answer to such a request is left out.
    redact: Collection[str] = ()
    #: Write to a folder, without an end: when it gets its next file.
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        if any(one is not None and one < 1 for one in (self.limit, self.per_shape, self.max_bytes)):
            raise InvalidArgument("--limit, --per-shape and --max-bytes must be 1 or more")
        if self.rotation is not None and self.rotation.file_bytes > self.max_bytes:
            raise InvalidArgument("--max-bytes of the folder must be --file-bytes or more")


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
class RelayedCall:
    """A call that was answered, as bytes."""

    #: Such as ``/tensorflow.serving.PredictionService/Predict``.
    method: str
    request: bytes
    response: bytes
    #: When the request arrived, in nanoseconds since 1970 (UTC).
    arrived: int

    @property
    def size(self) -> int:
        return len(self.request) + len(self.response)


class Recorder:
    """Writes calls to a file or folder, on a thread of its own."""

    def __init__(self, settings: RecorderSettings, sample: float = 1.0) -> None:
        """``sample`` is the share of calls that it is offered, which is recorded."""
        self.settings = settings
        self.counts = Counts()
        self._sample = sample
        self._seen: Counter[captures.Shape] = Counter()
        self._out: CapturedFile | CapturedFolder
        if settings.rotation is None:
            self._out = CapturedFile(settings.out, lambda record: self._count(captures.shape(record.log)))
        else:
            self._out = CapturedFolder(
                settings.out, settings.rotation, settings.max_bytes, rotated=self._seen.clear
            )
        self._queue: queue.SimpleQueue[RelayedCall | None] = queue.SimpleQueue()
        self._pending = 0
        self._lock = threading.Lock()
        self._complained = False
        self._thread = threading.Thread(target=self._write_all, name="recorder", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether the file has all the records or bytes that it may have."""
        if isinstance(self._out, CapturedFolder):
            return False
        limit = self.settings.limit
        too_many = limit is not None and self._out.records >= limit
        return too_many or self._out.size >= self.settings.max_bytes

    def offer(self, call: RelayedCall) -> None:
        """Hand a call over; returns at once, whatever becomes of it."""
        if call.method not in METHODS or self.full:
            return
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
            self._out.close()
        except OSError as error:
            self._complain(error)

    def _write_all(self) -> None:
        while True:
            try:
                call = self._queue.get(timeout=self._seconds_left())
            except queue.Empty:
                continue
            if call is None:
                return
            with self._lock:
                self._pending -= call.size
            if self.full:
                continue
            try:
                self._write(call)
            except (DecodeError, ValueError) as error:
                self.counts.dropped += 1
                _log.warning("a call of %s could not be recorded: %s", call.method, error)
            except (OSError, SpikelessError) as error:
                self.counts.unwritten += 1
                self._complain(error)

    def _seconds_left(self) -> float | None:
        """Until a file becomes whole; one whose time is over becomes so now."""
        if isinstance(self._out, CapturedFile):
            return None
        if self._out.seconds_left() == 0.0:
            try:
                self._out.rotate()
            except OSError as error:
                self._complain(error)
        return self._out.seconds_left()

    def _write(self, call: RelayedCall) -> None:
        log = _prediction_log(call, self._sample)
        kind = METHODS[call.method]
        entry = getattr(log, kind.log_field)
        shape = captures.shape(log)
        if self.settings.per_shape is not None and self._seen[shape] >= self.settings.per_shape:
            self.counts.alike += 1
            return
        if self.settings.redact and _redact(entry.request, self.settings.redact):
            entry.ClearField("response")
        framed = tfrecord.frame(log.SerializeToString())
        written = self._out.size if isinstance(self._out, CapturedFile) else 0
        if written + len(framed) > self.settings.max_bytes:
            self.counts.dropped += 1
            return
        self._out.append(framed)
        self._count(shape)
        self.counts.recorded += 1

    def _count(self, shape: captures.Shape) -> None:
        if self.settings.per_shape is not None:
            self._seen[shape] += 1

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            reason = error.strerror if isinstance(error, OSError) else error
            _log.error("%s cannot be written: %s; calls go on", self.settings.out, reason)
        self._complained = True


def _prediction_log(call: RelayedCall, sample: float) -> prediction_log_pb2.PredictionLog:
    log = prediction_log_pb2.PredictionLog()
    kind = METHODS[call.method]
    entry = getattr(log, kind.log_field)
    entry.request.ParseFromString(call.request)
    entry.response.ParseFromString(call.response)
    log.log_metadata.sampling_config.sampling_rate = sample
    for part in kind.response_parts(entry.response)[:1]:
        # The version that answered.
        log.log_metadata.model_spec.CopyFrom(part.model_spec)
    captures.stamp(log, call.arrived)
    return log


def _redact(request: Message, names: Collection[str]) -> bool:
    """Empty the named inputs or features of a request; whether it has any of them."""
    if hasattr(request, "inputs"):
        holders = [request.inputs]
    else:
        given = captures.all_examples(getattr(request, "input", input_pb2.Input()))
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
