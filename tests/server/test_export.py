"""The export helper: what it writes, what it refuses, that nothing is half-written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from places import ROOT

from spikeless.errors import InvalidArgument
from spikeless.runtime import Session
from spikeless.training.export import export
from spikeless.warmup.records import read, warmup_file


class Scale(tf.Module):
    def __init__(self) -> None:
        self.factor = tf.Variable([2.0, 3.0], name="factor")
        self.slot = tf.Variable(tf.zeros([1000]), name="optimizer/slot")
        self.other = tf.Variable([10.0, 10.0], name="factor")

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, "x")])
    def __call__(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": x * self.factor + self.other}


SCALE = Scale()


@dataclasses.dataclass(frozen=True)
class Settings:
    seed: int = 7
    rate: float = 0.5


def examples_signature(outputs: Callable[[tf.Tensor], dict[str, tf.Tensor]], name: str = "inputs") -> Any:
    """A signature over serialized examples that returns ``outputs`` of them."""
    return tf.function(outputs, input_signature=[tf.TensorSpec([None], tf.string, name)])


def write(runs: Path, **options: Any) -> Path:
    defaults: dict[str, Any] = {
        "name": "scale",
        "signatures": {"serving_default": SCALE.__call__},
        "samples": [{"instances": np.ones([1, 2], np.float32)}],
        "settings": Settings(),
        "metrics": {"loss": np.float32(0.25)},
        "seconds": 1.5,
        "card": "Scales.",
        "runs": runs,
    }
    return export(**(defaults | options))


def visible(runs: Path) -> list[str]:
    return sorted(path.name for path in runs.glob("[!.]*"))


def test_a_run_directory_holds_model_samples_metrics_and_card(tmp_path: Path) -> None:
    run = write(tmp_path)
    assert visible(tmp_path) == [run.name]
    assert visible(run) == ["README.md", "metrics.json", "samples.jsonl", "saved_model"]
    assert (run / "samples.jsonl").read_text() == '{"instances":[[1.0,1.0]]}\n'
    record = json.loads((run / "metrics.json").read_text())
    assert record["settings"] == {"seed": 7, "rate": 0.5}
    assert record["metrics"] == {"loss": 0.25}
    assert record["seconds"] == 1.5
    assert (run / "README.md").read_text().startswith("# scale\n\nScales.\n")
    assert list((tmp_path / ".staging").iterdir()) == [tmp_path / ".staging" / "lock"]


def test_only_the_variables_in_use_are_exported_also_under_equal_names(tmp_path: Path) -> None:
    run = write(tmp_path)
    names = dict(tf.train.list_variables(str(run / "saved_model" / "variables" / "variables")))
    names.pop("_CHECKPOINTABLE_OBJECT_GRAPH")
    suffix = "/.ATTRIBUTES/VARIABLE_VALUE"
    assert names == {f"weights/factor{suffix}": [2], f"weights/factor-2{suffix}": [2]}
    with Session.load(run / "saved_model") as session:
        definition = session.meta_graph.signature_def["serving_default"]
        feeds = {definition.inputs["x"].name: np.ones([1, 2], np.float32)}
        (y,) = session.run(feeds, [definition.outputs["y"].name])
    assert y.tolist() == [[12.0, 13.0]]


def test_a_lookup_table_travels_as_a_resource(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("malignant\nbenign\n")
    index = tf.lookup.TextFileIndex
    table = tf.lookup.StaticHashTable(
        tf.lookup.TextFileInitializer(str(words), tf.string, index.WHOLE_LINE, tf.int64, index.LINE_NUMBER),
        default_value=-1,
    )
    find = tf.function(
        lambda x: {"id": table.lookup(x)}, input_signature=[tf.TensorSpec([None], tf.string, "x")]
    )
    run = write(tmp_path / "runs", signatures={"serving_default": find}, resources=[table])
    words.unlink()
    with Session.load(run / "saved_model") as session:
        definition = session.meta_graph.signature_def["serving_default"]
        feeds = {definition.inputs["x"].name: np.array([b"benign", b"other"], object)}
        (ids,) = session.run(feeds, [definition.outputs["id"].name])
    assert ids.tolist() == [1, -1]


def test_the_warmup_file_is_built_from_the_samples_when_asked_for(tmp_path: Path) -> None:
    cold, warm = write(tmp_path), write(tmp_path, warmup_batch_sizes=(1, 4))
    assert not warmup_file(cold / "saved_model").exists()
    records = [record.request for record in read(warmup_file(warm / "saved_model"))]
    assert [record.inputs["x"].tensor_shape.dim[0].size for record in records] == [1, 4]


def test_folders_appear_with_the_run(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "events").write_text("1")
    run = write(tmp_path / "runs", folders={"logs": tmp_path / "made"})
    assert (run / "logs" / "events").read_text() == "1"


def test_a_sample_that_does_not_fit_leaves_no_run(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"samples\.jsonl"):
        write(tmp_path, samples=[{"instances": [["text"]]}], warmup_batch_sizes=())
    assert visible(tmp_path) == []


def test_two_exports_in_the_same_second_get_names_of_their_own(tmp_path: Path) -> None:
    assert len({write(tmp_path) for _ in range(3)}) == 3
    assert len(visible(tmp_path)) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a/b"}, "run name"),
        ({"samples": []}, "no sample requests"),
        ({"samples": [{"signature_name": "nope"}]}, "'nope'; there is: serving_default"),
        ({"methods": {"nope": "classify"}}, "'nope'; there is: serving_default"),
        ({"methods": {"serving_default": "guess"}}, "must be one of predict, classify, regress"),
        ({"methods": {"serving_default": "classify"}}, "takes one input, `inputs`"),
        (
            {
                "signatures": {
                    "serving_default": examples_signature(lambda inputs: {"scores": tf.zeros([1])})
                },
                "methods": {"serving_default": "classify"},
            },
            "returns `classes` .* and `scores`",
        ),
        (
            {
                "signatures": {"serving_default": examples_signature(lambda inputs: {"y": tf.zeros([1])})},
                "methods": {"serving_default": "regress"},
            },
            "returns `outputs` .*this one returns y",
        ),
    ],
)
def test_what_could_not_be_served_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        write(tmp_path / "runs", **options)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interruption_after_the_model_was_written_leaves_no_run(
    tmp_path: Path, error: type[BaseException]
) -> None:
    class Interrupting:
        def __str__(self) -> str:
            assert list(tmp_path.glob(".staging/*/run/saved_model/saved_model.pb"))
            raise error

    with pytest.raises(error):
        write(tmp_path, metrics={"loss": Interrupting()})
    assert visible(tmp_path) == []
    assert [path.name for path in (tmp_path / ".staging").iterdir()] == ["lock"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_training_leaves_no_run_and_exits_130(
    tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-u", "-m", "spikeless", "train", "factorization_machine"]
    command += ["--runs", str(tmp_path), "--epochs", "1000000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ
    ) as child:
        assert child.stdout is not None
        assert any(line.startswith("Epoch 2/") for line in child.stdout)
        while child.poll() is None:
            # Again if need be: TensorFlow drops an interrupt that arrives inside one of
            # its callbacks.
            child.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, errors = child.communicate(timeout=60)
    # An interrupt that comes while Python is already on its way out ends it by the
    # signal itself, which a shell shows as 130 too.
    assert child.returncode in (130, -number), errors
    if child.returncode == 130:
        assert errors.splitlines()[-1] == "spikeless: interrupted"
    assert list(tmp_path.iterdir()) == []
