"""Server-side batching: which calls run together, what they get, what is refused.

A batch that is full runs at once, however long the timeout is: with one of ten minutes
the tests know what runs together, on the slowest machine.
"""

from __future__ import annotations

import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import IS_EMBEDDED, Running, ServerFactory, in_progress, model_config, put_version, refused
from prometheus_client.parser import text_string_to_metric_families

from spikeless import warmup
from spikeless.client import Client
from spikeless.errors import Code, SpikelessError
from spikeless.formats import tfrecord
from spikeless.formats.protos import example_pb2, inference_pb2, prediction_log_pb2, regression_pb2
from spikeless.formats.states import State
from spikeless.formats.tensors import to_proto

NEVER = "batch_timeout_micros { value: 600000000 }"
MODELS = ("signatures", "examples", "dtypes")
METRICS = ":tensorflow:serving:batching_session:"


class Server:
    """A server that batches, and how often a session of it has run."""

    def __init__(self, running: Running, client: Client) -> None:
        self.running = running
        self.client = client

    def samples(self) -> dict[tuple[str, str], float]:
        """What Prometheus reads of batches, by name and labels."""
        with urllib.request.urlopen(f"{self.running.rest_url}/monitoring/prometheus/metrics") as response:
            text = response.read().decode()
        return {
            (
                # The parser gives counters an ending that they do not have.
                re.sub("_total$", "", sample.name).removeprefix(METRICS),
                ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items())),
            ): float(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith(METRICS)
        }

    @property
    def runs(self) -> float:
        return self.samples().get(("wrapped_run_count", ""), 0.0)


Batched = Callable[..., AbstractContextManager[Server]]


@pytest.fixture
def batched(serve: ServerFactory, saved_models: Path, tmp_path: Path) -> Batched:
    """``with batched(parameters) as server``: MODELS, by these BatchingParameters."""

    @contextmanager
    def start(parameters: str = "", *flags: str, prepare: Callable[[Path], Any] = str) -> Iterator[Server]:
        for name in MODELS:
            if not (tmp_path / "models" / name).exists():
                put_version(saved_models / name, tmp_path / "models" / name, 1)
        prepare(tmp_path / "models")
        config = tmp_path / "models.config"
        config.write_text(str(model_config(*((name, tmp_path / "models" / name) for name in MODELS))))
        monitoring = tmp_path / "monitoring.config"
        monitoring.write_text('prometheus_config { enable: true path: "/monitoring/prometheus/metrics" }')
        file = tmp_path / "batching.config"
        file.write_text(parameters)
        with serve(
            f"--model_config_file={config}",
            f"--monitoring_config_file={monitoring}",
            "--grpc_max_threads=64",
            "--enable_batching",
            *([f"--batching_parameters_file={file}"] if parameters else []),
            *flags,
            rest=True,
            wait_for=MODELS,
        ) as running:
            for name in MODELS:
                running.wait(name, {1: State.AVAILABLE})
            # Calls wait for others, on a slow machine for long.
            with Client(running.server.target, timeout=120.0) as client:
                yield Server(running, client)

    return start


def rows(*numbers: float) -> np.ndarray[Any, Any]:
    """For the default signature of ``signatures``: each number four times."""
    return np.repeat(np.array(numbers, np.float32)[:, None], 4, 1)


def scores(*numbers: float) -> list[list[float]]:
    return [[12 * number, 16 * number] for number in numbers]


def score(server: Server, *numbers: float) -> list[list[float]]:
    answer: list[list[float]] = server.client.predict("signatures", {"x": rows(*numbers)})["scores"].tolist()
    return answer


def at_once(*calls: Callable[[], Any]) -> list[Future[Any]]:
    """All of them in progress together; their results."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [pool.submit(call) for call in calls]


def refuses(future: Future[Any], code: Code, message: str) -> None:
    with refused(code, message):
        future.result()


def test_calls_run_together(batched: Batched) -> None:
    with batched(f"max_batch_size {{ value: 8 }} {NEVER}") as server:
        for _ in range(5):
            before = server.runs
            futures = at_once(*(lambda n=n: score(server, n) for n in range(8)))
            assert [future.result() for future in futures] == [scores(n) for n in range(8)]
            assert server.runs - before == 1
        # Of different sizes as well.
        sizes = [(1.0, 2.0, 3.0), (4.0,), (5.0, 6.0, 7.0, 8.0)]
        futures = at_once(*(lambda numbers=numbers: score(server, *numbers) for numbers in sizes))
        assert [future.result() for future in futures] == [scores(*numbers) for numbers in sizes]


def test_a_queue_for_each_signature(batched: Batched) -> None:
    """The tensors that are fed and fetched make the queue, not the signature's name."""

    def example(*numbers: float) -> example_pb2.Example:
        made = example_pb2.Example()
        made.features.feature["x"].float_list.value.extend(numbers)
        return made

    def regress(client: Client, number: float) -> list[float]:
        request = regression_pb2.RegressionRequest()
        request.model_spec.name, request.model_spec.signature_name = "examples", "regress"
        request.input.example_list.examples.append(example(number, 0, 0, 0))
        response = client.call(client.prediction.Regress, request)
        return [row.value for row in response.result.regressions]

    def infer(client: Client, number: float) -> list[float]:
        request = inference_pb2.MultiInferenceRequest()
        request.input.example_list.examples.append(example(number, 0, 0, 0))
        for key in ("regress", "regress_other"):
            task = request.tasks.add(method_name="tensorflow/serving/regress")
            task.model_spec.name, task.model_spec.signature_name = "examples", key
        response = client.call(client.prediction.MultiInference, request)
        return [row.value for result in response.results for row in result.regression_result.regressions]

    with batched(f"max_batch_size {{ value: 2 }} {NEVER}") as server:
        before = server.runs
        futures = at_once(
            *(lambda n=n: regress(server.client, n) for n in (1.0, 2.0)),
            *(lambda n=n: infer(server.client, n) for n in (3.0, 4.0)),
            *(lambda n=n: score(server, n) for n in (5.0, 6.0)),
        )
        assert [future.result() for future in futures] == [
            *([1.0], [2.0], [3.0, 3.0], [4.0, 4.0]),
            *(scores(5), scores(6)),
        ]
        assert server.runs - before == 3


def test_a_call_that_is_alone_waits_until_the_timeout(batched: Batched) -> None:
    with batched("max_batch_size { value: 8 } batch_timeout_micros { value: 2000 }") as server:
        assert score(server, 1, 2) == scores(1, 2)
    with batched() as server:
        assert score(server, 1, 2) == scores(1, 2)


def test_batches_are_padded_to_allowed_sizes(batched: Batched) -> None:
    with batched("max_batch_size { value: 8 } allowed_batch_sizes: [2, 4, 8]") as server:
        before = server.samples()
        for count in (1, 3, 4, 5):
            assert score(server, *range(count)) == scores(*range(count))
        after = server.samples()

    def grown(name: str, labels: str = "") -> float:
        return after[name, labels] - before.get((name, labels), 0)

    assert grown("wrapped_run_count") == 4
    assert grown("input_batch_size_count") == 4
    assert grown("input_batch_size_sum") == 13
    assert grown("processed_batch_size_sum") == 2 + 4 + 4 + 8
    assert grown("padding_size_sum", "execution_batch_size=2") == 1
    assert grown("padding_size_sum", "execution_batch_size=4") == 1
    assert grown("padding_size_count", "execution_batch_size=4") == 2
    assert grown("padding_size_bucket", "execution_batch_size=8,le=4") == 1
    assert grown("padding_size_bucket", "execution_batch_size=8,le=2") == 0
    assert grown("queuing_latency_count", "thread_pool_name=") == 4
    # The same bounds.
    assert {labels for name, labels in after if name == "processed_batch_size_bucket"} == {
        *(f"le={2**power}" for power in range(14)),
        "le=+Inf",
    }
    bounds = {labels for name, labels in after if name == "queuing_latency_bucket"}
    assert {f"le={bound},thread_pool_name=" for bound in ("100", "120", "144", "172.8")} < bounds
    assert len(bounds) == 53


def test_strings_and_every_other_type_are_batched(batched: Batched) -> None:
    values: dict[str, Any] = {
        "string": np.array([[b"a", b"bc"], [b"", b"d\0e"]], object),
        "bool": np.array([[True, False], [False, True]]),
        "complex64": np.array([[1j, 2], [3, 4j]], np.complex64),
        "uint8": np.array([[1, 2], [3, 255]], np.uint8),
        "float16": np.array([[1, 2], [3, 4.5]], np.float16),
    }
    with batched(f"max_batch_size {{ value: 4 }} {NEVER}") as server:
        for signature, value in values.items():
            call = lambda: server.client.predict("dtypes", {"x": value}, signature=signature)["y"]  # noqa: B023, E731
            for future in at_once(call, call):
                np.testing.assert_array_equal(future.result(), value)


# --- what is refused ------------------------------------------------------------------


def test_calls_that_cannot_be_batched(batched: Batched) -> None:
    with batched("max_batch_size { value: 4 }") as server:
        predict = server.client.predict
        with refused(
            Code.INVALID_ARGUMENT, "^Batching Run\\(\\) input tensors must have at least one dimension$"
        ):
            predict("signatures", {"x": np.ones(2, np.float32), "rate": np.float32(2)}, signature="scaled")
        with refused(
            Code.INVALID_ARGUMENT, "^Batching Run\\(\\) input tensors must have equal 0th-dimension size$"
        ):
            predict(
                "signatures",
                {
                    "ids": np.array([1, 2]),
                    "name": np.array([b"a"], object),
                    "flag": np.array([[True], [True]]),
                    "weight": np.ones([2, 3]),
                },
                signature="mixed",
            )
        with refused(Code.FAILED_PRECONDITION, "^Batched output tensor has 0 dimensions$"):
            predict("signatures", {"x": np.ones([2, 3], np.float32)}, signature="fixed")
        with refused(Code.INVALID_ARGUMENT, "^Task size 5 is larger than maximum input batch size 4$"):
            score(server, *range(5))
        assert score(server, *range(4)) == scores(*range(4))


def test_calls_without_rows(embedded: None, batched: Batched) -> None:
    for parameters in ("max_batch_size { value: 4 }", "max_batch_size { value: 4 } allowed_batch_sizes: 4"):
        with batched(parameters) as server:
            assert server.client.predict("signatures", {"x": rows()})["scores"].shape == (0, 2)
            assert score(server, 1) == scores(1)


def test_the_queue_is_full(batched: Batched) -> None:
    parameters = f"max_batch_size {{ value: 2 }} max_enqueued_batches {{ value: 1 }} {NEVER}"
    with batched(parameters) as server, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(score, server, 1.0)
        errors: list[SpikelessError] = []

        def is_full() -> bool:
            """Two rows run at once, unless one row is waiting."""
            try:
                score(server, 3, 4)
            except SpikelessError as error:
                errors.append(error)
            return bool(errors)

        server.running.server.wait_for(is_full, "the queue to be full", timeout=60.0)
        assert errors[0].code is Code.UNAVAILABLE
        assert str(errors[0]).endswith(
            ": The batch scheduling queue to which this task was submitted is full; currently 1 batches "
            "enqueued and max_enqueued_batches is 1"
        )
        assert score(server, 2) == scores(2)
        assert waiting.result() == scores(1)


def test_an_error_is_that_of_every_call_in_the_batch(batched: Batched) -> None:
    with batched(f"max_batch_size {{ value: 2 }} {NEVER}") as server:

        def gather(*ids: int) -> Any:
            return server.client.predict("signatures", {"ids": np.array(ids, np.int32)}, signature="gather")[
                "values"
            ]

        for future in at_once(lambda: gather(99), lambda: gather(1)):
            refuses(future, Code.INVALID_ARGUMENT, r"indices\[\d\] = 99 is not in \[0, 10\)")
        assert gather(3, 4).tolist() == [3, 4]


def test_shapes_that_differ(batched: Batched) -> None:
    def length(server: Server, *shape: int) -> Any:
        tokens = np.ones(shape, np.int32)
        return server.client.predict("signatures", {"tokens": tokens}, signature="sequence")["length"]

    parameters = f"max_batch_size {{ value: 2 }} {NEVER}"
    with batched(parameters) as server:
        for future in at_once(lambda: length(server, 1, 2), lambda: length(server, 1, 3)):
            refuses(
                future,
                Code.FAILED_PRECONDITION,
                "^Tensors with name 'sequence_tokens:0' from different tasks have different shapes and "
                "padding is turned off. Set pad_variable_length_inputs to true, or ensure that all tensors "
                "with the same name have equal dimensions starting with the first dim.$",
            )
    with batched(f"{parameters} pad_variable_length_inputs: true") as server:
        futures = at_once(lambda: length(server, 1, 2), lambda: length(server, 1, 3))
        # The padding counts: what a model makes of it is the model's.
        assert [future.result().tolist() for future in futures] == [[3], [3]]
        for future in at_once(lambda: length(server, 1, 0), lambda: length(server, 1, 3)):
            refuses(future, Code.INVALID_ARGUMENT, "^Got empty tensor in batch of non-empty tensors.$")


# --- large calls ----------------------------------------------------------------------


def test_large_calls_are_split(batched: Batched) -> None:
    parameters = (
        "max_batch_size { value: 10 } enable_large_batch_splitting { value: true } "
        "max_execution_batch_size { value: 4 }"
    )
    with batched(parameters) as server:
        before = server.runs
        assert score(server, *range(10)) == scores(*range(10))
        assert server.runs - before == 3
        with refused(Code.INVALID_ARGUMENT, "^Task size 11 is larger than maximum input batch size 10$"):
            score(server, *range(11))
    with (
        batched(f"{parameters} max_enqueued_batches {{ value: 2 }}") as server,
        refused(
            Code.UNAVAILABLE,
            "The batch scheduling queue to which this task was submitted is full; task size is 9 but "
            r"scheduling capacity is only 8 \(num_enqueued_batches=1, max_enqueued_batches=2, "
            r"open_batch_size=0, max_execution_batch_size=4\)$",
        ),
    ):
        score(server, *range(9))


# --- what a server starts with --------------------------------------------------------


def test_parameters_of_a_version(batched: Batched) -> None:
    """Versions without the file are not batched."""

    def prepare(models: Path) -> None:
        file = models / "signatures" / "1" / "batching_params.pbtxt"
        file.write_text("max_batch_size { value: 2 } allowed_batch_sizes: 2")

    with batched(
        "max_batch_size { value: 1 }", "--enable_per_model_batching_parameters", prepare=prepare
    ) as server:
        before = server.samples()
        assert score(server, 1) == scores(1)
        after = server.samples()
        assert after["wrapped_run_count", ""] - before.get(("wrapped_run_count", ""), 0) == 1
        assert after["padding_size_sum", "execution_batch_size=2"] == 1
        with refused(Code.INVALID_ARGUMENT, "^Task size 3 is larger than maximum input batch size 2$"):
            score(server, 1, 2, 3)
        answer = server.client.predict("dtypes", {"x": np.ones([5, 2], np.float32)}, signature="float32")["y"]
        assert answer.shape == (5, 2)
        assert server.runs == after["wrapped_run_count", ""]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            "max_batch_size { value: 8 } allowed_batch_sizes: [2, 4]",
            "Last entry in allowed_batch_sizes must match max_batch_size; last entry was 4; expected 8",
        ),
        (
            "allowed_batch_sizes: [8]",
            "Last entry in allowed_batch_sizes must match max_batch_size; last entry was 8; expected 1000",
        ),
        ("max_batch { value: 8 }", "Invalid protobuf file"),
    ],
    ids=["last allowed", "default", "no field"],
)
def test_parameters_that_fail_a_version(
    serve: ServerFactory, saved_models: Path, tmp_path: Path, parameters: str, message: str
) -> None:
    fails_a_version(serve, saved_models, tmp_path, parameters, message)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("max_batch_size { value: 0 }", "input_batch_size_limit must be positive; was 0"),
        ("batch_timeout_micros { value: -1 }", "batch_timeout_micros must be non-negative; was -1"),
        (
            "enable_large_batch_splitting { value: true } max_batch_size { value: 8 } "
            "max_execution_batch_size { value: 9 }",
            "When enable_large_batch_splitting is true, input_batch_size_limit must be greater than or equal "
            "to max_execution_batch_size",
        ),
    ],
    ids=["no rows", "timeout", "execution"],
)
def test_parameters_of_queues_that_make_no_sense(
    embedded: None, serve: ServerFactory, saved_models: Path, tmp_path: Path, parameters: str, message: str
) -> None:
    fails_a_version(serve, saved_models, tmp_path, parameters, message)


def fails_a_version(
    serve: ServerFactory, saved_models: Path, tmp_path: Path, parameters: str, message: str
) -> None:
    """A version with these parameters is not loaded, and the one before it is kept."""
    good = put_version(saved_models / "signatures", tmp_path / "good", 1)
    bad = put_version(saved_models / "signatures", tmp_path / "bad", 1)
    (good / "batching_params.pbtxt").write_text("max_batch_size { value: 8 }")
    config = tmp_path / "models.config"
    config.write_text(str(model_config(("good", tmp_path / "good"), ("bad", tmp_path / "bad"))))
    with serve(
        f"--model_config_file={config}",
        "--enable_batching",
        "--enable_per_model_batching_parameters",
        "--max_num_load_retries=0",
        wait_for=("good", "bad"),
    ) as running:
        (bad / "batching_params.pbtxt").write_text(parameters)
        put_version(bad, tmp_path / "bad", 2)

        def failed() -> bool:
            status = {status.version: status for status in running.client.statuses("bad")}.get(2)
            return status is not None and status.state is State.END

        running.server.wait_for(failed, "version 2 to fail", timeout=60.0)
        status = {status.version: status for status in running.client.statuses("bad")}[2]
        assert status.error is not None
        assert status.error.code is Code.INVALID_ARGUMENT
        assert message in str(status.error)
        assert running.client.predict("bad", {"x": rows(1)})["scores"].tolist() == scores(1)


# --- warmup ---------------------------------------------------------------------------


def test_every_allowed_size_is_warm(embedded: None, batched: Batched) -> None:
    """Each size runs once for the shapes of the records, and no record waits."""

    def prepare(models: Path) -> None:
        logs = []
        for count in (1, 1, 3):
            log = prediction_log_pb2.PredictionLog()
            log.predict_log.request.inputs["x"].CopyFrom(to_proto(rows(*range(count))))
            logs.append(log.SerializeToString())
        file = warmup.warmup_file(models / "signatures" / "1")
        file.parent.mkdir(exist_ok=True)
        tfrecord.write(file, logs)

    parameters = f"max_batch_size {{ value: 8 }} allowed_batch_sizes: [1, 2, 4, 8] {NEVER}"
    with batched(parameters, prepare=prepare) as server:
        samples = server.samples()
        assert samples["wrapped_run_count", ""] == 3 + 4
        assert samples["processed_batch_size_sum", ""] == (1 + 1 + 4) + (1 + 2 + 4 + 8)


def test_a_version_is_unloaded_after_the_calls_that_wait(batched: Batched, tmp_path: Path) -> None:
    """A call in a queue gets its answer from the version that it asked."""
    parameters = "max_batch_size { value: 8 } batch_timeout_micros { value: 3000000 }"
    with batched(parameters) as server, ThreadPoolExecutor(1) as pool:
        server.running.wait("signatures", {1: State.AVAILABLE})
        call = pool.submit(server.client.predict, "signatures", {"x": rows(1)}, version=1)
        if IS_EMBEDDED:  # The other has no such metric.
            address = server.running.rest_url.removeprefix("http://")
            server.running.server.wait_for(
                lambda: in_progress(address).get("GRPC") == 1 or call.done(), "the call to wait"
            )
        (tmp_path / "models" / "signatures" / "1").rename(tmp_path / "gone")
        shutil.copytree(tmp_path / "gone", tmp_path / "staged")
        (tmp_path / "staged").rename(tmp_path / "models" / "signatures" / "2")
        server.running.wait("signatures", {2: State.AVAILABLE})
        assert call.result()["scores"].tolist() == scores(1)
