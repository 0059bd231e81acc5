"""The requests that are replayed: a model's own warmup records, as bytes ready to send.

In: ``assets.extra/tf_serving_warmup_requests``, or any TFRecord file of
``PredictionLog``. Out: messages of gRPC, or bodies of another of the `PROTOCOLS`.
TensorFlow is not imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from spikeless.bench.protocols import PROTOCOLS, Protocol
from spikeless.errors import InvalidArgument, SpikelessError
from spikeless.formats import captures, kinds, tfrecord
from spikeless.formats.kinds import BY_LOG_FIELD, Kind
from spikeless.formats.protos import prediction_log_pb2


@dataclass(frozen=True)
class ReplayedRequest:
    """One request, as it is sent."""

    kind: Kind
    #: The serialised request, or the body.
    message: bytes
    protocol: Protocol
    path: str
    #: Its batch size.
    rows: int = 1

    @property
    def name(self) -> str:
        return self.kind.name

    def served_version(self, response: bytes) -> int:
        return self.protocol.served_version(self.kind, response)


def read_requests(
    path: str | os.PathLike[str], model_name: str, protocol: str = "grpc", url_path: str = ""
) -> list[ReplayedRequest]:
    """The requests of a file or a folder of captures, addressed to `model_name`.

    They name no version, so they follow a swap. Those of HTTP go to `url_path`, or
    where it is empty to that of the `protocol`.

    Raises:
        NotFound: there is no such file.
        DataLoss: the file is truncated or damaged.
        InvalidArgument: a record is no PredictionLog, is of a kind that cannot be
            replayed, or that the protocol does not have, or there is none.
    """
    spoken = PROTOCOLS[protocol]
    requests = [
        _request(record, model_name, spoken, url_path, f"{os.fspath(path)}: record {number}")
        for number, record in enumerate(records(path), start=1)
    ]
    if not requests:
        raise InvalidArgument(f"{os.fspath(path)} holds no requests: build it with `spikeless warmup build`")
    return requests


def records(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The records of a file, or of all files of a folder of captures."""
    for file in captures.files(path) if os.path.isdir(path) else [path]:
        yield from tfrecord.read(file)


def _request(
    record: bytes, model_name: str, protocol: Protocol, url_path: str, where: str
) -> ReplayedRequest:
    try:
        log = prediction_log_pb2.PredictionLog.FromString(record)
    except DecodeError:
        raise InvalidArgument(f"{where} is no PredictionLog") from None
    field = log.WhichOneof("log_type")
    if field not in BY_LOG_FIELD:
        raise InvalidArgument(
            f"{where} is of kind {field or 'none'}: only {', '.join(BY_LOG_FIELD)} can be replayed"
        )
    kind = BY_LOG_FIELD[field]
    request = getattr(log, field).request
    for spec in kind.request_specs(request):
        spec.name = model_name
        spec.ClearField("version_choice")
    try:
        path, message = protocol.encode(kind, request, model_name)
    except SpikelessError as error:
        raise InvalidArgument(f"{where}: {error}") from None
    return ReplayedRequest(kind, message, protocol, url_path or path, _rows(kind, request))


def _rows(kind: Kind, request: Any) -> int:
    """The batch size: examples, or the largest first dimension of an input."""
    if kind.takes_examples:
        return len(kinds.examples(request.input))
    shapes = [tensor.tensor_shape.dim for tensor in request.inputs.values()]
    return max((int(shape[0].size) for shape in shapes if shape), default=1)


def parse_batch_sizes(text: str) -> dict[int, float]:
    """``1:70,8:30``: batch size -> its share, relative to the others.

    Raises:
        InvalidArgument: it is something else.
    """
    found: dict[int, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+(?:\.\d+)?)\s*", part)
        if match is None or not int(match[1]) or not float(match[2]):
            raise InvalidArgument(f"{text!r} is no distribution of batch sizes: say 1:70,8:20,32:10")
        found[int(match[1])] = found.get(int(match[1]), 0.0) + float(match[2])
    return found


def choose(requests: Sequence[ReplayedRequest], count: int, batch_sizes: str, seed: int) -> NDArray[np.int64]:
    """Which request each of `count` starts sends, of shape ``[count]``.

    Without `batch_sizes` (see `parse_batch_sizes`) they take turns; with them each is
    drawn at random by its batch size, and requests of one size take turns.

    Raises:
        InvalidArgument: no request has one of the sizes.
    """
    if not batch_sizes:
        return np.arange(count) % len(requests)
    shares = parse_batch_sizes(batch_sizes)
    sizes = np.array([request.rows for request in requests])
    if missing := [size for size in shares if size not in sizes]:
        there = ", ".join(map(str, np.unique(sizes).tolist()))
        raise InvalidArgument(
            f"no request has batch size {missing[0]}, only {there}: "
            "build requests of that size with `spikeless warmup build --batch-sizes`"
        )
    weights = np.array(list(shares.values()))
    random = np.random.default_rng([seed, 1])  # Independent of the arrivals.
    drawn = random.choice(list(shares), count, p=weights / weights.sum())
    numbers = np.zeros(count, np.int64)
    for size in shares:
        mine, of_size = np.flatnonzero(drawn == size), np.flatnonzero(sizes == size)
        numbers[mine] = of_size[np.arange(len(mine)) % len(of_size)]
    return numbers
