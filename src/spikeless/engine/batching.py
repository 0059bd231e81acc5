"""Batching: calls that wait for the same signature run together, as one call.

In: the calls of a session, and the ``BatchingParameters`` of
``--batching_parameters_file`` or of a version. Out: each call's own rows of the
answers. Rules, messages and metrics are those of TensorFlow Serving's
``batching_session.cc`` and of ``shared_batch_scheduler.h``:

- Calls with the same input and output tensors share a queue. Its last batch is open: it
  takes calls until it is full.
- A batch may run when it is full or as old as ``batch_timeout_micros``, and when one of
  the ``num_batch_threads`` places is free. Queues with such batches take turns.
- It is padded with copies of a row up to the next of ``allowed_batch_sizes``.

There are no threads of its own: a batch runs on the thread of one of its calls, while
the others sleep until it has their rows, so a call that is alone is never handed over.
Inputs are copied once, from the requests into the tensor of the batch, and the answers
are views of its outputs.
"""

from __future__ import annotations

import logging
import math
import operator
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from spikeless.engine.flags import ServerFlags
from spikeless.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    SpikelessError,
    Unavailable,
)
from spikeless.formats.protos import message_class, meta_graph_pb2, read_text_proto
from spikeless.formats.tensors import data_type, dtype_name
from spikeless.runtime import Session
from spikeless.runtime.model import Runner

_log = logging.getLogger(__name__)
_Array = np.ndarray[Any, Any]

#: In a version's folder, with ``--enable_per_model_batching_parameters``.
PARAMETERS_FILE = "batching_params.pbtxt"
#: The ranks that TensorFlow's padding knows.
_PADDED_RANKS = range(1, 7)

_Int64Value = message_class("Int64Value", value=(1, int))
_BoolValue = message_class("BoolValue", value=(1, bool))
_StringValue = message_class("StringValue", value=(1, str))
_BatchingParameters = message_class(
    "BatchingParameters",
    max_batch_size=(1, _Int64Value),
    batch_timeout_micros=(2, _Int64Value),
    max_enqueued_batches=(3, _Int64Value),
    num_batch_threads=(4, _Int64Value),
    thread_pool_name=(5, _StringValue),
    allowed_batch_sizes=(6, list[int]),
    pad_variable_length_inputs=(7, bool),
    enable_large_batch_splitting=(8, _BoolValue),
    max_execution_batch_size=(9, _Int64Value),
)


class BatchObserver(Protocol):
    """Told of what is batched: `spikeless.engine.metrics`."""

    def batch_input(self, size: int) -> None: ...
    def batch_queued(self, seconds: float) -> None: ...
    def batch_merged(self, size: int, padding: int) -> None: ...
    def batch_ran(self) -> None: ...


@dataclass(frozen=True)
class Parameters:
    """``BatchingParameters`` with TensorFlow Serving's defaults."""

    #: Rows that one call may have, and a batch, unless large calls are split.
    max_batch_size: int = 1000
    batch_timeout_micros: int = 0
    max_enqueued_batches: int = 10
    #: Batches that run at once.
    num_batch_threads: int = os.cpu_count() or 1
    #: Rows that a batch is padded to; empty: none is padded.
    allowed_batch_sizes: tuple[int, ...] = ()
    #: Whether inputs of other shapes are padded to the largest in their batch.
    pad_variable_length_inputs: bool = False
    enable_large_batch_splitting: bool = False
    #: Rows that a batch may have where large calls are split.
    max_execution_batch_size: int = 1000

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Parameters:
        """Read a ``BatchingParameters`` in text format; raises as `read_text_proto`."""
        message = read_text_proto(file, _BatchingParameters())
        values: dict[str, Any] = {
            "allowed_batch_sizes": tuple(message.allowed_batch_sizes),
            "pad_variable_length_inputs": message.pad_variable_length_inputs,
        }
        for field, value in message.ListFields():
            # Batches have no thread pool that could bear the name.
            if field.message_type is not None and field.name != "thread_pool_name":
                values[field.name] = value.value
        values.setdefault("max_execution_batch_size", values.get("max_batch_size", cls.max_batch_size))
        return cls(**values)

    @property
    def limit(self) -> int:
        """Rows that one batch may have."""
        return self.max_execution_batch_size if self.enable_large_batch_splitting else self.max_batch_size

    def check_threads(self) -> None:
        """Refuse what no server could run with."""
        if self.num_batch_threads < 1:
            raise InvalidArgument(f"num_batch_threads must be positive; was {self.num_batch_threads}")

    def checked(self) -> Parameters:
        """The parameters that a version's queues get; refuses what makes no sense."""
        sizes = self.allowed_batch_sizes
        if sizes and sizes[-1] != self.max_batch_size:
            raise InvalidArgument(
                f"Last entry in allowed_batch_sizes must match max_batch_size; last entry was {sizes[-1]}; "
                f"expected {self.max_batch_size}"
            )
        if self.max_batch_size < 1:
            raise InvalidArgument(f"input_batch_size_limit must be positive; was {self.max_batch_size}")
        if self.batch_timeout_micros < 0:
            raise InvalidArgument(
                f"batch_timeout_micros must be non-negative; was {self.batch_timeout_micros}"
            )
        if self.max_enqueued_batches < self.enable_large_batch_splitting:
            raise InvalidArgument(f"max_enqueued_batches must be positive; was {self.max_enqueued_batches}")
        if self.limit > self.max_batch_size:
            raise InvalidArgument(
                "When enable_large_batch_splitting is true, input_batch_size_limit must be greater than or "
                f"equal to max_execution_batch_size: {self.max_batch_size} < {self.limit}"
            )
        if self.limit < 1:
            raise InvalidArgument(f"max_execution_batch_size must be positive; was {self.limit}")
        if list(sizes) != sorted(set(sizes)):
            _log.warning("allowed_batch_sizes should increase: of %s, some are never used", list(sizes))
        return self

    @property
    def used_batch_sizes(self) -> list[int]:
        """The allowed sizes that batches are padded to, lowest first."""
        return sorted({self.padded(size) for size in self.allowed_batch_sizes if 0 < size <= self.limit})

    def padded(self, size: int) -> int:
        """The rows that a batch of ``size`` rows runs with."""
        if not size:
            return 0  # no row to copy
        return next((allowed for allowed in self.allowed_batch_sizes if allowed >= size), size)


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
        self._places = _Places(self._parameters.num_batch_threads)
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
        return _BatchingSession(_Stack(session, parameters.checked(), self._observer), self._places)


class _Part:
    """Rows of one call in one batch; large calls may have several parts."""

    __slots__ = ("batch", "call", "feeds", "index", "size")

    def __init__(self, call: _Call, index: int, feeds: Mapping[str, _Array], size: int) -> None:
        self.call = call
        self.index = index
        self.feeds = feeds
        self.size = size
        self.batch: _Batch


class _Call:
    """A call that sleeps until its rows are there, or until it has to run a batch."""

    def __init__(self, timeout: float | None, pool: int | None) -> None:
        self.started = time.monotonic()
        #: By `time.monotonic`; infinite without one.
        self.deadline = math.inf if timeout is None else self.started + timeout
        self.pool = pool
        self.parts: list[_Part] = []
        #: The batch that this call's thread runs next or is running.
        self.runs: _Batch | None = None
        #: For each part, its rows of the outputs.
        self.rows: dict[int, list[_Array]] = {}
        self.error: BaseException | None = None
        self._awake = threading.Lock()
        self._awake.acquire()

    @property
    def is_over(self) -> bool:
        return self.error is not None or len(self.rows) == len(self.parts)

    def wake(self) -> None:
        """End its sleep, or the next one; only under the lock of `_Places`."""
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


class _Batch:
    """Parts that run together."""

    __slots__ = ("parts", "queue", "ready_at", "size", "taken")

    def __init__(self, queue: _Queue) -> None:
        self.queue = queue
        self.parts: list[_Part] = []
        self.size = 0
        #: When it may run although it is not full.
        self.ready_at = math.inf
        self.taken = False


class _Queue:
    """The batches of one signature, the last of them open; under `_Places`' lock."""

    def __init__(self, session: _BatchingSession, key: _Key) -> None:
        self.session = session
        self.key = key
        self.batches = deque([_Batch(self)])

    def put(self, call: _Call, feeds: Mapping[str, _Array], size: int) -> None:
        """Distribute a call's rows; raises Unavailable where there is no room."""
        parameters = self.session.stack.parameters
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
            cuts = _cuts(size, room, limit)
        elif size > room and len(self.batches) >= max(parameters.max_enqueued_batches, 1):
            raise Unavailable(
                "The batch scheduling queue to which this task was submitted is full; currently "
                f"{len(self.batches)} batches enqueued and max_enqueued_batches is "
                f"{max(parameters.max_enqueued_batches, 1)}"
            )
        for index, (start, stop) in enumerate(cuts):
            rows = feeds if len(cuts) == 1 else {name: array[start:stop] for name, array in feeds.items()}
            part = _Part(call, index, rows, stop - start)
            if self.batches[-1].size + part.size > limit:
                self.batches.append(_Batch(self))
            part.batch = batch = self.batches[-1]
            if not batch.parts:
                batch.ready_at = call.started + parameters.batch_timeout_micros / 1e6
            batch.parts.append(part)
            batch.size += part.size
            call.parts.append(part)

    def take(self, now: float) -> _Batch | None:
        """Take out a batch that may run, with a call whose thread runs it."""
        batch = self.batches[0]
        is_full = len(self.batches) > 1 or batch.size >= self.session.stack.parameters.limit
        if not batch.parts or not (is_full or now >= batch.ready_at):
            return None
        # A large call that runs one of its batches cannot run another as well.
        runner = next((part.call for part in batch.parts if part.call.runs is None), None)
        if runner is None:
            return None
        self.batches.popleft()
        if not self.batches:
            self.batches.append(_Batch(self))
        batch.taken = True
        runner.runs = batch
        runner.wake()
        return batch

    def withdraw(self, part: _Part) -> None:
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


def _copy_of(error: BaseException) -> BaseException:
    """An error for one thread to raise: each gives it a traceback of its own."""
    copied = type(error).__new__(type(error))
    copied.args = error.args
    vars(copied).update(vars(error))
    return copied


def _cuts(size: int, room: int, limit: int) -> list[tuple[int, int]]:
    """The rows of each part: the first fills the open batch, others have one each."""
    stops = [*range(room or limit, size, limit), size]
    return list(zip([0, *stops], stops, strict=False))


class _Places:
    """Where batches run: so many at once, from all queues in turn."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._free = count
        # The queues that have calls; the next to be asked is the first.
        self._turns: deque[_Queue] = deque()

    def run(
        self,
        session: _BatchingSession,
        key: _Key,
        call: _Call,
        feeds: Mapping[str, _Array],
        size: int,
    ) -> list[_Array]:
        """Put a call into its queue, help to run the batches, return its outputs."""
        with self._lock:
            queue = session.queues.get(key) or _Queue(session, key)
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

    def _leave(self, call: _Call) -> None:
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


#: The input and the output tensors of a queue.
_Key = tuple[frozenset[str], frozenset[str]]


class _Stack:
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


class _BatchingSession:
    """A session whose calls are batched, for one version."""

    def __init__(self, stack: _Stack, places: _Places) -> None:
        self.stack = stack
        #: The queues that have calls; `_Places` keeps it.
        self.queues: dict[_Key, _Queue] = {}
        self._places = places

    #: A call waits for others.
    is_bounded = False

    @property
    def meta_graph(self) -> meta_graph_pb2.MetaGraphDef:
        return self.stack.session.meta_graph

    def close(self) -> None:
        self.stack.session.close()

    def run(
        self,
        feeds: Mapping[str, _Array],
        fetches: Sequence[str],
        timeout: float | None = None,
        inter_op_thread_pool: int | None = None,
    ) -> list[_Array]:
        size = self.stack.size(feeds)
        key = frozenset(feeds), frozenset(fetches)
        call = _Call(timeout, inter_op_thread_pool)
        outputs = self._places.run(self, key, call, feeds, size)
        by_name = dict(zip(sorted(key[1]), outputs, strict=True))
        return [by_name[name] for name in fetches]

    def run_batch(self, batch: _Batch) -> list[list[_Array]]:
        """Each part's rows of the outputs, which are in the order of their names."""
        now = time.monotonic()
        if self.stack.observer is not None:
            for part in batch.parts:
                self.stack.observer.batch_queued(now - part.call.started)
        # The last one's deadline: those of others end their calls, not the batch.
        deadline = max(part.call.deadline for part in batch.parts)
        return self.stack.run(
            [part.feeds for part in batch.parts],
            [part.size for part in batch.parts],
            sorted(batch.queue.key[1]),
            None if deadline == math.inf else max(deadline - now, 0.0),
            batch.parts[0].call.pool,
        )


class _WarmingSession:
    """The same without queues: for one thread, before a version takes calls.

    What is run in shapes that were not seen yet runs in each allowed size of batches.
    """

    def __init__(self, batching: _BatchingSession) -> None:
        self._stack = batching.stack
        self._seen: set[Any] = set()

    is_bounded = False

    @property
    def meta_graph(self) -> meta_graph_pb2.MetaGraphDef:
        return self._stack.session.meta_graph

    def close(self) -> None:
        self._stack.session.close()

    def run(
        self,
        feeds: Mapping[str, _Array],
        fetches: Sequence[str],
        timeout: float | None = None,
        inter_op_thread_pool: int | None = None,
    ) -> list[_Array]:
        parameters = self._stack.parameters
        size = self._stack.size(feeds)

        def run(chosen: Callable[[_Array], _Array], rows: int) -> list[_Array]:
            part = {name: chosen(array) for name, array in feeds.items()}
            return self._stack.run([part], [rows], fetches, timeout, inter_op_thread_pool)[0]

        outputs = [
            run(operator.itemgetter(slice(start, stop)), stop - start)
            for start, stop in _cuts(size, 0, parameters.limit)
        ]
        shapes = frozenset((name, array.shape[1:]) for name, array in feeds.items()), frozenset(fetches)
        if size and shapes not in self._seen:
            self._seen.add(shapes)
            for allowed in parameters.used_batch_sizes:
                run(operator.itemgetter(np.arange(allowed) % size), allowed)
        return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]


def warming(session: Runner) -> Runner:
    """What a version is warmed through: batches of all sizes, without waiting."""
    return _WarmingSession(session) if isinstance(session, _BatchingSession) else session


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
