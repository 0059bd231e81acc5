"""Small versions whose answers tell them apart, their servers, and load on these.

Version ``n`` answers ``x * n``: a caller knows whose answer it has got. The SavedModels
are built by TensorFlow in a process of its own, once: the fixture ``scales`` is a
directory with one for each of `SCALES`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spikeless import launch
from spikeless.client import Client
from spikeless.errors import SpikelessError
from spikeless.formats import tfrecord
from spikeless.formats.protos import prediction_log_pb2
from spikeless.formats.tensors import to_proto
from spikeless.repository import golden, models_config
from spikeless.repository.models_config import new_block, with_versions
from spikeless.rollout.fleet import FleetSettings
from spikeless.rollout.probes import ComparisonSettings
from spikeless.rollout.promotion import PromotionSettings

NAME = "scale"
#: Names of SavedModels -> the factor that their answers have.
SCALES = {"1": 1.0, "2": 2.0, "3": 3.0, "nan": float("nan")}
#: How long the SavedModel ``slow`` takes; ``brittle`` raises for negative numbers.
SLOW_SECONDS = 0.1
X = np.array([[1.0, 2.0], [3.0, -4.0]], np.float32)
#: A machine under test is slow at times: only errors count there, not latencies.
LENIENT = ComparisonSettings(requests=20, max_p99_ratio=1e6)
SERVER_FLAGS = (
    "--allow_version_labels_for_unavailable_models=true",
    "--max_num_load_retries=0",
    "--file_system_poll_wait_seconds=1",
    "--grpc_max_threads=32",
)


def build(directory: str) -> None:
    import tensorflow as tf

    for name, factor in SCALES.items():
        module = tf.Module()
        module.factor = tf.Variable(factor)

        @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, "x")])
        def scale(x: Any, module: Any = module) -> Any:
            return {"y": x * module.factor}

        tf.saved_model.save(module, f"{directory}/{name}", signatures={"serving_default": scale})

    module = tf.Module()
    module.factor = tf.Variable(2.0)

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, "x")])
    def compiled(x: Any) -> Any:
        return {"y": tf.function(lambda x: x * module.factor, jit_compile=True)(x)}

    tf.saved_model.save(module, f"{directory}/compiled", signatures={"serving_default": compiled})

    module = tf.Module()
    module.factor = tf.Variable(4)

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.int32, "x")])
    def whole(x: Any) -> Any:
        return {"z": x * module.factor}

    tf.saved_model.save(module, f"{directory}/whole", signatures={"serving_default": whole})

    module = tf.Module()
    module.factor = tf.Variable(4.0)

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, "x")])
    def brittle(x: Any) -> Any:
        tf.debugging.assert_non_negative(x)
        return {"y": x * module.factor}

    tf.saved_model.save(module, f"{directory}/brittle", signatures={"serving_default": brittle})

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, "x")])
    def slow(x: Any) -> Any:
        end = tf.timestamp() + SLOW_SECONDS
        tf.while_loop(lambda now: now < end, lambda _: (tf.timestamp(),), (tf.timestamp(),))
        return {"y": x * module.factor}

    tf.saved_model.save(module, f"{directory}/slow", signatures={"serving_default": slow})


@pytest.fixture(scope="session")
def scales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scales")
    result = subprocess.run(
        [sys.executable, __file__, directory], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return directory


def prediction_log(answer: NDArray[Any] | None = None) -> prediction_log_pb2.PredictionLog:
    """A request, with the answer that it should get."""
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.model_spec.name = NAME
    log.predict_log.request.inputs["x"].CopyFrom(to_proto(X))
    if answer is not None:
        log.predict_log.response.outputs["y"].CopyFrom(to_proto(answer))
    return log


def golden_file(path: Path, factor: float) -> Path:
    tfrecord.write(path, [prediction_log(X * factor).SerializeToString()])
    return path


def add_version(
    saved_model: Path, models: Path, number: int, *, warmup: bool = True, expected: float | None = None
) -> Path:
    """Put a version into a repository, with a warmup record and its expected answer.

    It appears as a whole: a server may look at any moment.
    """
    version = models / NAME / f"staged-{number}"
    shutil.copytree(saved_model, version)
    extra = version / "assets.extra"
    extra.mkdir(exist_ok=True)
    if warmup:
        record = prediction_log().SerializeToString()
        tfrecord.write(extra / "tf_serving_warmup_requests", [record])
    if expected is not None:
        file = golden_file(extra / "given", expected)
        golden.write_to_version(golden.read_file(file, golden.Tolerance()), version)
        file.unlink()
    return version.rename(models / NAME / str(number))


def write_config(models: Path, versions: list[int], stable: int | None) -> None:
    labels = {} if stable is None else {"stable": stable}
    block = with_versions(new_block(NAME, str(models / NAME)), versions, labels)
    models_config.edit(models, {NAME: block})


def block_of(models: Path, name: str = NAME) -> str:
    """The text of a model's ``config { ... }``."""
    block = models_config.read(models).block(name)
    assert block is not None
    return block


def model_of(models: Path, name: str = NAME) -> Any:
    """What is configured for a model."""
    model = models_config.read(models).model(name)
    assert model is not None
    return model


def labels_of(models: Path, name: str = NAME) -> dict[str, int]:
    return dict(model_of(models, name).version_labels)


@pytest.fixture
def models(scales: Path, tmp_path: Path) -> Path:
    """Versions 1 and 2 on disk, version 1 configured as the stable one."""
    models = tmp_path / "models"
    for number in (1, 2):
        add_version(scales / str(number), models, number, expected=number)
    write_config(models, [1], 1)
    return models


def start_server(
    models: Path, *flags: str, port: int | None = None, rest: bool = False, wait_for: str = NAME
) -> launch.ServerProcess:
    """A server of what ``models.config`` says, which outlives nothing: stop it."""
    return launch.start(
        launch.LaunchSettings(
            port=port,
            rest=rest,
            flags=(f"--model_config_file={models / 'models.config'}", *SERVER_FLAGS, *flags),
            wait_for=[wait_for],
            log=models.parent / f"server-{port or 'any'}.log",
        )
    )


@pytest.fixture
def server(models: Path) -> Iterator[launch.ServerProcess]:
    with start_server(models) as server:
        yield server


def fleet_of(*servers: launch.ServerProcess | str, **more: Any) -> FleetSettings:
    targets = [server if isinstance(server, str) else server.target for server in servers]
    return FleetSettings(targets, **{"patience": 60.0, "load_timeout": 60.0, **more})


def settings(**more: Any) -> PromotionSettings:
    return PromotionSettings(**{"comparison": LENIENT, **more})


def served(client: Client, name: str = NAME, **spec: Any) -> int:
    """Which version answers."""
    answer = client.predict(name, {"x": X}, **spec)["y"]
    return int(answer[0, 0])


class Load:
    """Callers that never stop, with these labels in turn; counts answers."""

    def __init__(self, target: str, threads: int = 2, labels: Sequence[str] = ("", "stable")) -> None:
        self.answers: Counter[tuple[str, float]] = Counter()
        self.failures: list[str] = []
        #: The first failure of each row of them that a caller met.
        self.outages: list[str] = []
        self._target = target
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._call, args=(labels[number % len(labels)],))
            for number in range(threads)
        ]

    def _call(self, label: str) -> None:
        with Client(self._target, timeout=60.0) as client:
            fails = False
            while not self._stop.wait(0.002):
                try:
                    answer = client.predict(NAME, {"x": X}, label=label)["y"]
                    self.answers[label, float(answer[0, 0])] += 1
                    fails = False
                except SpikelessError as error:
                    self.failures.append(f"{label or 'unlabelled'}: {error}")
                    if not fails:
                        self.outages.append(self.failures[-1])
                    fails = True

    @property
    def factors(self) -> set[float]:
        """Whose answers callers got."""
        return {factor for _, factor in list(self.answers)}

    def sees(self, factor: float) -> None:
        """Wait until callers have had an answer of this version."""
        deadline = time.monotonic() + 60
        while factor not in self.factors:
            assert time.monotonic() < deadline, f"no answer of {factor}, only {self.answers}"
            self._stop.wait(0.01)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def flawless(target: str, labels: Sequence[str] = ("", "stable")) -> Iterator[Load]:
    """Load that must not see a single failure."""
    with Load(target, labels=labels) as load:
        yield load
    assert not load.failures, load.failures[:5]
    assert load.answers, "no request was answered"


if __name__ == "__main__":
    build(sys.argv[1])
