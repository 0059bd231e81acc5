"""The requests that are replayed: a model's own warmup records, as bytes ready to send.

In: ``assets.extra/tf_serving_warmup_requests``, or any TFRecord file of
``PredictionLog``. Out: gRPC messages. TensorFlow is not imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from spikeless.errors import InvalidArgument
from spikeless.formats import tfrecord
from spikeless.formats.kinds import BY_LOG_FIELD, Kind
from spikeless.formats.protos import prediction_log_pb2


@dataclass(frozen=True)
class ReplayedRequest:
    """One request, as it is sent."""

    kind: Kind
    #: The serialised request.
    message: bytes


def read_requests(path: str | os.PathLike[str], model_name: str) -> list[ReplayedRequest]:
    """The requests of a file, addressed to `model_name`.

    They name no version, so they follow a swap.

    Raises:
        NotFound: there is no such file.
        DataLoss: the file is truncated or damaged.
        InvalidArgument: a record is no PredictionLog, is of a kind that cannot be
            replayed, or there is none.
    """
    requests = [
        _request(record, model_name, f"{os.fspath(path)}: record {number}")
        for number, record in enumerate(tfrecord.read(path), start=1)
    ]
    if not requests:
        raise InvalidArgument(f"{os.fspath(path)} holds no requests: build it with `spikeless warmup build`")
    return requests


def _request(record: bytes, model_name: str, where: str) -> ReplayedRequest:
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
    return ReplayedRequest(kind, request.SerializeToString())
