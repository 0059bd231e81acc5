"""The click model, trained small on synthetic records, exported and served."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import criteo
import criteo_synthetic
import numpy as np
import pytest
import spark_to_tfrecord
import tensorflow as tf
from harness import Running, put_version, run_server
from numpy.typing import NDArray
from places import ROOT
from trained_models import NEEDS_JAVA, spikeless

from spikeless import warmup
from spikeless.errors import AlreadyExists, InvalidArgument, NotFound
from spikeless.formats import tfrecord
from spikeless.training import dataset

# One worker: the data and the model of the fixtures are made once.
pytestmark = pytest.mark.xdist_group("ctr")

SMALL = ("--table-rows", 5000, "--dimensions", 4, "--hidden", 16, "--epochs", 2, "--candidates", 20)


def only_run(runs: Path) -> Path:
    (run,) = (path for path in runs.iterdir() if not path.name.startswith("."))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole pipeline: rows are made and written, the model is trained."""
    runs = tmp_path_factory.mktemp("runs")
    done = spikeless("train", "ctr", "--runs", runs, "--synthetic-rows", 8000, *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"run directory: {only_run(runs)}"
    return only_run(runs)


@pytest.fixture(scope="module")
def data(run: Path) -> Path:
    """The records that the model was trained on."""
    return run.parent / ".data" / "criteo-synthetic-8000-1"


@pytest.fixture(scope="module")
def served(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    put_version(run / "saved_model", folder / "ctr", 1)
    with run_server(folder / "log", model_name="ctr", model_base_path=folder / "ctr") as running:
        yield running


def rows_of(data: Path, count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Integers [count, 13] and categories [count, 26] of the test records."""
    read = dataset.read(data / "test")
    rows = [row for shard in read.shards for row in dataset.rows(shard, read.fields, gzipped=False)][:count]
    integers = [[-1 if value is None else value for value in row[1:14]] for row in rows]
    categories = [[(value or "").encode() for value in row[14:]] for row in rows]
    return np.array(integers, np.int64), np.array(categories, object)


def test_metrics_stand_beside_a_baseline_and_the_ceiling(run: Path) -> None:
    record = json.loads((run / "metrics.json").read_text())
    metrics = record["metrics"]
    assert 0.55 < metrics["test_auc"] < metrics["test_auc_ceiling"] < 0.95
    assert 0.55 < metrics["test_auc_logistic"] < metrics["test_auc_ceiling"]
    assert record["settings"]["table_rows"] == 5000
    card = (run / "README.md").read_text()
    assert "SYNTHETIC" in card
    assert "test_auc_logistic" in card
    assert "xla_cpu_compilation_enabled" not in card


def test_the_server_predicts_what_tensorflow_does(run: Path, data: Path, served: Running) -> None:
    integers, categories = rows_of(data, 100)
    answer = served.client.predict("ctr", {"integers": integers, "categories": categories})["probability"]
    loaded = tf.saved_model.load(str(run / "saved_model")).signatures["serving_default"]
    expected = loaded(integers=tf.constant(integers), categories=tf.constant(categories.tolist()))
    np.testing.assert_allclose(answer, expected["probability"].numpy(), rtol=1e-5)
    assert answer.std() > 0.01


def test_ranking_is_predicting_each_candidate_with_the_same_user(data: Path, served: Running) -> None:
    integers, categories = rows_of(data, 100)
    integers[:, :6], categories[:, :13] = integers[0, :6], categories[0, :13]
    inputs = {
        "user_integers": integers[:1, :6],
        "user_categories": categories[:1, :13],
        "candidate_integers": integers[:, 6:],
        "candidate_categories": categories[:, 13:],
    }
    ranked = served.client.predict("ctr", inputs, signature="rank")["probability"]
    each = served.client.predict("ctr", {"integers": integers, "categories": categories})["probability"]
    np.testing.assert_allclose(ranked, each, rtol=1e-5)


def test_the_warmup_file_ranks_one_to_all_candidates(run: Path) -> None:
    shapes = [
        next((entry.shape or ())[0] for entry in record.inputs if entry.name == "candidate_integers")
        for record in warmup.inspect(run / "saved_model")
        if record.signatures == ("rank",)
    ]
    assert shapes == [1, 10, 20]


def test_from_files_and_compiled_by_xla_it_predicts_the_same(run: Path, data: Path, tmp_path: Path) -> None:
    files = ("--train", data / "train.tsv", "--test", data / "test.tsv")
    done = spikeless("train", "ctr", "--runs", tmp_path, "--xla", *files, *SMALL)
    assert done.returncode == 0, done.stderr
    trained, run = run, only_run(tmp_path)
    metrics, expected = (
        json.loads((path / "metrics.json").read_text())["metrics"] for path in (run, trained)
    )
    # The files hold the records that the other was trained on, and say nothing of the
    # ceiling.
    assert metrics["test_auc"] == pytest.approx(expected["test_auc"], abs=0.005)
    assert metrics["test_auc_logistic"] == pytest.approx(expected["test_auc_logistic"], abs=1e-6)
    assert "test_auc_ceiling" not in metrics
    assert "--xla_cpu_compilation_enabled" in (run / "README.md").read_text()
    put_version(run / "saved_model", tmp_path / "models", 1)
    integers, categories = rows_of(data, 7)
    with run_server(tmp_path / "log", model_name="ctr", model_base_path=tmp_path / "models") as running:
        answer = running.client.predict("ctr", {"integers": integers, "categories": categories})
    loaded = tf.saved_model.load(str(run / "saved_model")).signatures["serving_default"]
    alone = loaded(integers=tf.constant(integers), categories=tf.constant(categories.tolist()))
    np.testing.assert_allclose(answer["probability"], alone["probability"].numpy(), rtol=1e-4)


def test_the_input_pipelines_benchmark_measures_all_of_its_steps(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "read_training_records.py", "--data", data.parent]
    command += ["--rows", 8000, "--repeats", 1, "--epochs", 2, "--results", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    steps = ["interleave", "vectorised parse", "parallel parse", "cache", "prefetch"]
    rungs = [row.split("|")[1].strip() for row in table[2:]]
    assert rungs == ["naive loop", *(f"+ {step}" for step in steps), "+ shuffle"]
    assert "Bar: the tuned pipeline" in done.stdout
    record = json.loads((tmp_path / "input_pipeline.json").read_text())
    assert record["records"] == 8000
    measured = record["records_per_second"]
    assert list(measured["with_training_step_without"]) == steps
    assert all(len(values) == 1 for kind in measured.values() for values in kind.values())
    assert "<svg" in (tmp_path / "input_pipeline.svg").read_text()


def write_label(source: Path, target: Path, label: int | None) -> None:
    """A copy of a dataset; the last record of the second shard has another label."""
    shutil.copytree(source, target)
    read = dataset.read(target)
    rows = list(dataset.rows(read.shards[1], read.fields, gzipped=False))
    rows[-1][0] = label
    file = read.shards[1].path
    tfrecord.write(file, [dataset.encode(row, read.fields, "row") for row in rows])
    counts = json.loads((target / "_counts.json").read_text())
    counts["shards"][file.name]["bytes"] = file.stat().st_size
    (target / "_counts.json").write_text(json.dumps(counts))


def test_bad_records_are_refused_by_file_and_record(data: Path, tmp_path: Path) -> None:
    others = ("--runs", tmp_path / "runs", "--test", data / "test")
    for name, label, message in (
        ("missing", None, "has no 'label', which may not be missing"),
        ("strange", 7, "has the label 7, not 0 or 1"),
    ):
        write_label(data / "train", tmp_path / name, label)
        done = spikeless("train", "ctr", "--train", tmp_path / name, *others)
        assert done.returncode == 1
        error = done.stderr.splitlines()[-1]
        shard = dataset.read(tmp_path / name).shards[1]
        assert error == f"spikeless: error: {shard.path}: record {shard.records} {message}"
    assert not (tmp_path / "runs").exists()


def test_data_of_another_schema_or_none_is_refused(data: Path, tmp_path: Path) -> None:
    done = spikeless("train", "ctr", "--train", tmp_path, "--test", tmp_path)
    assert done.returncode == 1
    assert f"{tmp_path} has no _SUCCESS" in done.stderr
    assert spikeless("train", "ctr", "--train", data).returncode == 2
    assert spikeless("train", "ctr", "--synthetic-rows", 3).returncode == 2
    shutil.copytree(data / "train", tmp_path / "other")
    schema = (tmp_path / "other" / "_schema.json").read_text()
    assert '"C7",\n   "type": "string"' in schema
    text = schema.replace('"C7",\n   "type": "string"', '"C7",\n   "type": "double"')
    (tmp_path / "other" / "_schema.json").write_text(text)
    done = spikeless("train", "ctr", "--train", tmp_path / "other", "--test", data / "test")
    assert done.returncode == 1
    assert f"error: {tmp_path / 'other'}: column 'C7' is double, not string" in done.stderr.splitlines()[-1]


def test_an_interrupt_leaves_no_export(data: Path, tmp_path: Path) -> None:
    records = ("--train", data / "train", "--test", data / "test", "--runs", tmp_path / "runs")
    command = [sys.executable, "-m", "spikeless", "train", "ctr", *records, *SMALL, "--epochs", 1000]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert any(line.startswith("epoch 1:") for line in process.stdout), process.communicate()[1]
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=200)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "spikeless: interrupted"
    assert not (tmp_path / "runs").exists()


def test_synthetic_rows_are_criteo_rows_and_always_the_same(tmp_path: Path) -> None:
    settings = criteo_synthetic.Settings(train_rows=300, test_rows=100, vocabulary=50)
    for name in ("a", "b"):
        criteo_synthetic.generate(tmp_path / name, settings)
    text = (tmp_path / "a" / "train.tsv").read_text()
    assert text == (tmp_path / "b" / "train.tsv").read_text()
    rows = [line.split("\t") for line in text.splitlines()]
    assert len(rows) == 300
    assert {len(row) for row in rows} == {40}
    assert {row[0] for row in rows} == {"0", "1"}
    assert all(value == "" or int(value) >= 0 for row in rows for value in row[1:14])
    assert all(value == "" or len(bytes.fromhex(value)) == 4 for row in rows for value in row[14:])
    assert any(value == "" for row in rows for value in row)


@NEEDS_JAVA
def test_spark_writes_the_same_records(tmp_path: Path) -> None:
    criteo_synthetic.generate(tmp_path / "made", criteo_synthetic.Settings(train_rows=300, test_rows=10))
    file = tmp_path / "made" / "train.tsv"
    one = criteo.write(file, tmp_path / "one")
    other = criteo.write(file, tmp_path / "other", spark=True)
    assert one.schema == other.schema

    def contents(written: dataset.Dataset) -> list[bytes]:
        return sorted(record for shard in written.shards for record in tfrecord.read(shard.path))

    assert contents(one) == contents(other)
    assert (one.records, len(one.shards)) == (300, 8)


def test_a_file_is_written_once_until_it_changes(tmp_path: Path) -> None:
    file, row = tmp_path / "day.tsv", "\t".join(["1", "7", *[""] * 37, "ab"]) + "\n"
    file.write_text(row)
    first = criteo.records(file, tmp_path)
    (shard,) = first.shards
    assert list(dataset.rows(shard, first.fields, gzipped=False)) == [[1, 7, *[None] * 37, "ab"]]
    assert criteo.records(file, tmp_path) == first
    file.write_text(2 * row)
    assert criteo.records(file, tmp_path).records == 2
    assert criteo.records(first.path, tmp_path) == first, "records are taken as they are"
    with pytest.raises(AlreadyExists, match="exists; remove it"):
        criteo.write(file, first.path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\t2", "line 2: 2 columns, not 40"),
        ("\t" * 39, "line 2: 'label' is missing"),
        ("1\tx" + "\t" * 38, r"line 2: .*'x'"),
        (f"1\t{1 << 31}" + "\t" * 38, "line 2: 2147483648 is no 32-bit integer"),
        ("0" + "\t" * 39 + "\udcff", "is not UTF-8 text"),
    ],
)
def test_bad_lines_are_refused_and_leave_nothing(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "day.tsv"
    file.write_text("0" + "\t" * 39 + f"\n{line}\n", errors="surrogateescape")
    with pytest.raises(InvalidArgument, match=message):
        criteo.write(file, tmp_path / "records")
    assert not (tmp_path / "records").exists()


def java(home: Path, version: str) -> str:
    """A JAVA_HOME whose Java says that it is of a version."""
    program = home / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2021-01-19' >&2\n")
    program.chmod(0o755)
    return str(home)


def test_an_old_java_is_named_before_anything_runs(tmp_path: Path) -> None:
    old = java(tmp_path / "old", "11.0.10")
    command = ("train", "ctr", "--spark", "--runs", tmp_path / "runs")
    done = spikeless(*command, env={**os.environ, "JAVA_HOME": old})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"spikeless: error: Spark needs Java 17 or newer, and {old}/bin/java is 11: "
    )
    assert not (tmp_path / "runs").exists()


def test_versions_of_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("17", "17.0.15", "21.0.1"):
        monkeypatch.setenv("JAVA_HOME", java(tmp_path / version, version))
        spark_to_tfrecord.require_java()
    for version in ("1.8.0_292", "11.0.10"):
        monkeypatch.setenv("JAVA_HOME", java(tmp_path / version, version))
        with pytest.raises(NotFound, match=r"Java 17 or newer, and .* is (8|11)"):
            spark_to_tfrecord.require_java()
    monkeypatch.setenv("JAVA_HOME", java(tmp_path / "odd", "seventeen"))
    with pytest.raises(NotFound, match="-version` fails"):
        spark_to_tfrecord.require_java()
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "none"))
    with pytest.raises(NotFound, match="No such file or directory: apt-get install"):
        spark_to_tfrecord.require_java()
