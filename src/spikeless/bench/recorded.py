"""Recorded load: the requests of a capture, at the times at which they arrived.

In: a file or folder that ``spikeless capture`` wrote, or TensorFlow Serving's own
request log. Out: when each of its requests leaves.

Records that carry only the second of their arrival are spread evenly over it.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from spikeless.bench.replayed import ReplayedRequest, choose, read_requests, records
from spikeless.bench.run_file import Settings
from spikeless.errors import InvalidArgument
from spikeless.formats import captures, kinds
from spikeless.formats.protos import prediction_log_pb2
from spikeless.openloop.schedule import RECORDED

_SECOND = 10**9


@dataclass(frozen=True)
class Recording:
    """When the requests of one model arrived."""

    #: In seconds after the first, ascending, of shape ``[requests]``.
    offsets: NDArray[np.float64]
    #: Which record of the file each is, from 0.
    numbers: NDArray[np.int64]
    #: Records of other models.
    others: int

    @property
    def rate(self) -> float:
        """Requests per second."""
        return (len(self.offsets) - 1) / float(self.offsets[-1])

    @property
    def seconds(self) -> float:
        """From the first arrival until the next would have come after the last."""
        return float(self.offsets[-1]) + 1 / self.rate


def read_recording(path: str | os.PathLike[str], model_name: str) -> Recording:
    """The arrivals of the requests for `model_name`.

    Raises:
        NotFound: there is no such file, or the folder has none.
        DataLoss: a file is truncated or damaged.
        InvalidArgument: a record does not say when it arrived, or fewer than two
            moments are of this model.
    """
    arrivals: dict[int, int] = {}
    names: Counter[str] = Counter()
    for number, record in enumerate(records(path)):
        where = f"{os.fspath(path)}: record {number + 1}"
        try:
            log = prediction_log_pb2.PredictionLog.FromString(record)
        except DecodeError:
            raise InvalidArgument(f"{where} is no PredictionLog") from None
        name = _model(log)
        names[name] += 1
        if name != model_name:
            continue
        arrived = captures.arrived(log)
        if arrived is None:
            raise InvalidArgument(
                f"{where} does not say when its request arrived: record it with `spikeless capture`, or send "
                "the requests by a schedule with --requests"
            )
        arrivals[number] = arrived
    if len(set(arrivals.values())) < 2:
        raise InvalidArgument(
            f"{os.fspath(path)} has {len(arrivals)} requests for {model_name}, at fewer than two moments; "
            f"it has requests for {', '.join(sorted(names)) or 'no model'}"
        )
    numbers, times = np.array(list(arrivals)), np.array(list(arrivals.values()))
    order = np.argsort(times, kind="stable")
    offsets = (times[order] - times.min()) / _SECOND
    if not (times % _SECOND).any():
        offsets = _spread(offsets)
    return Recording(offsets - offsets[0], numbers[order], names.total() - len(arrivals))


def _model(log: Any) -> str:
    kind = kinds.of_log(log)
    if kind is None:
        return ""
    specs = kind.request_specs(getattr(log, kind.log_field).request)
    return next((str(spec.name) for spec in specs), "")


def _spread(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Whole seconds, of which equal ones are spread evenly over theirs."""
    _, first, counts = np.unique(seconds, return_index=True, return_counts=True)
    position = np.arange(len(seconds)) - np.repeat(first, counts)
    spread: NDArray[np.float64] = seconds + position / np.repeat(counts, counts)
    return spread


@dataclass(frozen=True)
class Planned:
    """What a load sends: the same for all of its processes."""

    requests: list[ReplayedRequest]
    #: Intended starts in seconds, ascending, of shape ``[starts]``.
    offsets: NDArray[np.float64]
    #: The request that each sends, of the same shape.
    numbers: NDArray[np.int64]


def planned(settings: Settings) -> Planned:
    """What the load of `settings` sends when.

    Raises:
        SpikelessError: the requests, or their arrivals, cannot be read.
    """
    requests = read_requests(settings.requests, settings.model_name, settings.protocol, settings.url_path)
    if settings.arrivals != RECORDED:
        offsets = settings.schedule.offsets()
        return Planned(requests, offsets, choose(requests, len(offsets), settings.batch_sizes, settings.seed))
    recording = read_recording(settings.requests, settings.model_name)
    offsets = recording.offsets / settings.speed
    inside = offsets < settings.seconds
    return Planned(requests, offsets[inside], recording.numbers[inside])
