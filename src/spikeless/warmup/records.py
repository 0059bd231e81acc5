"""Warmup records: ``PredictionLog`` messages in a TFRecord file.

In: a file. Out: its records, numbered from 1, each with the kind of request that it
holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from spikeless.errors import DataLoss, InvalidArgument
from spikeless.formats import kinds, tfrecord
from spikeless.formats.kinds import Kind
from spikeless.formats.protos import prediction_log_pb2
from spikeless.formats.savedmodel import EXTRA_DIRECTORY

#: TensorFlow Serving's ``WarmupConsts`` (``saved_model_warmup_util.h``).
WARMUP_FILE = "tf_serving_warmup_requests"
MAX_RECORDS = 1000


def warmup_file(saved_model: str | os.PathLike[str]) -> Path:
    """Where a server looks for the warmup records of a SavedModel."""
    return Path(saved_model) / EXTRA_DIRECTORY / WARMUP_FILE


@dataclass(frozen=True)
class Record:
    """One warmup record and where it stands."""

    #: Counted from 1.
    number: int
    log: prediction_log_pb2.PredictionLog
    #: Bytes of the serialized record.
    size: int

    @property
    def log_field(self) -> str | None:
        """Its field of ``PredictionLog``; None for a record without a request."""
        field: str | None = self.log.WhichOneof("log_type")
        return field

    @property
    def kind(self) -> Kind | None:
        """The kind of its request; None where no server replays it."""
        return kinds.of_log(self.log)

    @property
    def entry(self) -> Any:
        """The message with ``request`` and ``response``."""
        return getattr(self.log, self.log_field or "")

    @property
    def request(self) -> Any:
        """The request message."""
        return self.entry.request


def read(path: str | os.PathLike[str], *, gzipped: bool | None = False) -> Iterator[Record]:
    """The records of a warmup file, one at a time.

    Raises:
        NotFound: there is no such file.
        DataLoss: the file is truncated, damaged or no TFRecord file.
        InvalidArgument: a record is no PredictionLog.
    """
    try:
        for number, content in enumerate(tfrecord.read(path, gzipped=gzipped), 1):
            log = prediction_log_pb2.PredictionLog()
            try:
                log.ParseFromString(content)
            except DecodeError:
                raise InvalidArgument(f"Failed to parse warmup record {number} from {path}") from None
            yield Record(number, log, len(content))
    except DataLoss as error:
        raise DataLoss(f"{error}. Please verify your warmup data is in TFRecord format.") from None
