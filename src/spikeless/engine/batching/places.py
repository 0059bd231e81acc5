"""Where batches run: on the threads of their calls, so many at once."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from spikeless.engine.batching.calls import BatchedCall
from spikeless.engine.batching.queues import BatchQueue, QueueKey
from spikeless.errors import DeadlineExceeded, ResourceExhausted, SpikelessError

if TYPE_CHECKING:
    from spikeless.engine.batching.sessions import BatchingSession

_log = logging.getLogger(__name__)
_Array = np.ndarray[Any, Any]


class BatchPlaces:
    """Where batches run: so many at once, from all queues in turn."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._free = count
        # The queues that have calls; the next to be asked is the first.
        self._turns: deque[BatchQueue] = deque()

    def run(
        self,
        session: BatchingSession,
        key: QueueKey,
        call: BatchedCall,
        feeds: Mapping[str, _Array],
        size: int,
    ) -> list[_Array]:
        """Put a call into its queue, help to run the batches, return its outputs."""
        with self._lock:
            queue = session.queues.get(key) or BatchQueue(session, key)
            queue.put(call, feeds, size)
            if key not in session.queues:
                session.queues[key] = queue
                self._turns.append(queue)
        while True:
            with self._lock:
                now = time.monotonic()
                if call.runs is None and not call.is_over:
                    self._give_places(now)
                batch = call.runs
                if batch is None:
                    if call.is_over or now >= call.deadline:
                        self._leave(call)
                        return call.answer()
                    until = call.wakes_at(now)
            if batch is None:
                call.sleep(until)
                continue
            rows: list[list[_Array]] = []
            error: BaseException | None = None
            try:
                rows = session.run_batch(batch)
            except BaseException as caught:  # whatever it is, it is every call's
                error = caught
                if not isinstance(caught, SpikelessError):
                    _log.exception("a batch failed")
            with self._lock:
                self._free += 1
                call.runs = None
                for index, part in enumerate(batch.parts):
                    if error is not None:
                        part.call.error = _copy_of(error)
                    else:
                        part.call.rows[part.index] = rows[index]
                    if part.call.is_over:
                        part.call.wake()
                batch.parts.clear()
                self._give_places(time.monotonic())
            del batch, rows, error

    def _give_places(self, now: float) -> None:
        """Give each free place to a batch that may run, from the queues in turn."""
        asked = 0
        while self._free and asked < len(self._turns):
            queue = self._turns[0]
            self._turns.rotate(-1)
            asked += 1
            if queue.take(now) is not None:
                self._free -= 1
                asked = 0
            if queue.is_empty:
                self._turns.pop()
                del queue.session.queues[queue.key]
                queue.batches.clear()

    def _leave(self, call: BatchedCall) -> None:
        """Take what is left of a call out of the queues: it is over, or out of time."""
        waiting = [part for part in call.parts if not part.batch.taken]
        for part in waiting:
            part.batch.queue.withdraw(part)
        if waiting:
            self._give_places(time.monotonic())
        if call.is_over:
            return
        if len(waiting) == len(call.parts):
            call.error = ResourceExhausted("Run() timeout exceeded while waiting in batching queue")
        else:
            call.error = DeadlineExceeded("the deadline passed while its batch was running")


def _copy_of(error: BaseException) -> BaseException:
    """An error for one thread to raise: each gives it a traceback of its own."""
    copied = type(error).__new__(type(error))
    copied.args = error.args
    vars(copied).update(vars(error))
    return copied
