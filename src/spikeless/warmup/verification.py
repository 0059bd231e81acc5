"""Try a warmup file as a server would, and measure the gain.

In: a SavedModel with a warmup file. Out: the latency of the first request to each
signature, cold and after warmup; or the error that would fail the load.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass

from spikeless.errors import NotFound, SpikelessError
from spikeless.formats import savedmodel
from spikeless.formats.savedmodel import DEFAULT_SIGNATURE
from spikeless.runtime import Session
from spikeless.runtime.model import Model
from spikeless.warmup.records import MAX_RECORDS, Record, read, warmup_file
from spikeless.warmup.replay import answer, replay
from spikeless.warmup.requests import WarmupRequest


@dataclass(frozen=True)
class FirstRequest:
    """The first request of one kind to one signature (several for MultiInference)."""

    kind: str
    signatures: tuple[str, ...]
    #: The record that was sent.
    record: int
    #: Milliseconds right after a load without warmup. In the order of the file: what
    #: signatures share is paid by the first.
    cold_ms: float
    #: Milliseconds right after a load with warmup.
    warm_ms: float


@dataclass(frozen=True)
class Verification:
    """A warmup file that passed."""

    #: How many records it has.
    records: int
    #: Milliseconds that replaying it takes, once for each load.
    replay_ms: float
    first_requests: tuple[FirstRequest, ...]


def verify(saved_model: str | os.PathLike[str], *, request_iterations: int = 1) -> Verification:
    """Load a SavedModel without and with its warmup file, and time the first requests.

    Args:
        saved_model: its directory.
        request_iterations: how often each record is replayed
            (``--num_request_iterations_for_warmup``).

    Raises:
        WarmupError: a record would fail the load; with its number and cause.
        NotFound: no SavedModel, or no warmup file in it.
        DataLoss: the warmup file is truncated, damaged or no TFRecord file.
        TensorFlowError: the model cannot be loaded at all.
    """
    savedmodel.read(saved_model)  # its errors are clearer than the runtime's
    path = warmup_file(saved_model)
    if not path.is_file():
        raise NotFound(f"{path} does not exist; write it with `spikeless warmup build {saved_model}`")
    firsts = _first_records(path)
    with Session.load(saved_model) as session:
        model = Model(session)
        cold = [_attempt_ms(model, record) for record in firsts.values()]
    with Session.load(saved_model) as session:
        model = Model(session)
        started = time.perf_counter()
        count = replay(model, path, request_iterations=request_iterations)
        replay_ms = 1000 * (time.perf_counter() - started)
        warm = [_attempt_ms(model, record) for record in firsts.values()]
    return Verification(
        records=count,
        replay_ms=replay_ms,
        first_requests=tuple(
            FirstRequest(kind, tuple(signatures), record.number, cold_ms, warm_ms)
            for ((kind, *signatures), record), cold_ms, warm_ms in zip(
                firsts.items(), cold, warm, strict=True
            )
        ),
    )


def _first_records(path: os.PathLike[str]) -> dict[tuple[str, ...], Record]:
    """The first record of each kind and signature, by both."""
    firsts: dict[tuple[str, ...], Record] = {}
    for record in read(path):
        if record.kind is not None and record.number <= MAX_RECORDS:
            request = WarmupRequest(f"record {record.number}", record.log)
            keys = (spec.signature_name or DEFAULT_SIGNATURE for spec in request.model_specs)
            firsts.setdefault((request.kind.name, *keys), record)
    return firsts


def _attempt_ms(model: Model, record: Record) -> float:
    """Milliseconds for one request. The replay reports errors."""
    started = time.perf_counter()
    with suppress(SpikelessError):
        answer(model, record)
    return 1000 * (time.perf_counter() - started)
