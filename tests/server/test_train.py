"""The training scripts as users run them, and what they export, served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from places import ROOT
from sklearn.datasets import load_breast_cancer
from trained_models import spikeless

from spikeless import warmup
from spikeless.formats import savedmodel
from spikeless.formats.protos import classification_pb2, input_pb2, predict_pb2, regression_pb2
from spikeless.formats.tensors import to_numpy, to_proto
from spikeless.runtime import Session
from spikeless.runtime.model import Model

DATA = load_breast_cancer()
NAMES = [str(name).replace(" ", "_") for name in DATA.feature_names]


@pytest.fixture(scope="module")
def model(boston_run: Path) -> Iterator[Model]:
    with Session.load(boston_run / "saved_model") as session:
        yield Model(session)


def predict(model: Model, rows: NDArray[Any]) -> NDArray[Any]:
    request = predict_pb2.PredictRequest()
    request.inputs["features"].CopyFrom(to_proto(rows.astype(np.float32)))
    return to_numpy(model.predict(request).outputs["probability"])


def as_examples(rows: NDArray[Any]) -> input_pb2.Input:
    result = input_pb2.Input()
    for row in rows:
        example = result.example_list.examples.add()
        for name, value in zip(NAMES, row, strict=True):
            example.features.feature[name].float_list.value.append(value)
    return result


def test_without_a_name_the_models_are_listed() -> None:
    done = spikeless("train")
    assert done.returncode == 0
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == sorted(
        path.stem.removeprefix("train_") for path in (ROOT / "training").glob("train_*.py")
    )


def test_an_unknown_name_and_an_unknown_option(tmp_path: Path) -> None:
    done = spikeless("train", "nothing")
    assert done.returncode == 1
    assert "spikeless: error: training/ has no training script for 'nothing'" in done.stderr
    assert spikeless("train", "--training", tmp_path).returncode == 1
    assert spikeless("train", "factorization_machine", "--no-such-option").returncode == 2


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("factorization_machine", "--epochs"),
        ("ctr", "--candidates"),
        ("mnist", "--batch-size"),
        ("tagger", "--units"),
    ],
)
def test_numbers_that_make_no_sense_are_wrong_usage(name: str, option: str) -> None:
    done = spikeless("train", name, option, "0")
    assert done.returncode == 2
    assert f"{option} must be 1 or more" in done.stderr.splitlines()[-1]


def test_the_run_directory_says_how_good_the_model_is_and_how_to_make_it_again(boston_run: Path) -> None:
    record = json.loads((boston_run / "metrics.json").read_text())
    assert record["metrics"]["test_auc"] > 0.97
    assert record["settings"]["seed"] == 1
    assert record["settings"]["factors"] == 8
    assert {"python", "tensorflow", "keras", "numpy"} <= set(record["versions"])
    assert record["seconds"] > 0
    card = (boston_run / "README.md").read_text()
    assert "test_auc" in card
    assert "learning_rate" in card


def test_the_warmup_file_has_each_kind_of_request_in_several_sizes(boston_run: Path) -> None:
    records = warmup.inspect(boston_run / "saved_model")
    kinds = {(record.kind, (record.inputs[0].shape or ())[0]) for record in records}
    assert kinds == {(kind, size) for kind in ("Predict", "Classify", "Regress") for size in (1, 8, 32)}


def test_signatures_are_what_each_kind_of_request_needs(boston_run: Path) -> None:
    signatures = savedmodel.read(boston_run / "saved_model").signatures()
    assert {key: signature.method_name for key, signature in signatures.items()} == {
        "classify": savedmodel.CLASSIFY_METHOD,
        "regress": savedmodel.REGRESS_METHOD,
        "serving_default": savedmodel.PREDICT_METHOD,
    }
    assert signatures["serving_default"].inputs["features"].shape == (None, 30)


def test_every_kind_of_request_gets_the_same_probability(model: Model) -> None:
    rows = DATA.data[:20]
    probability = predict(model, rows)
    assert probability.shape == (20,)

    request = regression_pb2.RegressionRequest(input=as_examples(rows))
    request.model_spec.signature_name = "regress"
    values = [regression.value for regression in model.regress(request).result.regressions]
    np.testing.assert_allclose(values, probability, rtol=1e-5)

    request = classification_pb2.ClassificationRequest(input=as_examples(rows))
    request.model_spec.signature_name = "classify"
    for row, value in zip(model.classify(request).result.classifications, probability, strict=True):
        assert [entry.label for entry in row.classes] == ["benign", "malignant"]
        np.testing.assert_allclose([entry.score for entry in row.classes], [1 - value, value], atol=1e-6)


def test_the_served_model_tells_malignant_from_benign_in_raw_rows(model: Model) -> None:
    malignant = DATA.target == 0
    probability = predict(model, DATA.data)
    assert ((probability > 0.5) == malignant).mean() > 0.95


def test_only_what_serving_needs_is_exported(boston_run: Path) -> None:
    variables = boston_run / "saved_model" / "variables" / "variables.data-00000-of-00001"
    # mean, variance, bias, linear [30], factors [30, 8] as float32, and the object
    # graph; no optimizer.
    assert 4 * (30 + 30 + 1 + 30 + 240) <= variables.stat().st_size < 4000


@pytest.mark.parametrize("where", ["run", "warmup/boston"])
def test_sample_requests_are_rows_of_the_data_and_are_answered(
    boston_run: Path, model: Model, where: str
) -> None:
    folder = boston_run if where == "run" else ROOT / where
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["signature_name"] for sample in samples] == ["serving_default", "classify", "regress"]
    rows = np.array(samples[0]["instances"])
    assert all((DATA.data == row).all(axis=1).any() for row in rows)
    for sample in samples[1:]:
        assert [list(example.values()) for example in sample["examples"]] == rows.tolist()
        assert [list(example) for example in sample["examples"]] == [NAMES] * len(rows)
    assert np.isfinite(predict(model, rows)).all()


def test_the_same_seed_gives_the_same_model(boston_run: Path, model: Model, tmp_path: Path) -> None:
    done = spikeless("train", "factorization_machine", "--runs", tmp_path, "--seed", 1)
    assert done.returncode == 0, done.stderr
    (again,) = tmp_path.glob("factorization_machine-*")
    with Session.load(again / "saved_model") as session:
        np.testing.assert_array_equal(predict(Model(session), DATA.data), predict(model, DATA.data))
