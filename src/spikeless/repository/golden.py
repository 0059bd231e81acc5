"""Golden requests: requests with their right answers, and how far answers may be off.

In: ``PredictionLog`` records, each with request and response, beside a tolerance. A
version carries its own: ``assets.extra/spikeless_golden_requests`` (TFRecord) and
``assets.extra/spikeless_golden.json``; servers ignore both. Out: what differs, in
words.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spikeless.disk import atomic
from spikeless.errors import InvalidArgument, NotFound
from spikeless.formats import tfrecord
from spikeless.formats.kinds import outputs
from spikeless.formats.savedmodel import EXTRA_DIRECTORY
from spikeless.formats.tensors import shape_text
from spikeless.warmup.records import Record, read
from spikeless.warmup.replay import Inference, answer

REQUESTS_FILE = "spikeless_golden_requests"
TOLERANCE_FILE = "spikeless_golden.json"


@dataclass(frozen=True)
class Tolerance:
    """How far an answer may be off, for every number in it.

    It is right when ``|answer - expected| <= atol + rtol * |expected|``.
    """

    rtol: float = 1e-4
    atol: float = 1e-5


@dataclass(frozen=True)
class Golden:
    """Golden requests with their tolerance."""

    records: tuple[Record, ...] = ()
    tolerance: Tolerance = Tolerance()


def read_file(path: str | os.PathLike[str], tolerance: Tolerance) -> Golden:
    """The golden requests of a file.

    Raises:
        NotFound, DataLoss, InvalidArgument: there is no such file, it is damaged, or a
            record has no answer.
    """
    records = tuple(read(path, gzipped=None))
    for record in records:
        if record.kind is None:
            raise InvalidArgument(
                f"{path}: record {record.number} holds {record.log_field}, which has no answer"
            )
        if not record.entry.HasField("response"):
            raise InvalidArgument(
                f"{path}: record {record.number} has no response; golden requests need their right answers, "
                "as `spikeless capture` writes them"
            )
    if not records:
        raise InvalidArgument(f"{path} has no records; leave it out, or give golden requests")
    return Golden(records, tolerance)


def of_version(version: str | os.PathLike[str]) -> Golden:
    """The golden requests that a version carries; none when it has no such file."""
    extra = Path(version, EXTRA_DIRECTORY)
    if not (extra / REQUESTS_FILE).exists():
        return Golden()
    try:
        tolerance = Tolerance(**json.loads((extra / TOLERANCE_FILE).read_text()))
    except FileNotFoundError:
        raise NotFound(f"{extra / TOLERANCE_FILE} is missing; publish the version again") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidArgument(f"{extra / TOLERANCE_FILE} cannot be read: {error}") from None
    return read_file(extra / REQUESTS_FILE, tolerance)


def write_to_version(golden: Golden, version: str | os.PathLike[str]) -> None:
    """Put golden requests into a version that is being made."""
    extra = Path(version, EXTRA_DIRECTORY)
    extra.mkdir(exist_ok=True)
    tfrecord.write(extra / REQUESTS_FILE, (record.log.SerializeToString() for record in golden.records))
    atomic.write_atomically(extra / TOLERANCE_FILE, json.dumps(asdict(golden.tolerance)).encode() + b"\n")


def check(model: Inference, golden: Golden) -> None:
    """Send every golden request to ``model``.

    Raises:
        InvalidArgument: an answer is not the right one; it names the record, the output
            and the numbers.
        SpikelessError: a request failed.
    """
    for record in golden.records:
        problem = difference(record.entry.response, answer(model, record), golden.tolerance)
        if problem:
            raise InvalidArgument(f"golden request {record.number} of {len(golden.records)}: {problem}")


def difference(expected: Any, actual: Any, tolerance: Tolerance) -> str | None:
    """How a response differs from the expected one, in words; None when it is right."""
    wanted, found = outputs(expected), outputs(actual)
    if missing := sorted(set(wanted) - set(found)):
        return f"the answer lacks {', '.join(missing)}; it has {', '.join(sorted(found))}"
    for name, array in wanted.items():
        problem = _array_difference(array, found[name], tolerance)
        if problem:
            return f"{name} {problem}"
    return None


def _array_difference(expected: Any, actual: Any, tolerance: Tolerance) -> str | None:
    if expected.shape != actual.shape:
        return f"has shape {shape_text(actual.shape)} instead of {shape_text(expected.shape)}"
    if expected.dtype != actual.dtype:
        return f"has type {actual.dtype} instead of {expected.dtype}"
    if expected.dtype.kind in "Ob":
        wrong = expected != actual
    else:
        wide = np.complex128 if expected.dtype.kind == "c" else np.float64
        if expected.dtype.kind not in "iu":
            expected, actual = expected.astype(wide), actual.astype(wide)
        wrong = ~np.isclose(actual, expected, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True)
    if not np.any(wrong):
        return None
    at = tuple(int(index) for index in np.argwhere(wrong)[0])
    where = f" at {list(at)}" if at else ""
    return (
        f"is {_text(actual[at])}{where} instead of {_text(expected[at])} "
        f"({np.count_nonzero(wrong)} of {wrong.size} values differ; rtol {tolerance.rtol:g}, "
        f"atol {tolerance.atol:g})"
    )


def _text(value: Any) -> str:
    return f"{value:.7g}" if isinstance(value, (np.floating, np.complexfloating)) else repr(value)


def not_finite(response: Any) -> str | None:
    """The first output with a NaN or an infinity in it, or None."""
    for name, array in outputs(response).items():
        if array.dtype.kind not in "Obiu" and not np.all(np.isfinite(array.astype(np.complex128))):
            return name
    return None
