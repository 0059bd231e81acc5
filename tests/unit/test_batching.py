"""Calls that run together, in real sessions: what each gets, and when batches run."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikeless.engine.batching import Batching, Parameters, warming
from spikeless.engine.flags import ServerFlags
from spikeless.engine.loader import ModelLoader
from spikeless.errors import (
    Code,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SpikelessError,
)
from spikeless.formats import kinds
from spikeless.formats.protos import inference_pb2, input_pb2, predict_pb2
from spikeless.formats.tensors import to_proto
from spikeless.runtime import Session
from spikeless.runtime.model import Model, Runner

NEVER = "batch_timeout_micros { value: 600000000 }"
FEED, FETCH = "serving_default_x:0", "StatefulPartitionedCall:0"


@pytest.fixture(scope="module")
def sessions(saved_models: Path) -> Iterator[Callable[[str], Session]]:
    """Loaded once each, by the name of the model."""
    loaded: dict[str, Session] = {}

    def load(name: str) -> Session:
        if name not in loaded:
            loaded[name] = Session.load(saved_models / name)
        return loaded[name]

    yield load
    for session in loaded.values():
        session.close()


class Counted(Session):
    """The same session; counts the rows of each run, and holds runs back on request."""

    def __init__(self, session: Session) -> None:
        self.__dict__.update(vars(session))
        self.rows: list[int] = []
        self.started = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()

    def run(self, feeds: Mapping[str, Any], *arguments: Any) -> Any:
        parts = next(iter(feeds.values()))
        self.rows.append(sum(map(len, parts)))
        self.started.release()
        assert self.gate.wait(60)
        return super().run(feeds, *arguments)


def batched(tmp_path: Path, session: Session, parameters: str) -> Runner:
    file = tmp_path / "batching.config"
    file.write_text(parameters)
    flags = ServerFlags(enable_batching=True, batching_parameters_file=str(file))
    return Batching(flags).wrap(session, tmp_path)


def tensors(session: Session, signature: str = "serving_default") -> tuple[str, list[str]]:
    """The one input and the outputs of a signature."""
    definition = session.meta_graph.signature_def[signature]
    (feed,) = (info.name for info in definition.inputs.values())
    return feed, [info.name for info in definition.outputs.values()]


def results(calls: list[Callable[[], Any]]) -> list[Any]:
    """What calls on threads of their own return or raise."""

    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except SpikelessError as error:
            return error

    with ThreadPoolExecutor(max(len(calls), 1)) as pool:
        return list(pool.map(outcome, calls))


# --- answers --------------------------------------------------------------------------


@st.composite
def _parameters(draw: st.DrawFn) -> str:
    limit = draw(st.integers(1, 12))
    lines = [
        f"max_batch_size {{ value: {limit} }}",
        f"batch_timeout_micros {{ value: {draw(st.sampled_from([0, 500, 3000]))} }}",
        f"num_batch_threads {{ value: {draw(st.integers(1, 4))} }}",
        "max_enqueued_batches { value: 100 }",
    ]
    if draw(st.booleans()):
        sizes = draw(st.sets(st.integers(1, limit)))
        lines.extend(f"allowed_batch_sizes: {size}" for size in sorted(sizes | {limit}))
    if draw(st.booleans()):
        lines.append("enable_large_batch_splitting { value: true }")
        lines.append(f"max_execution_batch_size {{ value: {draw(st.integers(1, limit))} }}")
    return "\n".join(lines)


@settings(max_examples=60)
@given(parameters=_parameters(), sizes=st.lists(st.integers(0, 14), min_size=1, max_size=12))
def test_every_call_gets_its_own_rows(
    sessions: Callable[[str], Session],
    tmp_path_factory: pytest.TempPathFactory,
    parameters: str,
    sizes: list[int],
) -> None:
    """To the bit, whatever runs together with what; too large calls are refused."""
    session = sessions("dtypes")
    runner = batched(tmp_path_factory.mktemp("batching"), session, parameters)
    (feed, fetches), (string_feed, string_fetches) = tensors(session, "float32"), tensors(session, "string")
    limit = int(parameters.split()[3])
    random = np.random.default_rng(0)
    arrays = [random.standard_normal((size, 2)).astype(np.float32) for size in sizes]
    outcomes = results(
        [
            *(functools.partial(runner.run, {feed: array}, fetches) for array in arrays),
            *(
                functools.partial(
                    runner.run, {string_feed: array.astype(bytes).astype(object)}, string_fetches
                )
                for array in arrays
            ),
        ]
    )
    for array, outcome in zip([*arrays, *(a.astype(bytes) for a in arrays)], outcomes, strict=True):
        if len(array) > limit:
            assert isinstance(outcome, InvalidArgument)
        else:
            (output,) = outcome
            assert output.shape == array.shape
            assert output.tolist() == array.tolist()


def test_every_kind_of_request(sessions: Callable[[str], Session], tmp_path: Path) -> None:
    """The same messages as without batching, in fewer runs."""
    counted = Counted(sessions("examples"))
    alone = Model(sessions("examples"), 1)
    together = Model(batched(tmp_path, counted, f"max_batch_size {{ value: 6 }} {NEVER}"), 1)

    def examples(count: int) -> input_pb2.Input:
        made = input_pb2.Input()
        for number in range(count):
            example = made.example_list.examples.add()
            example.features.feature["x"].float_list.value.extend([number, count, 0.5, -1])
        return made

    def head(kind: kinds.Kind, count: int, signature: str) -> Any:
        request = kind.request(input=examples(count))
        request.model_spec.name, request.model_spec.signature_name = "examples", signature
        return kind, request

    def multi(count: int) -> Any:
        request = inference_pb2.MultiInferenceRequest(input=examples(count))
        for method, key in (("classify", "classify"), ("regress", "regress_other")):
            task = request.tasks.add(method_name=f"tensorflow/serving/{method}")
            task.model_spec.name, task.model_spec.signature_name = "examples", key
        return kinds.MULTI_INFERENCE, request

    def predict(count: int) -> Any:
        request = predict_pb2.PredictRequest()
        request.model_spec.name = "examples"
        request.inputs["x"].CopyFrom(to_proto(np.ones([count, 4], np.float32) * count))
        return kinds.PREDICT, request

    for make in (
        predict,
        multi,
        functools.partial(head, kinds.CLASSIFY, signature="classify"),
        functools.partial(head, kinds.REGRESS, signature="regress"),
    ):
        requests = [make(count) for count in (1, 2, 3)]
        counted.rows.clear()
        answers = results([functools.partial(together.answer, *request) for request in requests])
        assert answers == [alone.answer(*request) for request in requests]
        assert counted.rows == [6]


def test_an_output_filter_makes_a_queue_of_its_own(
    sessions: Callable[[str], Session], tmp_path: Path
) -> None:
    counted = Counted(sessions("signatures"))
    model = Model(batched(tmp_path, counted, f"max_batch_size {{ value: 2 }} {NEVER}"), 1)

    def ask(*outputs: str) -> set[str]:
        request = predict_pb2.PredictRequest(output_filter=outputs)
        request.model_spec.name, request.model_spec.signature_name = "signatures", "mixed"
        request.inputs["ids"].CopyFrom(to_proto(np.array([1])))
        request.inputs["name"].CopyFrom(to_proto(np.array([b"a"], object)))
        request.inputs["flag"].CopyFrom(to_proto(np.array([[True]])))
        request.inputs["weight"].CopyFrom(to_proto(np.ones([1, 3])))
        return set(model.predict(request).outputs)

    calls = [lambda: ask("text"), lambda: ask("text", "total"), lambda: ask(), lambda: ask("text")]
    assert results(calls) == [{"text"}, {"text", "total"}, {"text", "total"}, {"text"}]
    assert counted.rows == [2, 2]


def test_answers_are_views_of_the_batch(sessions: Callable[[str], Session], tmp_path: Path) -> None:
    runner = batched(tmp_path, sessions("dtypes"), f"max_batch_size {{ value: 2 }} {NEVER}")
    feed, fetches = tensors(sessions("dtypes"), "float32")
    call = functools.partial(runner.run, {feed: np.ones([1, 2], np.float32)}, fetches)
    (first,), (second,) = results([call, call])
    distance = first.__array_interface__["data"][0] - second.__array_interface__["data"][0]
    assert abs(distance) == first.nbytes


@pytest.mark.parametrize(
    "parameters",
    [
        "max_batch_size { value: 8 } batch_timeout_micros { value: 2000 } num_batch_threads { value: 1 }",
        "max_batch_size { value: 16 } batch_timeout_micros { value: 500 } allowed_batch_sizes: [2, 5, 16] "
        "enable_large_batch_splitting { value: true } max_execution_batch_size { value: 5 }",
        "",
    ],
    ids=["one place", "split", "defaults"],
)
def test_many_calls_of_several_signatures_with_and_without_deadlines(
    sessions: Callable[[str], Session], tmp_path: Path, parameters: str
) -> None:
    """Each is answered right or refused in time; no place or queue is left taken."""
    runner: Any = batched(
        tmp_path, sessions("dtypes"), f"{parameters} max_enqueued_batches {{ value: 1000 }}"
    )

    def calls(seed: int) -> int:
        random = np.random.default_rng(seed)
        answered = 0
        for _ in range(50):
            kind = str(random.choice(["float32", "int32", "int64"]))
            array = random.integers(0, 1000, (random.integers(0, 9), 2)).astype(kind)
            feed, fetches = tensors(sessions("dtypes"), kind)
            timeout = (None, 60.0, 0.001, 0.003)[random.integers(4)]
            try:
                (output,) = runner.run({feed: array}, fetches, timeout)
            except SpikelessError as error:
                assert timeout is not None
                assert timeout < 1
                assert error.code in (Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED)  # noqa: PT017
                continue
            np.testing.assert_array_equal(output, array)
            answered += 1
        return answered

    assert sum(results([functools.partial(calls, seed) for seed in range(16)])) >= 16 * 10
    assert not runner.queues
    with ThreadPoolExecutor(1) as pool:
        feed, fetches = tensors(sessions("dtypes"), "float32")
        assert len(pool.submit(runner.run, {feed: np.ones([1, 2], np.float32)}, fetches).result(60)[0]) == 1


def test_nothing_is_left_of_a_call(sessions: Callable[[str], Session], tmp_path: Path) -> None:
    """Its arrays are freed with it, not when the garbage collector comes by."""
    runner = batched(tmp_path, sessions("signatures"), f"max_batch_size {{ value: 2 }} {NEVER}")
    feed, fetches = tensors(sessions("signatures"), "gather")
    arrays: list[weakref.ref[Any]] = []

    def call(count: int, number: int, timeout: float | None = None) -> str:
        ids = np.full(count, number, np.int32)
        arrays.append(weakref.ref(ids))
        try:
            return str(runner.run({feed: ids}, fetches, timeout)[0].tolist())
        except SpikelessError as error:
            return str(error)

    gc.collect()
    gc.disable()
    try:
        assert call(2, 1) == "[1.0, 1.0]"
        assert "larger than maximum" in call(3, 1)
        assert "timeout exceeded" in call(1, 1, 0.01)
        assert "is not in" in call(2, 99)
        assert results([lambda: call(1, 1), lambda: call(1, 2)]) == ["[1.0]", "[2.0]"]
        assert all("is not in" in text for text in results([lambda: call(1, 1), lambda: call(1, 99)]))
        assert len(arrays) == 8
        assert [reference() is None for reference in arrays] == [True] * 8
    finally:
        gc.enable()


# --- which calls run together, and when -----------------------------------------------


def test_what_comes_while_others_run_is_one_batch(sessions: Callable[[str], Session], tmp_path: Path) -> None:
    """Without a timeout, what finds no place waits for one together."""
    counted = Counted(sessions("dtypes"))
    runner = batched(tmp_path, counted, "num_batch_threads { value: 1 }")
    feed, fetches = tensors(counted, "float32")
    call = functools.partial(runner.run, {feed: np.ones([1, 2], np.float32)}, fetches)
    counted.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(call)
        assert counted.started.acquire(timeout=60)
        with waiting(runner, 7):
            others = [pool.submit(call) for _ in range(7)]
        counted.gate.set()
        assert all(len(future.result()[0]) == 1 for future in [first, *others])
    assert counted.rows == [1, 7]


@contextmanager
def waiting(runner: Any, rows: int, over: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """After the block, wait until so many rows are in the queues, or it is over."""
    yield

    def queued() -> int:
        return sum(batch.size for queue in list(runner.queues.values()) for batch in queue.batches)

    deadline = threading.Event()
    timer = threading.Timer(60, deadline.set)
    timer.start()
    while queued() != rows and not over():
        assert not deadline.wait(0.001), "the calls do not come"
    timer.cancel()


def test_two_queues_take_turns(sessions: Callable[[str], Session], tmp_path: Path) -> None:
    """A queue with many batches keeps no other from its place."""
    counted = Counted(sessions("dtypes"))
    parameters = (
        "num_batch_threads { value: 1 } max_batch_size { value: 1 } max_enqueued_batches { value: 9 }"
    )
    runner = batched(tmp_path, counted, parameters)
    feeds = {name: tensors(counted, name) for name in ("float32", "int32")}
    order: list[str] = []

    def call(name: str) -> None:
        feed, fetches = feeds[name]
        runner.run({feed: np.ones([1, 2], name)}, fetches)

    original = counted.run

    def run(given: Mapping[str, Any], *arguments: Any) -> Any:
        order.append(next(name for name, (feed, _) in feeds.items() if feed in given))
        return original(given, *arguments)

    counted.run = run  # type: ignore[method-assign, assignment]
    counted.gate.clear()
    with ThreadPoolExecutor(7) as pool:
        pool.submit(call, "float32")
        assert counted.started.acquire(timeout=60)
        with waiting(runner, 4):
            futures = [pool.submit(call, "float32") for _ in range(4)]
        with waiting(runner, 6):
            futures += [pool.submit(call, "int32") for _ in range(2)]
        counted.gate.set()
        for future in futures:
            future.result()
    assert order[:5] in (
        ["float32", "float32", "int32", "float32", "int32"],
        ["float32", "int32", "float32", "int32", "float32"],
    )


def test_as_many_batches_run_at_once_as_there_are_places(
    sessions: Callable[[str], Session], tmp_path: Path
) -> None:
    counted = Counted(sessions("dtypes"))
    runner = batched(tmp_path, counted, "num_batch_threads { value: 2 } max_batch_size { value: 1 }")
    feed, fetches = tensors(counted, "float32")
    counted.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        with waiting(runner, 1):
            for _ in range(3):
                pool.submit(runner.run, {feed: np.ones([1, 2], np.float32)}, fetches)
            assert counted.started.acquire(timeout=60)
            assert counted.started.acquire(timeout=60)
        assert len(counted.rows) == 2
        counted.gate.set()
    assert counted.rows == [1, 1, 1]


def test_a_call_that_runs_out_of_time_in_the_queue(
    sessions: Callable[[str], Session], tmp_path: Path
) -> None:
    """Its rows leave with it, and another call looks after the batch."""
    counted = Counted(sessions("dtypes"))
    runner = batched(tmp_path, counted, f"max_batch_size {{ value: 2 }} {NEVER}")
    feed, fetches = tensors(counted, "float32")

    def call(number: float, timeout: float | None = None) -> Any:
        return runner.run({feed: np.full([1, 2], number, np.float32)}, fetches, timeout)[0].tolist()

    with pytest.raises(
        ResourceExhausted, match=r"^Run\(\) timeout exceeded while waiting in batching queue$"
    ):
        call(1, timeout=0.01)
    assert not counted.rows
    assert results([lambda: call(2), lambda: call(3)]) == [[[2, 2]], [[3, 3]]]
    assert counted.rows == [2]


def test_the_first_call_of_a_batch_leaves_and_the_timeout_holds_for_the_next(
    sessions: Callable[[str], Session], tmp_path: Path
) -> None:
    counted = Counted(sessions("dtypes"))
    runner = batched(tmp_path, counted, "max_batch_size { value: 3 } batch_timeout_micros { value: 500000 }")
    feed, fetches = tensors(counted, "float32")
    rows = {feed: np.ones([1, 2], np.float32)}
    with ThreadPoolExecutor(2) as pool:
        with waiting(runner, 1, lambda: first.done()):
            first = pool.submit(runner.run, rows, fetches, 0.3)
        second = pool.submit(runner.run, rows, fetches)
        assert len(second.result(60)[0]) == 1
    # On a slow machine the first call may have left before the second came, or the
    # batch may have run before it left.
    assert counted.rows in ([1], [2])
    assert (counted.rows == [1]) == isinstance(first.exception(), ResourceExhausted)


def test_a_call_that_runs_out_of_time_while_its_batch_runs(
    sessions: Callable[[str], Session], tmp_path: Path
) -> None:
    """It is told at once; the batch goes on for the others."""
    counted = Counted(sessions("dtypes"))
    runner = batched(tmp_path, counted, f"max_batch_size {{ value: 2 }} {NEVER}")
    feed, fetches = tensors(counted, "float32")
    rows = {feed: np.ones([1, 2], np.float32)}
    counted.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        with waiting(runner, 1):
            patient = pool.submit(runner.run, rows, fetches)
        impatient = pool.submit(runner.run, rows, fetches, 0.5)
        assert counted.started.acquire(timeout=60)
        assert isinstance(impatient.exception(60), DeadlineExceeded)
        counted.gate.set()
        assert len(patient.result(60)[0]) == 1
    assert counted.rows == [2]


def test_the_batch_has_the_time_of_its_last_call(sessions: Callable[[str], Session], tmp_path: Path) -> None:
    counted = Counted(sessions("dtypes"))
    times: list[float | None] = []
    original = counted.run

    def run(feeds: Any, fetches: Any, timeout: float | None, pool: Any) -> Any:
        times.append(timeout)
        return original(feeds, fetches, timeout, pool)

    counted.run = run  # type: ignore[method-assign]
    runner = batched(tmp_path, counted, f"max_batch_size {{ value: 2 }} {NEVER}")
    feed, fetches = tensors(counted, "float32")
    rows = {feed: np.ones([1, 2], np.float32)}
    results([functools.partial(runner.run, rows, fetches, timeout) for timeout in (300.0, 600.0)])
    results([functools.partial(runner.run, rows, fetches, timeout) for timeout in (300.0, None)])
    first, second = times
    assert first is not None
    assert 300 < first <= 600
    assert second is None


def test_an_unforeseen_error_is_every_call_s_too(
    sessions: Callable[[str], Session], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counted = Counted(sessions("dtypes"))

    def run(*_: Any) -> Any:
        raise MemoryError("no memory for a tensor")

    original, counted.run = counted.run, run  # type: ignore[method-assign, assignment]
    runner = batched(tmp_path, counted, f"max_batch_size {{ value: 2 }} {NEVER}")
    feed, fetches = tensors(counted, "float32")

    def call() -> str:
        with pytest.raises(MemoryError, match="no memory for a tensor") as caught:
            runner.run({feed: np.ones([1, 2], np.float32)}, fetches)
        return str(caught.value)

    assert results([call, call]) == ["no memory for a tensor"] * 2
    assert "a batch failed" in caplog.text
    counted.run = original  # type: ignore[method-assign]
    assert len(runner.run({feed: np.ones([2, 2], np.float32)}, fetches)[0]) == 2


def test_types_that_differ(sessions: Callable[[str], Session], tmp_path: Path) -> None:
    runner = batched(tmp_path, sessions("dtypes"), f"max_batch_size {{ value: 2 }} {NEVER}")
    feed, fetches = tensors(sessions("dtypes"), "float32")
    outcomes = results(
        [functools.partial(runner.run, {feed: np.ones([1, 2], kind)}, fetches) for kind in ("f4", "i4")]
    )
    assert {type(outcome).__name__ for outcome in outcomes} == {"Internal"}
    assert "Cannot concatenate tensors that have different data types" in str(outcomes[0])


@pytest.mark.parametrize("kind", ["float32", "string", "bool", "complex128"])
def test_padding_of_inputs_of_other_shapes(
    sessions: Callable[[str], Session], tmp_path: Path, kind: str
) -> None:
    """Each is filled up with its own first value."""
    parameters = f"max_batch_size {{ value: 3 }} pad_variable_length_inputs: true {NEVER}"
    runner = batched(tmp_path, sessions("dtypes"), parameters)
    feed, fetches = tensors(sessions("dtypes"), kind)
    given = [np.array([[1, 0]]), np.array([[1, 0, 1, 1], [0, 1, 1, 1]])]
    if kind == "string":
        arrays = [array.astype(bytes).astype(object) for array in given]
    else:
        arrays = [array.astype(kind) for array in given]
    outcomes = results([functools.partial(runner.run, {feed: array}, fetches) for array in arrays])
    first, second = (outcome[0].tolist() for outcome in outcomes)
    one, zero = arrays[0][0].tolist()
    assert first == [[one, zero, one, one]]
    assert second == arrays[1].tolist()


def test_ranks_that_differ_or_that_cannot_be_padded(
    sessions: Callable[[str], Session], tmp_path: Path
) -> None:
    parameters = f"max_batch_size {{ value: 2 }} pad_variable_length_inputs: true {NEVER}"
    runner = batched(tmp_path, sessions("signatures"), parameters)
    feed, fetches = tensors(sessions("signatures"), "any_rank")

    def call(*shape: int) -> Callable[[], Any]:
        return functools.partial(runner.run, {feed: np.ones(shape, np.float32)}, fetches)

    outcomes = results([call(1, 2), call(1, 2, 3)])
    assert [type(outcome) for outcome in outcomes] == [FailedPrecondition] * 2
    with pytest.raises(InvalidArgument, match="Only tensors with rank from 1 to 6 can be padded"):
        call(2, 1, 1, 1, 1, 1, 1)()


# --- parameters and warmup ------------------------------------------------------------


def test_all_fields_and_their_defaults(tmp_path: Path) -> None:
    file = tmp_path / "batching.config"
    file.write_text("")
    assert Parameters.read(file) == Parameters()
    file.write_text(
        """
        max_batch_size { value: 64 }
        batch_timeout_micros { value: 1500 }
        max_enqueued_batches { value: 7 }
        num_batch_threads { value: 3 }
        thread_pool_name { value: "my_threads" }
        allowed_batch_sizes: 16
        allowed_batch_sizes: 64
        pad_variable_length_inputs: true
        enable_large_batch_splitting { value: true }
        max_execution_batch_size { value: 16 }
        """
    )
    assert Parameters.read(file) == Parameters(64, 1500, 7, 3, (16, 64), True, True, 16)
    file.write_text("max_batch_size { value: 64 } enable_large_batch_splitting { value: true }")
    assert Parameters.read(file).limit == 64


def test_a_server_does_not_start_with(tmp_path: Path) -> None:
    file = tmp_path / "batching.config"
    with pytest.raises(InvalidArgument, match="is of no use without --enable_batching"):
        ServerFlags(batching_parameters_file=str(file))
    flags = ServerFlags(enable_batching=True, batching_parameters_file=str(file))
    with pytest.raises(NotFound, match="cannot read"):
        ModelLoader(flags)
    file.write_text("num_batch_threads { value: 0 }")
    with pytest.raises(InvalidArgument, match="num_batch_threads must be positive; was 0"):
        ModelLoader(flags)


def test_sizes_that_are_never_used_are_named(caplog: pytest.LogCaptureFixture) -> None:
    parameters = Parameters(max_batch_size=8, allowed_batch_sizes=(4, 2, 8)).checked()
    assert [parameters.padded(size) for size in (0, 1, 3, 5, 8)] == [0, 4, 4, 8, 8]
    assert "of [4, 2, 8], some are never used" in caplog.text


@pytest.mark.parametrize(("limit", "runs"), [(8, [4, 2, 4, 8, 4]), (4, [4, 2, 4, 4])])
def test_what_warmup_runs(
    sessions: Callable[[str], Session], tmp_path: Path, limit: int, runs: list[int]
) -> None:
    """Every size that a batch can have, once; nothing waits, although none is full."""
    counted = Counted(sessions("dtypes"))
    parameters = (
        f"max_batch_size {{ value: 8 }} allowed_batch_sizes: [2, 4, 8] {NEVER} "
        f"enable_large_batch_splitting {{ value: true }} max_execution_batch_size {{ value: {limit} }}"
    )
    runner = warming(batched(tmp_path, counted, parameters))
    feed, fetches = tensors(counted, "float32")
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    for _ in range(2):
        assert runner.run({feed: rows}, fetches)[0].tolist() == rows.tolist()
    assert counted.rows == runs
