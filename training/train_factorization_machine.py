"""Train a second-order factorization machine on scikit-learn's breast cancer data.

In: 569 rows of 30 measurements of cell nuclei, each labelled malignant or benign.
Nothing is downloaded. Out: a run directory with a SavedModel that takes the raw
measurements, sample requests and metrics.

    spikeless train factorization_machine     # about 10 s on 2 cores, AUC over 0.97

The model (Rendle, Factorization Machines, 2010), for a row x of n features, weights w
[n], factors v [n, k]:

    y(x) = b + sum_i w_i x_i + sum_{i<j} <v_i, v_j> x_i x_j
         = b + sum_i w_i x_i + 1/2 sum_f [ (sum_i v_if x_i)^2 - sum_i v_if^2 x_i^2 ]
"""

import argparse
import sys
import time

from spikeless.training.settings import parse_settings

# Settings -----------------------------------------------------------------------------

parser = argparse.ArgumentParser(
    prog="spikeless train factorization_machine",
    description=__doc__.partition("\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--factors", type=int, default=8, help="k, the length of each feature's factor vector")
parser.add_argument("--epochs", type=int, default=40, help="passes over the training rows")
parser.add_argument("--batch-size", type=int, default=32, help="rows a step")
parser.add_argument("--learning-rate", type=float, default=0.01, help="of Adam")
parser.add_argument("--l2", type=float, default=1e-3, help="penalty on the squared weights and factors")
parser.add_argument("--test-fraction", type=float, default=0.2, help="part of the rows kept for the test")
parser.add_argument("--seed", type=int, default=1, help="of the split, the initial weights and the shuffling")
parser.add_argument("--runs", default="runs", help="where the run directory is written")
settings = parse_settings(parser)

# After the settings: --help and wrong options need no TensorFlow.
import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from spikeless.training.export import export

started = time.monotonic()
keras.utils.set_random_seed(settings.seed)  # Python's, NumPy's and TensorFlow's
tf.config.experimental.enable_op_determinism()

# Data ---------------------------------------------------------------------------------

data = load_breast_cancer()
names = [str(name).replace(" ", "_") for name in data.feature_names]  # mean_radius, mean_texture, ...
features = data.data
labels = (data.target == 0).astype(np.float32)  # scikit-learn calls malignant 0; here it is what we look for
train_features, test_features, train_labels, test_labels = train_test_split(
    features, labels, test_size=settings.test_fraction, stratify=labels, random_state=settings.seed
)
print(f"{len(train_labels)} rows to train on, {len(test_labels)} to test on, {len(names)} features")

# Model --------------------------------------------------------------------------------


class FactorizationMachine(keras.layers.Layer):
    """[batch, n] float32 standardised features -> [batch] float32 logits."""

    def __init__(self, factors: int, l2: float) -> None:
        super().__init__()
        self.factors = factors
        self.regularizer = keras.regularizers.L2(l2)

    def build(self, shape: tuple[int | None, int]) -> None:
        n = shape[-1]
        small = keras.initializers.RandomNormal(stddev=0.01)
        self.b = self.add_weight(name="bias", shape=(), initializer="zeros")
        self.w = self.add_weight(name="linear", shape=(n,), initializer="zeros", regularizer=self.regularizer)
        self.v = self.add_weight(
            name="factors", shape=(n, self.factors), initializer=small, regularizer=self.regularizer
        )

    def call(self, x: tf.Tensor) -> tf.Tensor:
        linear = tf.linalg.matvec(x, self.w)
        square_of_sum = tf.square(x @ self.v)
        sum_of_squares = tf.square(x) @ tf.square(self.v)
        return self.b + linear + 0.5 * tf.reduce_sum(square_of_sum - sum_of_squares, axis=-1)


# Standardisation is a part of the model, so that the server takes the raw measurements.
standardise = keras.layers.Normalization()
standardise.adapt(train_features)
inputs = keras.Input([len(names)], name="features")
logits = FactorizationMachine(settings.factors, settings.l2)(standardise(inputs))
model = keras.Model(inputs, keras.layers.Activation("sigmoid")(logits))

# Training -----------------------------------------------------------------------------

model.compile(keras.optimizers.Adam(settings.learning_rate), "binary_crossentropy")
model.fit(
    train_features,
    train_labels,
    batch_size=settings.batch_size,
    epochs=settings.epochs,
    verbose=1 if sys.stdout.isatty() else 2,
)


def auc(features: NDArray[np.float64], labels: NDArray[np.float32]) -> float:
    return float(roc_auc_score(labels, model.predict(features, verbose=0)))


metrics = {"train_auc": auc(train_features, train_labels), "test_auc": auc(test_features, test_labels)}
print(f"AUC: {metrics['train_auc']:.4f} on the training rows, {metrics['test_auc']:.4f} on the test rows")

# Export -------------------------------------------------------------------------------


@tf.function(input_signature=[tf.TensorSpec([None, len(names)], tf.float32, name="features")])
def predict(features: tf.Tensor) -> dict[str, tf.Tensor]:
    """Raw features [batch, 30] -> probability of malignant [batch]."""
    return {"probability": model(features)}


def parse(examples: tf.Tensor) -> tf.Tensor:
    """tf.Examples [batch], one float per feature name -> raw features [batch, 30]."""
    columns = tf.io.parse_example(examples, {name: tf.io.FixedLenFeature([], tf.float32) for name in names})
    return tf.stack([columns[name] for name in names], axis=1)


@tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
def classify(inputs: tf.Tensor) -> dict[str, tf.Tensor]:
    """tf.Examples [batch] -> class names and their probabilities, both [batch, 2]."""
    probability = model(parse(inputs))
    scores = tf.stack([1 - probability, probability], axis=1)
    classes = tf.broadcast_to(tf.constant(["benign", "malignant"]), tf.shape(scores))
    return {"classes": classes, "scores": scores}


@tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
def regress(inputs: tf.Tensor) -> dict[str, tf.Tensor]:
    """Serialized tf.Examples [batch] -> probability of malignant [batch]."""
    return {"outputs": model(parse(inputs))}


rows = test_features[:8]
examples = [dict(zip(names, row.tolist(), strict=True)) for row in rows]
run = export(
    name="factorization_machine",
    signatures={"serving_default": predict, "classify": classify, "regress": regress},
    methods={"classify": "classify", "regress": "regress"},
    samples=[
        {"signature_name": "serving_default", "instances": rows},
        {"signature_name": "classify", "examples": examples},
        {"signature_name": "regress", "examples": examples},
    ],
    settings=vars(settings),
    metrics=metrics,
    seconds=time.monotonic() - started,
    card=f"""
Probability that a breast mass is malignant, from {len(names)} measurements of the cell nuclei in an image.

A second-order factorization machine: linear weights, and for each pair of features an interaction that is
the product of their factor vectors. It takes raw measurements; they are standardised inside the model.

Data: Breast Cancer Wisconsin (Diagnostic), {len(labels)} rows, as shipped with scikit-learn, split with the
same share of malignant rows on both sides. A demonstration of serving, not a medical device.
""",
    warmup_batch_sizes=(1, 8, 32),
    runs=settings.runs,
)
print(f"run directory: {run}")
