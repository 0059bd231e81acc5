"""The same samples in every requested batch size.

In: requests of any batch size. Out: requests of exactly the given sizes, made of the
same rows. Requests that differ only in their rows are concatenated and cut into
batches; the last batch is filled up from the first row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spikeless.errors import InvalidArgument, ResourceExhausted
from spikeless.formats.kinds import PREDICT, examples
from spikeless.formats.protos import prediction_log_pb2
from spikeless.formats.savedmodel import TensorSpec
from spikeless.formats.tensors import to_numpy, to_proto
from spikeless.formats.tfrecord import MAX_RECORD_BYTES
from spikeless.warmup.requests import Servable, WarmupRequest


def rebatch(
    servable: Servable, requests: Sequence[WarmupRequest], sizes: Sequence[int]
) -> list[WarmupRequest]:
    """``requests``, which must fit their signatures, in each of ``sizes``.

    Inputs whose first dimension is fixed, or that are scalars, stay as they are; so do
    requests that have no other input.

    Raises:
        InvalidArgument: the inputs of a request disagree about its batch size, or have
            no rows.
        ResourceExhausted: a batch would be larger than a message can be.
    """
    groups: dict[Any, list[WarmupRequest]] = {}
    for request in requests:
        groups.setdefault(_group(servable, request), []).append(request)
    batches: list[WarmupRequest] = []
    for group in groups.values():
        if group[0].kind.takes_examples:
            batches.extend(_example_batches(group, sizes))
        else:
            batches.extend(_predict_batches(servable, group, sizes))
    return batches


def _group(servable: Servable, request: WarmupRequest) -> tuple[Any, ...]:
    """Equal for requests whose rows can go into one batch: they differ in rows only."""
    rest = _copy(request)
    shapes: list[tuple[str, tuple[int, ...]]] = []
    if rest.kind == PREDICT:
        for alias in _batched(servable, request):
            shapes.append((alias, to_numpy(rest.message.inputs[alias]).shape[1:]))
            del rest.message.inputs[alias]
    elif rest.kind.takes_examples:
        del examples(rest.message.input)[:]
    return (*shapes, rest.log.SerializeToString(deterministic=True))


def _copy(request: WarmupRequest) -> WarmupRequest:
    log = prediction_log_pb2.PredictionLog()
    log.CopyFrom(request.log)
    return WarmupRequest(request.source, log)


def _batched(servable: Servable, request: WarmupRequest) -> list[str]:
    """The inputs of a Predict request that have rows; they must have equally many."""
    specs = servable.signature(request.message.model_spec.signature_name).inputs
    sizes = {
        alias: tensor.tensor_shape.dim[0].size
        for alias, tensor in sorted(request.message.inputs.items())
        if tensor.tensor_shape.dim and _has_rows(specs[alias])
    }
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        text = ", ".join(f"{alias}: {size}" for alias, size in sizes.items())
        raise InvalidArgument(f"{request.source}: the inputs need equally many rows, and some ({text})")
    return list(sizes)


def _has_rows(spec: TensorSpec) -> bool:
    return spec.shape is None or (len(spec.shape) > 0 and spec.shape[0] is None)


def _indices(group: list[WarmupRequest], rows: int, size: int) -> list[Any]:
    """Which of the group's rows go into each batch of ``size``."""
    row_bytes = sum(request.message.ByteSize() for request in group) // rows
    # Before any memory is taken for them.
    if size * row_bytes > MAX_RECORD_BYTES:
        raise ResourceExhausted(
            f"{group[0].source}: a batch of {size} with about {row_bytes} bytes a row is more than a message "
            "can hold; ask for smaller batches"
        )
    count = -(-rows // size)
    return list(np.resize(np.arange(rows), count * size).reshape(count, size))


def _predict_batches(
    servable: Servable, group: list[WarmupRequest], sizes: Sequence[int]
) -> list[WarmupRequest]:
    aliases = _batched(servable, group[0]) if group[0].kind == PREDICT else []
    if not aliases:
        return group
    rows = {
        alias: np.concatenate([to_numpy(request.message.inputs[alias]) for request in group])
        for alias in aliases
    }
    batches = []
    for size in sizes:
        for chosen in _indices(group, len(rows[aliases[0]]), size):
            batch = _copy(group[0])
            for alias in aliases:
                tensor = batch.message.inputs[alias]
                tensor.CopyFrom(to_proto(rows[alias][chosen], tensor.dtype))
            batches.append(batch)
    return batches


def _example_batches(group: list[WarmupRequest], sizes: Sequence[int]) -> list[WarmupRequest]:
    rows = [example for request in group for example in examples(request.message.input)]
    batches = []
    for size in sizes:
        for chosen in _indices(group, len(rows), size):
            batch = _copy(group[0])
            own = examples(batch.message.input)
            del own[:]
            own.extend(rows[index] for index in chosen)
            batches.append(batch)
    return batches
