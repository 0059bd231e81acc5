"""Where the calls of one signature wait, and how the rows of large ones are cut."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from spikeless.engine.batching.calls import Batch, BatchedCall, BatchPart
from spikeless.errors import Unavailable

if TYPE_CHECKING:
    from spikeless.engine.batching.sessions import BatchingSession

_Array = np.ndarray[Any, Any]
#: The input and the output tensors of a queue.
QueueKey = tuple[frozenset[str], frozenset[str]]


class BatchQueue:
    """The batches of one signature, the last open; under `BatchPlaces`' lock."""

    def __init__(self, session: BatchingSession, key: QueueKey) -> None:
        self.session = session
        self.key = key
        self.batches = deque([Batch(self)])

    def put(self, call: BatchedCall, feeds: Mapping[str, _Array], size: int) -> None:
        """Distribute a call's rows; raises Unavailable where there is no room."""
        parameters = self.session.runner.parameters
        limit = parameters.limit
        room = limit - self.batches[-1].size
        cuts = [(0, size)]
        if parameters.enable_large_batch_splitting:
            capacity = (parameters.max_enqueued_batches - len(self.batches)) * limit + room
            if size > capacity:
                raise Unavailable(
                    "The batch scheduling queue to which this task was submitted is full; task size is "
                    f"{size} but scheduling capacity is only {capacity} (num_enqueued_batches="
                    f"{len(self.batches)}, max_enqueued_batches={parameters.max_enqueued_batches}, "
                    f"open_batch_size={limit - room}, max_execution_batch_size={limit})"
                )
            cuts = cut_rows(size, room, limit)
        elif size > room and len(self.batches) >= max(parameters.max_enqueued_batches, 1):
            raise Unavailable(
                "The batch scheduling queue to which this task was submitted is full; currently "
                f"{len(self.batches)} batches enqueued and max_enqueued_batches is "
                f"{max(parameters.max_enqueued_batches, 1)}"
            )
        for index, (start, stop) in enumerate(cuts):
            rows = feeds if len(cuts) == 1 else {name: array[start:stop] for name, array in feeds.items()}
            part = BatchPart(call, index, rows, stop - start)
            if self.batches[-1].size + part.size > limit:
                self.batches.append(Batch(self))
            part.batch = batch = self.batches[-1]
            if not batch.parts:
                batch.ready_at = call.started + parameters.batch_timeout_micros / 1e6
            batch.parts.append(part)
            batch.size += part.size
            call.parts.append(part)

    def take(self, now: float) -> Batch | None:
        """Take out a batch that may run, with a call whose thread runs it."""
        batch = self.batches[0]
        is_full = len(self.batches) > 1 or batch.size >= self.session.runner.parameters.limit
        if not batch.parts or not (is_full or now >= batch.ready_at):
            return None
        # A large call that runs one of its batches cannot run another as well.
        runner = next((part.call for part in batch.parts if part.call.runs is None), None)
        if runner is None:
            return None
        self.batches.popleft()
        if not self.batches:
            self.batches.append(Batch(self))
        batch.taken = True
        runner.runs = batch
        runner.wake()
        return batch

    def withdraw(self, part: BatchPart) -> None:
        """Take out the rows of a call that waits no more."""
        batch = part.batch
        batch.parts.remove(part)
        batch.size -= part.size
        if batch.parts:
            batch.parts[0].call.wake()
        elif batch is not self.batches[-1]:
            self.batches.remove(batch)

    @property
    def is_empty(self) -> bool:
        return len(self.batches) == 1 and not self.batches[0].parts


def cut_rows(size: int, room: int, limit: int) -> list[tuple[int, int]]:
    """The rows of each part: the first fills the open batch, others have one each."""
    stops = [*range(room or limit, size, limit), size]
    return list(zip([0, *stops], stops, strict=False))
