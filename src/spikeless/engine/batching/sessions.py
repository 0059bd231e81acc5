"""Sessions that batch what they are called with, for the versions of a server."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spikeless.engine.batching.calls import Batch, BatchedCall
from spikeless.engine.batching.parameters import Parameters
from spikeless.engine.batching.places import BatchPlaces
from spikeless.engine.batching.queues import BatchQueue, QueueKey, cut_rows
from spikeless.engine.batching.runner import BatchObserver, BatchRunner
from spikeless.engine.flags import ServerFlags
from spikeless.formats.protos import meta_graph_pb2
from spikeless.runtime import Session
from spikeless.runtime.model import Runner

_Array = np.ndarray[Any, Any]

#: In a version's folder, with ``--enable_per_model_batching_parameters``.
PARAMETERS_FILE = "batching_params.pbtxt"


class Batching:
    """All queues of a server: they share the places where batches run.

    Raises:
        SpikelessError: ``--batching_parameters_file`` cannot be used.
    """

    def __init__(self, flags: ServerFlags, observer: BatchObserver | None = None) -> None:
        self._parameters = Parameters()
        if flags.batching_parameters_file:
            self._parameters = Parameters.read(flags.batching_parameters_file)
        self._parameters.check_threads()
        self._per_model = flags.enable_per_model_batching_parameters
        self._places = BatchPlaces(self._parameters.num_batch_threads)
        self._observer = observer

    def wrap(self, session: Session, version: Path) -> Runner:
        """The session of the version in this folder, batched if it is to be.

        Raises:
            SpikelessError: its parameters cannot be read or make no sense.
        """
        parameters = self._parameters
        if self._per_model:
            file = version / PARAMETERS_FILE
            if not file.exists():
                return session
            parameters = Parameters.read(file)
        return BatchingSession(BatchRunner(session, parameters.checked(), self._observer), self._places)


class _InFront:
    """What is in front of a session and runs it in batches, for one version."""

    #: A call may wait for others.
    is_bounded = False

    def __init__(self, runner: BatchRunner) -> None:
        self.runner = runner

    @property
    def meta_graph(self) -> meta_graph_pb2.MetaGraphDef:
        return self.runner.session.meta_graph

    def close(self) -> None:
        self.runner.session.close()


class BatchingSession(_InFront):
    """A session whose calls are batched, for one version."""

    def __init__(self, runner: BatchRunner, places: BatchPlaces) -> None:
        super().__init__(runner)
        #: The queues that have calls; `BatchPlaces` keeps it.
        self.queues: dict[QueueKey, BatchQueue] = {}
        self._places = places

    def run(
        self,
        feeds: Mapping[str, _Array],
        fetches: Sequence[str],
        timeout: float | None = None,
        inter_op_thread_pool: int | None = None,
    ) -> list[_Array]:
        size = self.runner.size(feeds)
        key = frozenset(feeds), frozenset(fetches)
        call = BatchedCall(timeout, inter_op_thread_pool)
        outputs = self._places.run(self, key, call, feeds, size)
        by_name = dict(zip(sorted(key[1]), outputs, strict=True))
        return [by_name[name] for name in fetches]

    def run_batch(self, batch: Batch) -> list[list[_Array]]:
        """Each part's rows of the outputs, which are in the order of their names."""
        now = time.monotonic()
        if self.runner.observer is not None:
            for part in batch.parts:
                self.runner.observer.batch_queued(now - part.call.started)
        # The last one's deadline: those of others end their calls, not the batch.
        deadline = max(part.call.deadline for part in batch.parts)
        return self.runner.run(
            [part.feeds for part in batch.parts],
            [part.size for part in batch.parts],
            sorted(batch.queue.key[1]),
            None if deadline == math.inf else max(deadline - now, 0.0),
            batch.parts[0].call.pool,
        )


class _WarmingSession(_InFront):
    """The same without queues: for one thread, before a version takes calls.

    What is run in shapes that were not seen yet runs in each allowed size of batches.
    """

    def __init__(self, runner: BatchRunner) -> None:
        super().__init__(runner)
        self._seen: set[Any] = set()

    def run(
        self,
        feeds: Mapping[str, _Array],
        fetches: Sequence[str],
        timeout: float | None = None,
        inter_op_thread_pool: int | None = None,
    ) -> list[_Array]:
        parameters = self.runner.parameters
        size = self.runner.size(feeds)

        def run(chosen: Callable[[_Array], _Array], rows: int) -> list[_Array]:
            part = {name: chosen(array) for name, array in feeds.items()}
            return self.runner.run([part], [rows], fetches, timeout, inter_op_thread_pool)[0]

        outputs = [
            run(operator.itemgetter(slice(start, stop)), stop - start)
            for start, stop in cut_rows(size, 0, parameters.limit)
        ]
        shapes = frozenset((name, array.shape[1:]) for name, array in feeds.items()), frozenset(fetches)
        if size and shapes not in self._seen:
            self._seen.add(shapes)
            for allowed in parameters.used_batch_sizes:
                run(operator.itemgetter(np.arange(allowed) % size), allowed)
        return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]


def warming(session: Runner) -> Runner:
    """What a version is warmed through: batches of all sizes, without waiting."""
    return _WarmingSession(session.runner) if isinstance(session, BatchingSession) else session
