"""Replaying a warmup file into a real model, by TensorFlow Serving's rules."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from spikeless.engine.flags import ServerFlags
from spikeless.engine.loader import ModelLoader
from spikeless.errors import Code, DataLoss, InvalidArgument
from spikeless.formats import tfrecord
from spikeless.formats.kinds import Kind
from spikeless.formats.protos import example_pb2, input_pb2, prediction_log_pb2
from spikeless.formats.savedmodel import CLASSIFY_METHOD, REGRESS_METHOD
from spikeless.formats.tensors import to_proto
from spikeless.runtime import Session
from spikeless.runtime.model import Model
from spikeless.warmup import WarmupError, replay, warmup_file

Log: TypeAlias = prediction_log_pb2.PredictionLog


@pytest.fixture(scope="module")
def model(saved_models: Path) -> Iterator[Model]:
    with Session.load(saved_models / "signatures") as session:
        yield Model(session)


@pytest.fixture(scope="module")
def examples_model(saved_models: Path) -> Iterator[Model]:
    with Session.load(saved_models / "examples") as session:
        yield Model(session)


class Counting:
    """A model that counts the requests on their way to it, by kind."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.calls: list[str] = []

    def answer(self, kind: Kind, request: Any) -> Any:
        self.calls.append(kind.name)
        return self.model.answer(kind, request)


def predict_log(signature: str = "serving_default", name: str = "any", **inputs: Any) -> Log:
    log = prediction_log_pb2.PredictionLog()
    request = log.predict_log.request
    request.model_spec.name, request.model_spec.signature_name = name, signature
    for alias, value in (inputs or {"x": np.ones([1, 4], np.float32)}).items():
        request.inputs[alias].CopyFrom(to_proto(value))
    return log


def examples(count: int = 1) -> input_pb2.Input:
    example = example_pb2.Example()
    example.features.feature["x"].float_list.value.extend([1, 2, 3, 4])
    return input_pb2.Input(example_list=input_pb2.ExampleList(examples=[example] * count))


def write(tmp_path: Path, *logs: Log) -> Path:
    path = tmp_path / "warmup"
    tfrecord.write(path, [log.SerializeToString() for log in logs])
    return path


def test_where_a_server_looks(tmp_path: Path) -> None:
    assert warmup_file(tmp_path) == tmp_path / "assets.extra" / "tf_serving_warmup_requests"


def test_no_file_is_fine(model: Model, tmp_path: Path) -> None:
    assert replay(model, tmp_path / "none") == 0


def test_every_replayed_kind(examples_model: Model, tmp_path: Path) -> None:
    predict = predict_log(x=np.ones([2, 4], np.float32))
    classify, regress, multi = (prediction_log_pb2.PredictionLog() for _ in range(3))
    for request, key in (
        (classify.classify_log.request, "classify"),
        (regress.regress_log.request, "regress"),
    ):
        request.model_spec.signature_name = key
        request.input.CopyFrom(examples())
    request = multi.multi_inference_log.request
    request.input.CopyFrom(examples(2))
    for key, method in (("classify", CLASSIFY_METHOD), ("regress", REGRESS_METHOD)):
        task = request.tasks.add(method_name=method)
        task.model_spec.name, task.model_spec.signature_name = "any", key
    path = write(tmp_path, predict, classify, regress, multi)
    counting = Counting(examples_model)
    assert replay(counting, path, request_iterations=2) == 4
    assert counting.calls == [
        kind for kind in ("Predict", "Classify", "Regress", "MultiInference") for _ in range(2)
    ]


def test_a_record_without_a_request_counts_and_does_nothing(model: Model, tmp_path: Path) -> None:
    counting = Counting(model)
    assert replay(counting, write(tmp_path, prediction_log_pb2.PredictionLog(), predict_log())) == 2
    assert counting.calls == ["Predict"]


@pytest.mark.parametrize("field", ["session_run_log", "predict_streamed_log"])
def test_kinds_that_no_server_replays(model: Model, tmp_path: Path, field: str) -> None:
    log = prediction_log_pb2.PredictionLog()
    getattr(log, field).SetInParent()
    with pytest.raises(
        WarmupError, match=f"record 2 of .*: Unsupported log_type for warmup: {field}"
    ) as info:
        replay(model, write(tmp_path, predict_log(), log))
    assert info.value.code is Code.UNIMPLEMENTED
    assert info.value.number == 2


def test_the_first_failing_record_ends_it_with_its_number_and_cause(model: Model, tmp_path: Path) -> None:
    bad = predict_log("gather", ids=np.array([10], np.int32))
    counting = Counting(model)
    with pytest.raises(WarmupError, match=r"warmup record 2 of .*/warmup: .*indices\[0\] = 10") as info:
        replay(counting, write(tmp_path, predict_log(), bad, predict_log()))
    assert info.value.code is Code.INVALID_ARGUMENT
    assert counting.calls == ["Predict", "Predict"]
    with pytest.raises(WarmupError, match=r"record 1 .* not found") as info:
        replay(model, write(tmp_path, predict_log("none")))
    assert info.value.code is Code.FAILED_PRECONDITION


class Meeting:
    """A model that answers when as many requests are there as it waits for."""

    def __init__(self, parties: int) -> None:
        self.barrier = threading.Barrier(parties, timeout=60)
        self.threads: set[int] = set()

    def answer(self, kind: Kind, request: Any) -> Any:
        self.threads.add(threading.get_ident())
        self.barrier.wait()


def test_several_records_at_once(model: Model, tmp_path: Path) -> None:
    meeting = Meeting(3)
    assert replay(meeting, write(tmp_path, *[predict_log()] * 6), threads=3) == 6
    assert len(meeting.threads) == 3
    assert threading.get_ident() not in meeting.threads
    assert replay(model, write(tmp_path, *[predict_log()] * 50), threads=4) == 50


def test_a_record_that_fails_ends_all_threads(model: Model, tmp_path: Path) -> None:
    bad = predict_log("gather", ids=np.array([10], np.int32))
    counting = Counting(model)
    with pytest.raises(WarmupError, match=r"warmup record 2 of .*/warmup: .*indices\[0\] = 10"):
        replay(counting, write(tmp_path, predict_log(), bad, *[predict_log()] * 900), threads=2)
    assert len(counting.calls) < 900
    path = write(tmp_path, *[predict_log()] * 4)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataLoss):
        replay(model, path, threads=2)


def test_a_server_warms_on_as_many_threads_as_it_is_told(
    saved_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    shutil.copytree(saved_models / "signatures", path)
    warmup_file(path).parent.mkdir(exist_ok=True)
    shutil.move(write(tmp_path, *[predict_log()] * 8), warmup_file(path))
    threads: set[str] = set()
    answer = Model.answer

    def answer_and_tell(self: Model, kind: Kind, request: Any) -> Any:
        threads.add(threading.current_thread().name.partition("_")[0])
        return answer(self, kind, request)

    monkeypatch.setattr(Model, "answer", answer_and_tell)
    ModelLoader(ServerFlags(num_model_warmup_threads=2))("model", 1, path).close()
    assert threads == {"warmup"}


def test_a_thousand_records_and_one_more(model: Model, tmp_path: Path) -> None:
    empty = prediction_log_pb2.PredictionLog()
    assert replay(model, write(tmp_path, *[empty] * 1000)) == 1000
    with pytest.raises(WarmupError, match=r"record 1001 .* exceeds the maximum \(1000\)") as info:
        replay(model, write(tmp_path, *[empty] * 1001))
    assert info.value.code is Code.INVALID_ARGUMENT


def test_files_that_are_no_warmup_records(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "warmup"
    path.write_text("no records at all")
    with pytest.raises(DataLoss, match="verify your warmup data is in TFRecord format"):
        replay(model, path)
    tfrecord.write(path, [b"\xff\xff\xff"])
    with pytest.raises(InvalidArgument, match="Failed to parse warmup record 1 from"):
        replay(model, path)


#: Prints how often other threads were scheduled for a load with warmup, then for as
#: many requests.
_THREADS = """
import sys
from pathlib import Path
from spikeless.engine.loader import ModelLoader
from spikeless.warmup import replay, warmup_file

def switches() -> None:
    lines = [line for task in Path("/proc/self/task").iterdir() if task.name != main
             for line in (task / "status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)

path, main = Path(sys.argv[1]), str(Path("/proc/self").resolve().name)
model = ModelLoader()("model", 1, path)
warmed = switches()
replay(model, warmup_file(path))
print(warmed, switches() - warmed)
"""


def test_a_version_is_warmed_on_the_thread_that_loads_it(saved_models: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(saved_models / "signatures", path)
    warmup_file(path).parent.mkdir(exist_ok=True)
    shutil.move(write(tmp_path, *[predict_log()] * 500), warmup_file(path))
    command = [sys.executable, "-c", _THREADS, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    warming, requests = map(int, done.stdout.split())
    assert warming < 250 < requests, "requests run on TensorFlow's threads, warmup does not"
