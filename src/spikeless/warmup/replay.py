"""Replay a warmup file, as a server does before a version becomes AVAILABLE.

In: a loaded model and the file. Out: a warm model; responses are dropped. The rules are
those of TensorFlow Serving's ``saved_model_warmup.cc`` and
``saved_model_warmup_util.cc``.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
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


def replay(
    model: Inference, path: str | os.PathLike[str], *, request_iterations: int = 1, threads: int = 1
) -> int:
    """Run every record of the warmup file ``path`` through ``model``.

    Model name and version in a record are ignored: it is replayed into the version that
    it came with. A record without a request counts, and does nothing.

    Args:
        model: a loaded model.
        path: the warmup file; there may be none.
        request_iterations: how often each record is run
            (``--num_request_iterations_for_warmup``).
        threads: how many records run at once, each on a thread of its own; 1: all on
            the calling thread, in order (``--num_model_warmup_threads``).

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
    records, reading, failed = read(path), threading.Lock(), threading.Event()

    def work() -> int:
        """Replay the records that no other thread takes; returns how many."""
        count = 0
        try:
            while not failed.is_set():
                with reading:
                    record = next(records, None)
                if record is None:
                    break
                _replay_one(model, record, path, request_iterations)
                count += 1
        except BaseException:
            failed.set()
            raise
        return count

    if threads == 1:
        return work()
    with ThreadPoolExecutor(threads, thread_name_prefix="warmup") as pool:
        shares = [pool.submit(work) for _ in range(threads)]
    return sum(share.result() for share in shares)


def _replay_one(model: Inference, record: Record, path: str | os.PathLike[str], iterations: int) -> None:
    try:
        if record.number > MAX_RECORDS:
            raise InvalidArgument(f"Number of warmup records exceeds the maximum ({MAX_RECORDS})")
        for _ in range(iterations):
            answer(model, record)
    except SpikelessError as error:
        raise WarmupError(path, record.number, error) from error


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
