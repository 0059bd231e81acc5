"""The tagger, trained with tf2crf and served."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from harness import Running, put_version, run_server
from places import ROOT
from trained_models import spikeless

from spikeless import warmup

# One worker: the fixtures are trained once.
pytestmark = pytest.mark.xdist_group("tagger")

CORPUS = ROOT / "training" / "data" / "conll"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run directory, and the test sentences as tagged by the training process."""
    folder = tmp_path_factory.mktemp("tagger")
    done = spikeless(
        *("train", "tagger", "--epochs", 4, "--runs", folder / "runs"),
        *("--predictions", folder / "predictions.txt"),
    )
    assert done.returncode == 0, done.stderr
    (run,) = (path for path in (folder / "runs").iterdir() if not path.name.startswith("."))
    assert done.stdout.splitlines()[-1] == f"run directory: {run}"
    return run, folder / "predictions.txt"


@pytest.fixture(scope="module")
def served(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    put_version(trained[0] / "saved_model", folder / "tagger", 1)
    with run_server(folder / "log", model_name="tagger", model_base_path=folder / "tagger") as running:
        yield running


def tag(served: Running, sentences: list[str]) -> list[list[str]]:
    answer = served.client.predict("tagger", {"sentences": np.array(sentences, object)})
    assert answer["words"].shape == answer["tags"].shape
    return [[name.decode() for name in row if name] for row in answer["tags"]]


def test_metrics_stand_beside_the_network_without_the_crf(trained: tuple[Path, Path]) -> None:
    record = json.loads((trained[0] / "metrics.json").read_text())
    assert record["metrics"]["test_f1"] > 0.9
    assert record["metrics"]["test_f1_without_crf"] > 0.8
    assert record["versions"]["tensorflow"] == importlib.metadata.version("tensorflow")
    assert record["versions"]["tf2crf"] == "0.1.33"
    assert (trained[0] / "saved_model" / "assets" / "vocabulary.txt").read_text().count("\n") > 500
    assert len(list(warmup.inspect(trained[0] / "saved_model"))) == 3


def test_the_server_finds_what_training_found(trained: tuple[Path, Path], served: Running) -> None:
    blocks = trained[1].read_text().strip().split("\n\n")
    sentences = [[line.split(" ") for line in block.splitlines()] for block in blocks]
    assert len(sentences) == 400
    found = tag(served, [" ".join(word for word, _, _ in sentence) for sentence in sentences])
    assert found == [[best for _, _, best in sentence] for sentence in sentences]
    right = [best == truth for sentence in sentences for _, truth, best in sentence]
    assert np.mean(right) > 0.9


def test_padding_and_neighbours_change_nothing(served: Running) -> None:
    sentences = ["Anna", "prices fell by four percent .", "", "nobody at Xyzzy Foundry could be reached ."]
    together = tag(served, sentences)
    assert [len(tags) for tags in together] == [1, 6, 0, 8]
    assert together == [tag(served, [sentence])[0] for sentence in sentences]
    assert together[1] == ["O"] * 6
    assert together[3][2:4] == ["B-ORG", "I-ORG"]


def test_ids_give_the_same_as_words(trained: tuple[Path, Path], served: Running) -> None:
    vocabulary = (trained[0] / "saved_model" / "assets" / "vocabulary.txt").read_text().splitlines()
    sentence = "police in Xyzzy questioned a man who worked for Bank of Xyzzy ."
    ids = [vocabulary.index(word) + 2 if word in vocabulary else 1 for word in sentence.split()]
    assert 1 in ids
    none = np.zeros([0, 3], np.int64)
    assert served.client.predict("tagger", {"ids": none}, signature="ids")["tags"].shape == (0, 3)
    padded = np.array([[*ids, 0, 0, 0]], np.int64)
    answer = served.client.predict("tagger", {"ids": padded}, signature="ids")
    assert [name.decode() for name in answer["tags"][0]] == [*tag(served, [sentence])[0], "", "", ""]
    assert answer["tag_ids"].shape == padded.shape


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("EU B-ORG\nrejects X-VERB\n", "", r"train.txt, line 2: 'X-VERB' is no tag"),
        ("EU B-ORG\n\nrejects\n", "", "train.txt, line 3: 'rejects' has no tag"),
        (
            "EU B-ORG\nEU O\n",
            "-DOCSTART- O\n\nBerlin B-LOC\n",
            "test.txt, line 3: the tag B-LOC is not in the",
        ),
        ("\n\n", "", "train.txt has no sentences"),
        ("EU O\nis B-ORG\n", "EU O\n", "train.txt: no word occurs 2 times"),
        ("EU O\nEU O\n", "EU O\n", "train.txt has only the tag O"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path: Path, train: str, test: str, message: str) -> None:
    (tmp_path / "train.txt").write_text(train)
    (tmp_path / "test.txt").write_text(test)
    files = ("--train", tmp_path / "train.txt", "--test", tmp_path / "test.txt")
    done = spikeless("train", "tagger", *files, "--runs", tmp_path / "runs")
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"spikeless: error: {tmp_path}")
    assert message in error
    assert not (tmp_path / "runs").exists()


def test_the_corpus_is_what_its_generator_makes(tmp_path: Path) -> None:
    import conll_synthetic

    conll_synthetic.generate(tmp_path, conll_synthetic.Settings())
    for name in ("train.txt", "test.txt"):
        assert (tmp_path / name).read_bytes() == (CORPUS / name).read_bytes()
    assert "CC0" in (CORPUS / "README.md").read_text()
