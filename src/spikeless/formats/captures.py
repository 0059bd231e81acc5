"""Captured calls: ``PredictionLog`` records that say when their requests arrived.

In: a log, a file, or a folder of files that ``spikeless capture --stream`` writes. Out:
times, the files in order, and what makes two requests alike.

A record's ``log_metadata`` has the second of the arrival in ``timestamp_secs``, as
TensorFlow Serving's own request logs do, and the whole time in a field of this project,
which other readers skip:

    int64 arrival_unix_nanos = 20260
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from spikeless.errors import NotFound
from spikeless.formats import kinds
from spikeless.formats.protos import input_pb2, message_class, prediction_log_pb2

#: Ends the name of every whole file in a folder of captures. Sorted by their names,
#: the files are in the order of time.
SUFFIX = ".tfrecord"
_SECOND = 10**9
_Arrival = message_class("Arrival", timestamp_secs=(4, int), arrival_unix_nanos=(20260, int))

#: What makes two requests alike: kind, model, signature, and the types and shapes of
#: what they send.
Shape = tuple[Any, ...]


def stamp(log: prediction_log_pb2.PredictionLog, unix_nanos: int) -> None:
    """Store when the request of a log arrived, in nanoseconds since 1970 (UTC)."""
    arrival = _Arrival(timestamp_secs=unix_nanos // _SECOND, arrival_unix_nanos=unix_nanos)
    log.log_metadata.MergeFromString(arrival.SerializeToString())


def arrived(log: prediction_log_pb2.PredictionLog) -> int | None:
    """When the request of a log arrived, in nanoseconds since 1970 (UTC).

    To the second for a record that TensorFlow Serving logged; None where nothing says
    it.
    """
    try:
        arrival = _Arrival.FromString(log.log_metadata.SerializeToString())
    except DecodeError:  # a field of another type by the same number
        return int(log.log_metadata.timestamp_secs) * _SECOND or None
    return arrival.arrival_unix_nanos or arrival.timestamp_secs * _SECOND or None


def files(path: str | os.PathLike[str]) -> list[Path]:
    """The whole files of a folder of captures, oldest first, or the one file itself.

    The records of a file are in the order in which they were answered, so those of
    neighbouring files may overlap in time.

    Raises:
        NotFound: there is no such file, or the folder has none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    found = sorted(file for file in path.glob(f"[!.]*{SUFFIX}") if file.is_file())
    if not found:
        raise NotFound(f"{path} is neither a file nor a folder with {SUFFIX} files of captured requests")
    return found


def shape(log: prediction_log_pb2.PredictionLog) -> Shape:
    """What makes the request of a log like another."""
    kind = kinds.of_log(log)
    if kind is None:
        return (log.WhichOneof("log_type"),)
    request = getattr(log, kind.log_field).request
    targets = tuple(
        (getattr(part, "method_name", ""), part.model_spec.name, part.model_spec.signature_name)
        for part in kind.request_parts(request)
    )
    if kind.takes_examples:
        given = all_examples(request.input)
        features = tuple(sorted({name for example in given for name in example.features.feature}))
        return (kind.name, targets, len(given), features)
    inputs = tuple(
        (alias, tensor.dtype, tuple(dim.size for dim in tensor.tensor_shape.dim))
        for alias, tensor in sorted(getattr(request, "inputs", {}).items())
    )
    return (kind.name, targets, tuple(sorted(getattr(request, "output_filter", ()))), inputs)


def all_examples(given: input_pb2.Input) -> list[Any]:
    """All examples of an input, the context that they share included."""
    shared = [given.example_list_with_context.context] if given.HasField("example_list_with_context") else []
    return [*shared, *kinds.examples(given)]
