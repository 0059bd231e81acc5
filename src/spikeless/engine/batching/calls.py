"""Calls that are batched, and the batches that they are in."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from spikeless.engine.batching.queues import BatchQueue

_Array = np.ndarray[Any, Any]


class BatchPart:
    """Rows of one call in one batch; large calls may have several parts."""

    __slots__ = ("batch", "call", "feeds", "index", "size")

    def __init__(self, call: BatchedCall, index: int, feeds: Mapping[str, _Array], size: int) -> None:
        self.call = call
        self.index = index
        self.feeds = feeds
        self.size = size
        self.batch: Batch


class BatchedCall:
    """A call that sleeps until its rows are there, or until it has to run a batch."""

    def __init__(self, timeout: float | None, pool: int | None) -> None:
        self.started = time.monotonic()
        #: By `time.monotonic`; infinite without one.
        self.deadline = math.inf if timeout is None else self.started + timeout
        self.pool = pool
        self.parts: list[BatchPart] = []
        #: The batch that this call's thread runs next or is running.
        self.runs: Batch | None = None
        #: For each part, its rows of the outputs.
        self.rows: dict[int, list[_Array]] = {}
        self.error: BaseException | None = None
        self._awake = threading.Lock()
        self._awake.acquire()

    @property
    def is_over(self) -> bool:
        return self.error is not None or len(self.rows) == len(self.parts)

    def wake(self) -> None:
        """End its sleep, or the next one; only under the lock of `BatchPlaces`."""
        if self._awake.locked():
            self._awake.release()

    def sleep(self, until: float) -> None:
        """Sleep until it is woken, at the latest until this moment."""
        seconds = min(until - time.monotonic(), threading.TIMEOUT_MAX)
        if seconds > 0:
            self._awake.acquire(timeout=seconds)

    def wakes_at(self, now: float) -> float:
        """When something happens that only this call looks after.

        That a batch is old enough is the matter of its first call, if that is asleep.
        """
        moments = [self.deadline]
        for batch in (part.batch for part in self.parts):
            if not batch.taken and batch.ready_at > now:
                first = batch.parts[0].call
                if first is self or first.runs is not None:
                    moments.append(batch.ready_at)
        return min(moments)

    def answer(self) -> list[_Array]:
        """The outputs of all its rows; afterwards it holds on to nothing.

        What refers to itself would live until the garbage collector comes by.
        """
        error, self.error = self.error, None
        if error is not None:
            self.parts.clear()
            try:
                raise error
            finally:
                del error
        rows = [self.rows[index] for index in range(len(self.parts))]
        self.parts.clear()
        return rows[0] if len(rows) == 1 else [np.concatenate(parts) for parts in zip(*rows, strict=True)]


class Batch:
    """Parts that run together."""

    __slots__ = ("parts", "queue", "ready_at", "size", "taken")

    def __init__(self, queue: BatchQueue) -> None:
        self.queue = queue
        self.parts: list[BatchPart] = []
        self.size = 0
        #: When it may run although it is not full.
        self.ready_at = math.inf
        self.taken = False
