"""What a warmup file holds, without a model.

In: a warmup file, or the SavedModel that has one. Out: a summary of each record.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spikeless.formats.kinds import examples
from spikeless.formats.protos import tensor_pb2
from spikeless.formats.savedmodel import DEFAULT_SIGNATURE
from spikeless.formats.tensors import dtype_name, shape_of, shape_text
from spikeless.warmup.records import Record, read, warmup_file
from spikeless.warmup.requests import WarmupRequest


@dataclass(frozen=True)
class InputSummary:
    """One input of a recorded request."""

    name: str
    #: ``DT_FLOAT`` and so on; ``tf.Example`` for the examples of Classify, Regress and
    #: MultiInference.
    dtype: str
    #: None for an unknown rank; None inside for an unknown dimension: neither can be
    #: replayed.
    shape: tuple[int | None, ...] | None

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} {shape_text(self.shape)}"


@dataclass(frozen=True)
class RecordSummary:
    """One record of a warmup file."""

    #: Counted from 1.
    number: int
    #: ``Predict``, ``Classify``, ``Regress``, ``MultiInference``; the name of a
    #: PredictionLog field that no server replays; or None for a record without a
    #: request.
    kind: str | None
    model: str
    signatures: tuple[str, ...]
    inputs: tuple[InputSummary, ...]
    bytes: int


def inspect(path: str | os.PathLike[str]) -> Iterator[RecordSummary]:
    """The records of a warmup file, or of the one in a SavedModel's directory.

    Raises:
        NotFound: there is none.
        DataLoss: it is truncated, damaged or no TFRecord file.
        InvalidArgument: a record is no PredictionLog.
    """
    return map(_summary, read(find(path)))


def find(path: str | os.PathLike[str]) -> Path:
    """``path`` itself, or the warmup file of the SavedModel in that directory."""
    return warmup_file(path) if Path(path).is_dir() else Path(path)


def _summary(record: Record) -> RecordSummary:
    if record.kind is None:
        return RecordSummary(record.number, record.log_field, "", (), (), record.size)
    request = WarmupRequest(f"record {record.number}", record.log)
    specs = request.model_specs
    return RecordSummary(
        number=record.number,
        kind=request.kind.name,
        model=specs[0].name if specs else "",
        signatures=tuple(spec.signature_name or DEFAULT_SIGNATURE for spec in specs),
        inputs=tuple(_inputs(request)),
        bytes=record.size,
    )


def _inputs(request: WarmupRequest) -> Iterator[InputSummary]:
    if request.kind.takes_examples:
        yield InputSummary("examples", "tf.Example", (len(examples(request.message.input)),))
        return
    tensors: dict[str, tensor_pb2.TensorProto] = getattr(request.message, "inputs", {})
    for alias, tensor in sorted(tensors.items()):
        yield InputSummary(alias, dtype_name(tensor.dtype), shape_of(tensor.tensor_shape))
