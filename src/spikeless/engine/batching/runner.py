"""One run of a session for the rows of several calls: merged, padded, split again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from spikeless.engine.batching.parameters import Parameters
from spikeless.errors import FailedPrecondition, Internal, InvalidArgument
from spikeless.formats.tensors import data_type, dtype_name
from spikeless.runtime import Session

_Array = np.ndarray[Any, Any]

#: The ranks that TensorFlow's padding knows.
_PADDED_RANKS = range(1, 7)


class BatchObserver(Protocol):
    """Told of what is batched: `spikeless.engine.metrics`."""

    def batch_input(self, size: int) -> None: ...
    def batch_queued(self, seconds: float) -> None: ...
    def batch_merged(self, size: int, padding: int) -> None: ...
    def batch_ran(self) -> None: ...


class BatchRunner:
    """Runs rows of several calls in one session, padded to an allowed size."""

    def __init__(self, session: Session, parameters: Parameters, observer: BatchObserver | None) -> None:
        self.session = session
        self.parameters = parameters
        self.observer = observer

    def size(self, feeds: Mapping[str, _Array]) -> int:
        """The rows of a call, which all its inputs must have."""
        if not feeds:
            raise InvalidArgument("Batching Run() must have at least one input tensor")
        if not all(array.ndim for array in feeds.values()):
            raise InvalidArgument("Batching Run() input tensors must have at least one dimension")
        size, *others = (len(array) for array in feeds.values())
        if any(other != size for other in others):
            raise InvalidArgument("Batching Run() input tensors must have equal 0th-dimension size")
        if self.observer is not None:
            for _ in feeds:
                self.observer.batch_input(size)
        if size > self.parameters.max_batch_size:
            raise InvalidArgument(
                f"Task size {size} is larger than maximum input batch size {self.parameters.max_batch_size}"
            )
        return size

    def run(
        self,
        feeds: Sequence[Mapping[str, _Array]],
        sizes: Sequence[int],
        fetches: Sequence[str],
        timeout: float | None,
        pool: int | None,
    ) -> list[list[_Array]]:
        """For each of the ``feeds``, with so many rows, its rows of the outputs."""
        size = sum(sizes)
        padded = self.parameters.padded(size)
        if self.observer is not None:
            self.observer.batch_merged(padded, padded - size)
        merged = {name: self._merged(name, [part[name] for part in feeds]) for name in feeds[0]}
        if padded > size:
            for arrays in merged.values():
                last = next(array for array in reversed(arrays) if len(array))
                arrays.append(np.broadcast_to(last[:1], (padded - size, *last.shape[1:])))
        outputs = self.session.run(merged, fetches, timeout, pool)
        if self.observer is not None:
            self.observer.batch_ran()
        for output in outputs:
            if not output.ndim:
                raise FailedPrecondition("Batched output tensor has 0 dimensions")
            if len(output) != padded:
                raise FailedPrecondition(
                    "Batched output tensor's 0th dimension does not equal the sum of the 0th dimension sizes "
                    "of the input tensors"
                )
        stops = accumulate(sizes)
        return [
            [output[stop - part : stop] for output in outputs]
            for stop, part in zip(stops, sizes, strict=True)
        ]

    def _merged(self, name: str, arrays: list[_Array]) -> list[_Array]:
        """What the calls feed for one tensor, in shapes that can be stacked."""
        first = arrays[0]
        for array in arrays:
            if array.dtype != first.dtype and data_type(array.dtype) != data_type(first.dtype):
                raise Internal(
                    "Tensor concat operation failed: INVALID_ARGUMENT: Cannot concatenate tensors that have "
                    f"different data types. Got {_type_name(first)} and {_type_name(array)}."
                )
            if array.ndim != first.ndim or (
                array.shape[1:] != first.shape[1:] and not self.parameters.pad_variable_length_inputs
            ):
                raise FailedPrecondition(
                    f"Tensors with name '{name}' from different tasks have different shapes and padding is "
                    "turned off. Set pad_variable_length_inputs to true, or ensure that all tensors with the "
                    "same name have equal dimensions starting with the first dim."
                )
        if not self.parameters.pad_variable_length_inputs:
            return list(arrays)
        if first.ndim not in _PADDED_RANKS:
            raise InvalidArgument("Only tensors with rank from 1 to 6 can be padded.")
        shape = tuple(map(max, zip(*(array.shape[1:] for array in arrays), strict=True)))
        return [_filled(array, shape) for array in arrays]


def _filled(array: _Array, shape: tuple[int, ...]) -> _Array:
    """Rows of a larger shape, filled up with the array's first value."""
    if array.shape[1:] == shape:
        return array
    target = (len(array), *shape)
    if not math.prod(target):
        return array.reshape(target)
    if not array.size:
        raise InvalidArgument("Got empty tensor in batch of non-empty tensors.")
    filled = np.full(target, array.flat[0], dtype=array.dtype)
    filled[tuple(slice(extent) for extent in array.shape)] = array
    return filled


def _type_name(array: _Array) -> str:
    return dtype_name(data_type(array.dtype)).removeprefix("DT_").lower()
