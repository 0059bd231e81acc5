"""The digit classifier on one device and two, killed and resumed, exported, served."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from harness import put_version, run_server
from places import ROOT
from sklearn.datasets import load_digits
from trained_models import spikeless

from spikeless import warmup

# One worker: the model of the fixture is trained once.
pytestmark = pytest.mark.xdist_group("mnist")

#: Enough to be good, few enough to be quick.
EPOCHS = 12


def train(runs: Path, *options: object) -> Path:
    done = spikeless("train", "mnist", "--data", "digits", "--runs", runs, "--epochs", EPOCHS, *options)
    assert done.returncode == 0, done.stderr
    return only_run(runs)


def only_run(runs: Path) -> Path:
    (run,) = runs.glob("mnist-*")
    return run


def record_of(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return record


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("one"))


def test_one_and_two_devices_come_to_the_same(one_device: Path, tmp_path: Path) -> None:
    two_devices = train(tmp_path, "--logical-devices", 2)
    one, two = record_of(one_device), record_of(two_devices)
    assert (one["settings"]["devices"], two["settings"]["devices"]) == (1, 2)
    assert one["metrics"]["test_accuracy"] > 0.96
    assert two["metrics"]["test_accuracy"] > 0.96
    # Of 360 pictures, a few: no more than another seed changes.
    assert abs(one["metrics"]["test_accuracy"] - two["metrics"]["test_accuracy"]) < 0.02
    assert one["settings"]["data"] == "digits"


def test_the_run_directory_is_complete(one_device: Path) -> None:
    assert any((one_device / "tensorboard" / "train").glob("events.out.tfevents.*"))
    assert any((one_device / "tensorboard" / "validation").glob("events.out.tfevents.*"))
    assert "digits" in (one_device / "README.md").read_text()
    assert [(entry.inputs[0].shape or ())[0] for entry in warmup.inspect(one_device / "saved_model")] == [
        1,
        8,
        32,
    ]
    assert not list((one_device.parent / ".work").iterdir())


def test_the_server_predicts_what_tensorflow_does(one_device: Path, tmp_path: Path) -> None:
    data = load_digits()
    pictures = tf.image.resize(data.images[:200, ..., None] * (255 / 16), [28, 28]).numpy()[..., 0]
    pictures = np.clip(np.rint(pictures), 0, 255).astype(np.uint8)
    put_version(one_device / "saved_model", tmp_path / "mnist", 1)
    with run_server(tmp_path / "log", model_name="mnist", model_base_path=tmp_path / "mnist") as running:
        answer = running.client.predict("mnist", {"pictures": pictures})
    loaded = tf.saved_model.load(str(one_device / "saved_model")).signatures["serving_default"]
    expected = loaded(pictures=tf.constant(pictures))
    np.testing.assert_allclose(answer["probabilities"], expected["probabilities"].numpy(), atol=1e-5)
    np.testing.assert_array_equal(answer["digit"], expected["digit"].numpy())
    assert (answer["digit"] == data.target[:200]).mean() > 0.96


def killed_in_training(options: Sequence[object]) -> bool:
    """Kill a run of four epochs after the second; False if it had ended by then."""
    command = [sys.executable, "-m", "spikeless", "train", "mnist", *map(str, options)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with process:
        assert process.stdout is not None
        try:
            # The state is saved before an epoch reports.
            assert any(line.startswith("epoch 2/4") for line in process.stdout)
        finally:
            process.kill()
        rest = process.stdout.read()
    return process.returncode == -signal.SIGKILL and "epoch 4/4" not in rest


def test_a_killed_run_is_taken_up_where_it_was(tmp_path: Path) -> None:
    for attempt in range(5):
        runs = tmp_path / f"runs-{attempt}"
        options = ("--data", "digits", "--runs", runs, "--epochs", 4)
        if killed_in_training(options):
            break
    else:
        pytest.fail("it ends before it is killed")
    assert not [path for path in runs.iterdir() if path.name.startswith("mnist")]

    again = spikeless("train", "mnist", *options)
    assert again.returncode == 0, again.stderr
    assert "taking up the run" in again.stdout
    epochs = [line.split(":")[0] for line in again.stdout.splitlines() if line.startswith("epoch ")]
    assert epochs in (["epoch 3/4", "epoch 4/4"], ["epoch 4/4"], [])
    resumed = record_of(only_run(runs))["metrics"]
    whole = record_of(train(tmp_path / "whole", "--epochs", 4))["metrics"]
    assert resumed == pytest.approx(whole, rel=1e-3)  # the same pictures in the same order


def test_mnist_is_read_where_tensorflow_datasets_has_it(tmp_path: Path) -> None:
    """Digits under MNIST's name, in the files that a download would have left."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="it needs Python 3.11")
    data = load_digits()
    pictures = tf.cast(tf.image.resize(data.images[..., None] * (255 / 16), [28, 28]), tf.uint8)
    splits = {
        name: tf.data.Dataset.from_tensor_slices({"image": pictures[part], "label": data.target[part]})
        for name, part in (("train", slice(400, None)), ("test", slice(400)))
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name="mnist",
        version=tfds.builder("mnist", data_dir=tmp_path).version,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        ),
        split_datasets=splits,
        data_dir=tmp_path,
    )
    offline = os.environ | {"TFDS_DATA_DIR": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    done = spikeless("train", "mnist", "--epochs", 1, "--runs", tmp_path / "runs", env=offline)
    assert done.returncode == 0, done.stderr
    assert "mnist: 1397 pictures to train on, 400 to test on" in done.stdout
    assert record_of(only_run(tmp_path / "runs"))["settings"]["data"] == "mnist"


@pytest.mark.parametrize("data", ["mnist", "auto"])
def test_without_mnist_it_says_so(tmp_path: Path, data: str) -> None:
    offline = os.environ | {"TFDS_DATA_DIR": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    options = ("--data", data, "--batch-size", 2000, "--runs", tmp_path / "runs")
    done = spikeless("train", "mnist", *options, env=offline)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    if data == "mnist":
        assert error.startswith("spikeless: error: MNIST is not to be had (")
        assert error.endswith("; --data digits needs no download")
    else:
        assert "training on scikit-learn's digits instead" in done.stdout
        assert "there are 1437" in error  # digits it is
    assert not (tmp_path / "runs").exists()


def test_a_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    done = spikeless("train", "mnist", "--data", "digits", "--batch-size", 2000, "--runs", tmp_path)
    assert done.returncode == 1
    assert "spikeless: error: a step takes 2000 pictures, but there are 1437" in done.stderr
    assert list(tmp_path.iterdir()) == []
