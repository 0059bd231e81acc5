"""Replay a warmup file, as a server does before a version becomes AVAILABLE.

In: a loaded model and the file. Out: a warm model; responses are dropped. The rules are
those of TensorFlow Serving's ``saved_model_warmup.cc`` and
``saved_model_warmup_util.cc``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from spikeless.errors import InvalidArgument, SpikelessError, Unimplemented
from spikeless.formats.kinds import Kind
from spikeless.warmup.records import MAX_RECORDS, Record, read


class Inference(Protocol):
    """What answers requests: a `spikeless.runtime.model.Model`, or a remote version."""

    def answer(self, kind: Kind, request: Any) -> Any: ...


class WarmupError(SpikelessError):
    """A record that fails the load of its version, with the code of its cause."""

    def __init__(self, path: str | os.PathLike[str], number: int, cause: SpikelessError) -> None:
        super().__init__(f"warmup record {number} of {os.fspath(path)}: {cause}")
        self.number = number
        self.cause = cause
        self.code = cause.code


def replay(model: Inference, path: str | os.PathLike[str], *, request_iterations: int = 1) -> int:
    """Run every record of the warmup file ``path`` through ``model``, in order.

    Model name and version in a record are ignored: it is replayed into the version that
    it came with. A record without a request counts, and does nothing.

    Args:
        model: a loaded model.
        path: the warmup file; there may be none.
        request_iterations: how often each record is run
            (``--num_request_iterations_for_warmup``).

    Returns:
        The number of records replayed; 0 without a file.

    Raises:
        WarmupError: a record failed, with its number and cause; Unimplemented for
            SessionRun and streamed records, InvalidArgument for the one beyond
            ``MAX_RECORDS``.
        DataLoss: the file is truncated, damaged or no TFRecord file.
        InvalidArgument: a record is no PredictionLog.
    """
    if not Path(path).exists():
        return 0
    count = 0
    for record in read(path):
        count = record.number
        try:
            if count > MAX_RECORDS:
                raise InvalidArgument(f"Number of warmup records exceeds the maximum ({MAX_RECORDS})")
            for _ in range(request_iterations):
                answer(model, record)
        except SpikelessError as error:
            raise WarmupError(path, count, error) from error
    return count


def answer(model: Inference, record: Record) -> Any:
    """What ``model`` answers to a record; None for a record without a request.

    Raises:
        Unimplemented: no server replays the record's kind.
    """
    if record.kind is not None:
        return model.answer(record.kind, record.request)
    if record.log_field is not None:
        raise Unimplemented(f"Unsupported log_type for warmup: {record.log_field}")
    return None
