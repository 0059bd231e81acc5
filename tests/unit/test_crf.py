"""Conditional random fields against brute force, and what makes tf2crf importable."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from numpy.typing import NDArray

from spikeless.training import crf

Floats = NDArray[np.floating]


def case(
    seed: int, batch: int, length: int, tags: int, dtype: type[np.floating] = np.float32
) -> tuple[Floats, Floats, NDArray[np.int32], NDArray[np.int64]]:
    """Potentials, transitions, lengths from 0 up, tags."""
    random = np.random.default_rng(seed)
    potentials = (random.normal(size=[batch, length, tags]) * 3).astype(dtype)
    transitions = (random.normal(size=[tags, tags]) * 2).astype(dtype)
    lengths = np.array([length if row == 0 else row % (length + 1) for row in range(batch)], np.int32)
    truth = random.integers(0, tags, [batch, length])
    return potentials, transitions, lengths, truth


def score(potentials: Floats, transitions: Floats, path: tuple[int, ...]) -> float:
    of_tags = sum(float(potentials[step, tag]) for step, tag in enumerate(path))
    return of_tags + sum(float(transitions[pair]) for pair in itertools.pairwise(path))


@pytest.mark.parametrize(("length", "tags"), [(1, 2), (1, 4), (2, 3), (5, 3), (4, 4), (3, 1)])
@pytest.mark.parametrize("graph", [False, True])
def test_brute_force_finds_the_same(length: int, tags: int, graph: bool) -> None:
    potentials, transitions, lengths, truth = case(length * 10 + tags, 7, length, tags)
    decode, likelihood = crf.crf_decode, crf.crf_log_likelihood
    if graph:
        decode, likelihood = tf.function(decode), tf.function(likelihood)
    decoded, best = (found.numpy() for found in decode(potentials, transitions, lengths))
    found = likelihood(potentials, truth, lengths, transitions)[0].numpy()
    assert decoded.dtype == np.int32
    for row, size in enumerate(lengths):
        assert not decoded[row, size:].any()
        if size == 0:
            assert best[row] == found[row] == 0
            continue
        paths = list(itertools.product(range(tags), repeat=int(size)))
        scores = np.array([score(potentials[row], transitions, path) for path in paths])
        assert tuple(decoded[row, :size]) == paths[int(np.argmax(scores))]
        assert best[row] == pytest.approx(scores.max(), abs=1e-4)
        whole = np.logaddexp.reduce(scores)
        expected = score(potentials[row], transitions, tuple(truth[row, :size])) - whole
        assert found[row] == pytest.approx(expected, abs=1e-4)


def test_likelihoods_of_all_sequences_sum_to_one() -> None:
    potentials, transitions, _, _ = case(5, 1, 4, 3, np.float64)
    paths = np.array(list(itertools.product(range(3), repeat=4)))
    many = np.repeat(potentials, len(paths), axis=0)
    found = crf.crf_log_likelihood(many, paths, np.full(len(paths), 4), transitions)[0]
    assert np.exp(found.numpy()).sum() == pytest.approx(1, abs=1e-12)


def test_gradients_are_those_of_finite_differences() -> None:
    potentials, transitions, lengths, truth = case(6, 4, 5, 3, np.float64)

    @tf.function
    def loss(potentials: tf.Tensor, transitions: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(crf.crf_log_likelihood(potentials, truth, lengths, transitions)[0])

    theory, practice = tf.test.compute_gradient(loss, [potentials, transitions], delta=1e-5)
    for exact, measured in zip(theory, practice, strict=True):
        np.testing.assert_allclose(exact, measured, atol=1e-7)


def test_padding_and_neighbours_change_no_bit() -> None:
    potentials, transitions, lengths, truth = case(7, 9, 8, 5)
    together = crf.crf_decode(potentials, transitions, lengths)
    likelihoods = crf.crf_log_likelihood(potentials, truth, lengths, transitions)[0].numpy()
    for row, size in enumerate(lengths):
        if not size:
            continue
        alone = (potentials[row : row + 1, :size], [size])
        tags, best = crf.crf_decode(alone[0], transitions, alone[1])
        assert (tags.numpy()[0] == together[0].numpy()[row, :size]).all()
        assert best.numpy()[0] == together[1].numpy()[row]
        found = crf.crf_log_likelihood(alone[0], truth[row : row + 1, :size], alone[1], transitions)[0]
        np.testing.assert_allclose(found.numpy()[0], likelihoods[row], rtol=2e-6, atol=2e-6)


def test_large_scores_overflow_nothing() -> None:
    potentials, transitions, lengths, truth = case(8, 3, 6, 4)
    found = crf.crf_log_likelihood(potentials * 1e4, truth, lengths, transitions * 1e4)[0]
    assert np.isfinite(found.numpy()).all()


def test_saved_model_gives_the_same(tmp_path: Path) -> None:
    potentials, transitions, lengths, _ = case(9, 6, 7, 4)
    root = tf.Module()
    root.transitions = tf.Variable(transitions)

    @tf.function(input_signature=[tf.TensorSpec([None, None, 4]), tf.TensorSpec([None], tf.int32)])
    def decode(potentials: tf.Tensor, lengths: tf.Tensor) -> dict[str, tf.Tensor]:
        tags, best = crf.crf_decode(potentials, root.transitions, lengths)
        return {"tags": tags, "best": best}

    root.decode = decode
    tf.saved_model.save(root, str(tmp_path), signatures=decode)
    serve = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    for size in (1, 2, 7):
        sizes = np.minimum(lengths, size)
        here = crf.crf_decode(potentials[:, :size], transitions, sizes)
        there = serve(potentials=tf.constant(potentials[:, :size]), lengths=tf.constant(sizes))
        assert (here[0].numpy() == there["tags"].numpy()).all()
        assert (here[1].numpy() == there["best"].numpy()).all()


def test_no_sentence_at_all() -> None:
    tags, best = crf.crf_decode(
        np.zeros([0, 3, 2], np.float32), np.zeros([2, 2], np.float32), np.zeros([0], int)
    )
    assert tags.shape == (0, 3)
    assert best.shape == (0,)


def run(program: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own: Keras 2 or 3 is chosen once in each."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


PREPARED = """
from spikeless.training import crf
crf.prepare()
"""


def test_prepared_tf2crf_trains_and_decodes_with_these_functions() -> None:
    done = run(
        PREPARED
        + """
import tensorflow as tf, tf2crf, tf_keras
from tf2crf import crf as theirs
assert tf.keras.Model is tf_keras.Model
assert theirs.tfa.text.crf_decode is crf.crf_decode
from tensorflow_addons.text.crf import crf_log_likelihood
assert crf_log_likelihood is crf.crf_log_likelihood
words = tf.keras.Input([None], dtype="int64")
scores = tf.keras.layers.Embedding(5, 3, mask_zero=True)(words)
with_crf = tf.keras.Model(words, tf2crf.CRF()(scores))
model = tf2crf.ModelWithCRFLoss(with_crf, sparse_target=True)
model.compile("adam")
sentences, tags = tf.constant([[1, 2, 3], [4, 1, 0]]), tf.constant([[0, 1, 2], [2, 0, 0]])
losses = model.fit(sentences, tags, epochs=30, verbose=0).history["loss"]
assert losses[-1] < losses[0], losses
assert with_crf(sentences)[0].shape == (2, 3)
"""
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import tensorflow as tf; tf.keras.Model" + PREPARED, "tf.keras was used with Keras 3 before"),
        (
            "import importlib.util as u; find = u.find_spec\n"
            "u.find_spec = lambda name, *rest: None if name == 'tf2crf' else find(name, *rest)" + PREPARED,
            "tf2crf is not installed: run `pip install --no-deps tf2crf==0.1.33`",
        ),
        ("import sys; sys.modules['tf_keras'] = None" + PREPARED, "ModuleNotFoundError"),
    ],
)
def test_what_stands_in_the_way_of_tf2crf_is_named(program: str, message: str) -> None:
    done = run(program)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
