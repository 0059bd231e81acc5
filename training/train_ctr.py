"""Train a Wide & Deep click-through model with hashed embeddings on Criteo records.

In: tab-separated files in the Criteo format, or directories of TFRecords with the same
columns; if none are given, synthetic ones are made. Out: a run directory with a
SavedModel that ranks up to 100 candidates for one user in a request.

    spikeless train ctr                         # about 3 min on 2 cores, AUC over 0.80
    spikeless train ctr --table-rows 60000000   # 4 GB of embeddings, 13 GB of memory
    spikeless train ctr --train day_0.tsv --test day_1.tsv

Files become TFRecords first, once, under RUNS/.data. This process writes them; with
--spark, Spark does (Java 17 or newer). Where the files outgrow one machine, let a
cluster write them beforehand: training/spark_to_tfrecord.py.

The model (Cheng et al., Wide & Deep Learning for Recommender Systems, 2016), for a row
with categories c and integers n:

    click = sigmoid(wide + deep)
    wide  = b + one weight for each c, and for each pair of a user's and a candidate's c
    deep  = network of the embeddings of all c, and of log(1 + n)

It is the kind of model whose hot reloads hurt most: gigabytes of embeddings, and
milliseconds to answer in.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

from spikeless.training.settings import parse_settings

# Settings -----------------------------------------------------------------------------

parser = argparse.ArgumentParser(
    prog="spikeless train ctr",
    description=__doc__.partition("\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--train", type=Path, help="file or TFRecords to train on; synthetic if not given")
parser.add_argument("--test", type=Path, help="file or TFRecords to test on")
parser.add_argument(
    "--spark", action="store_true", default=False, help="let Spark turn files into TFRecords; needs Java 17"
)
parser.add_argument(
    "--synthetic-rows", type=int, default=200_000, help="to train on, and a quarter as many to test"
)
parser.add_argument("--table-rows", type=int, default=100_000, help="embeddings; ids are hashed into so many")
parser.add_argument("--dimensions", type=int, default=16, help="of an embedding; 4 bytes each")
parser.add_argument("--hidden", type=int, nargs="+", default=[128, 64], help="units of the network's layers")
parser.add_argument("--epochs", type=int, default=4, help="passes over the training records")
parser.add_argument("--batch-size", type=int, default=512, help="records a step")
parser.add_argument("--learning-rate", type=float, default=0.003, help="of the network (Adam)")
parser.add_argument("--table-learning-rate", type=float, default=0.1, help="of the embeddings (Adagrad)")
parser.add_argument("--candidates", type=int, default=100, help="in the largest sample request")
parser.add_argument(
    "--xla",
    action=argparse.BooleanOptionalAction,
    default=False,
    help="compile the network; TensorFlow Serving then needs --xla_cpu_compilation_enabled",
)
parser.add_argument("--seed", type=int, default=1, help="of the data, the initial weights and the shuffling")
parser.add_argument("--runs", default="runs", help="where the run directory is written")
settings = parse_settings(parser)
if settings.synthetic_rows < 100:
    parser.error("--synthetic-rows must be 100 or more, for clicks to be among those of the test")
if (settings.train is None) != (settings.test is None):
    parser.error("--train and --test belong together")
if min(settings.hidden) < 1:
    parser.error("--hidden must be 1 or more")
if settings.spark:
    import spark_to_tfrecord

    spark_to_tfrecord.require_java()

# After the settings: --help and wrong options need no TensorFlow.
import criteo
import criteo_synthetic
import keras
import numpy as np
import scipy.sparse
import tensorflow as tf
from criteo import CATEGORIES, INTEGERS, USER_CATEGORIES
from input_pipeline import batches, naming_faults, select
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from spikeless.errors import InvalidArgument
from spikeless.training import dataset
from spikeless.training.export import export

started = time.monotonic()
keras.utils.set_random_seed(settings.seed)  # Python's, NumPy's and TensorFlow's

# Data ---------------------------------------------------------------------------------

INTEGER_NAMES = [f"I{number}" for number in range(1, INTEGERS + 1)]
CATEGORY_NAMES = [f"C{number}" for number in range(1, CATEGORIES + 1)]
COLUMNS = ["label", *INTEGER_NAMES, *CATEGORY_NAMES]
#: I1-I6 describe the user, as C1-C13 do; the rest describes the candidate.
USER_INTEGERS = 6
#: Integers are counts; this stands for one that is not known, and Criteo's few below
#: zero are taken for it.
MISSING = -1

metrics = {}
kept = Path(settings.runs, ".data")
if settings.train is None:
    made = criteo_synthetic.Settings(
        train_rows=settings.synthetic_rows, test_rows=settings.synthetic_rows // 4, seed=settings.seed
    )
    folder = kept / f"criteo-synthetic-{settings.synthetic_rows}-{settings.seed}"
    facts = criteo_synthetic.records(folder, made, spark=settings.spark)
    metrics["test_auc_ceiling"] = facts["test_auc_ceiling"]
    settings.train, settings.test = folder / "train", folder / "test"
train, test = (criteo.records(path, kept, spark=settings.spark) for path in (settings.train, settings.test))


def check_types(data: dataset.Dataset) -> None:
    """Refuses columns that are not of the Criteo format's types."""
    for field in select(data, COLUMNS):
        wanted = "bytes_list" if field.name in CATEGORY_NAMES else "int64_list"
        if field.array or field.kind != wanted:
            found = f"an array of {field.element}" if field.array else field.element
            expected = "string" if wanted == "bytes_list" else "an integer"
            raise InvalidArgument(
                f"{data.path}: column {field.name!r} is {found}, not {expected}; write it again with the "
                "types of training/data/criteo.ddl"
            )


def labels_of(data: dataset.Dataset) -> NDArray[np.int64]:
    """The labels [records]; refuses data without both 0 and 1, or with others."""
    fields = select(data, ["label"], ["label"])
    with naming_faults(data, fields):
        made = batches(data, 4096, columns=["label"], required=["label"], cache=False)
        labels: NDArray[np.int64] = np.concatenate([batch["label"].numpy() for batch in made])
    if not np.isin(labels, [0, 1]).all():
        for shard in data.shards:
            rows = dataset.rows(shard, fields, gzipped=data.compression == "gzip")
            for number, (label,) in enumerate(rows, start=1):
                if label not in (0, 1):
                    raise InvalidArgument(f"{shard.path}: record {number} has the label {label}, not 0 or 1")
    if len(np.unique(labels)) < 2:
        raise InvalidArgument(f"{data.path} has only the label {labels[0]}: there is nothing to tell apart")
    return labels


def inputs_of(batch: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Integers [batch, 13] int64 and categories [batch, 26] string of a batch."""
    integers = tf.stack([batch[name] for name in INTEGER_NAMES], axis=1)
    return integers, tf.stack([batch[name] for name in CATEGORY_NAMES], axis=1)


check_types(train)
check_types(test)
train_labels, test_labels = labels_of(train), labels_of(test)
reading: dict[str, Any] = {"columns": COLUMNS, "required": ["label"], "null_integer": MISSING}
train_batches = batches(train, settings.batch_size, seed=settings.seed, **reading)
test_batches = batches(test, 4096, **reading)
print(f"{train.records} records to train on, {test.records} to test on, {train_labels.mean():.1%} clicks")

# Model --------------------------------------------------------------------------------

# The same value means something else in another column: each column turns its hashes in
# a way of its own.
SALTS = tf.constant(np.random.default_rng(0).integers(0, 1 << 62, CATEGORIES), tf.int64)
limit = math.sqrt(1 / settings.dimensions)
embeddings = tf.Variable(
    tf.random.uniform([settings.table_rows, settings.dimensions], -limit, limit), name="embeddings"
)
weights = tf.Variable(tf.zeros([settings.table_rows]), name="weights")
click_rate = train_labels.mean()
bias = tf.Variable(math.log(click_rate / (1 - click_rate)), name="bias", dtype=tf.float32)
network = keras.Sequential(
    [keras.Input([CATEGORIES * settings.dimensions + 2 * INTEGERS])]
    + [keras.layers.Dense(units, "relu", name=f"hidden{units}") for units in settings.hidden]
    + [keras.layers.Dense(1, name="deep")]
)


def hash_of(categories: tf.Tensor, salts: tf.Tensor) -> tf.Tensor:
    """[batch, n] string -> [batch, n] int64, not negative, different by column."""
    return tf.bitwise.bitwise_xor(tf.strings.to_hash_bucket_fast(categories, 1 << 62), salts)


def rows_of(hashes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Hashes [batch, 26] -> rows of embeddings [batch, 26], of weights [batch, 39]."""
    user, candidate = hashes[:, :USER_CATEGORIES], hashes[:, USER_CATEGORIES:]
    pairs = tf.bitwise.bitwise_xor(user, candidate * 3)
    return hashes % settings.table_rows, tf.concat([hashes, pairs], axis=1) % settings.table_rows


@tf.function(jit_compile=settings.xla)
def logits_of(vectors: tf.Tensor, wide: tf.Tensor, integers: tf.Tensor) -> tf.Tensor:
    """Embeddings [n, 26, d], wide weights [n, 39], integers [n, 13] -> logits [n]."""
    known = tf.cast(integers >= 0, tf.float32)
    magnitudes = tf.math.log1p(tf.cast(tf.maximum(integers, 0), tf.float32))
    flat = tf.reshape(vectors, [-1, CATEGORIES * settings.dimensions])
    deep = network(tf.concat([flat, known * magnitudes, known], axis=1))
    return bias + tf.reduce_sum(wide, axis=1) + deep[:, 0]


def predict_hashes(integers: tf.Tensor, hashes: tf.Tensor) -> tf.Tensor:
    """Integers [batch, 13] and hashes [batch, 26] -> click probability [batch]."""
    deep_rows, wide_rows = rows_of(hashes)
    vectors, wide = tf.gather(embeddings, deep_rows), tf.gather(weights, wide_rows)
    return tf.sigmoid(logits_of(vectors, wide, integers))


# Training -----------------------------------------------------------------------------

optimizer = keras.optimizers.Adam(settings.learning_rate)
dense = [bias, *network.trainable_variables]
# Adagrad with one sum a row: what a step touches are the rows of its batch, however
# large the table is.
sums = {
    table.ref(): tf.Variable(tf.fill([settings.table_rows], 0.1), trainable=False)
    for table in (embeddings, weights)
}


def update(table: tf.Variable, rows: tf.Tensor, gradient: tf.Tensor) -> None:
    """One Adagrad step on the ``rows`` [n] of a table; gradient [n] or [n, d]."""
    square = tf.square(gradient)
    if gradient.shape.rank > 1:
        square = tf.reduce_mean(square, axis=1)
    total = sums[table.ref()]
    total.scatter_add(tf.IndexedSlices(square, rows))
    rate = settings.table_learning_rate * tf.math.rsqrt(tf.gather(total, rows))
    rate = tf.reshape(rate, [-1] + [1] * (gradient.shape.rank - 1))
    table.scatter_sub(tf.IndexedSlices(rate * gradient, rows))


@tf.function(reduce_retracing=True)
def step(batch: dict[str, tf.Tensor]) -> tf.Tensor:
    """One step on a batch; returns its mean loss."""
    integers, categories = inputs_of(batch)
    deep_rows, wide_rows = rows_of(hash_of(categories, SALTS))
    vectors, wide = tf.gather(embeddings, deep_rows), tf.gather(weights, wide_rows)
    with tf.GradientTape() as tape:
        tape.watch([vectors, wide])
        logits = logits_of(vectors, wide, integers)
        labels = tf.cast(batch["label"], tf.float32)
        loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, logits))
    of_vectors, of_wide, *of_dense = tape.gradient(loss, [vectors, wide, *dense])
    scale = tf.cast(tf.shape(labels)[0], tf.float32)  # a row's step must not shrink as the batch grows
    update(embeddings, tf.reshape(deep_rows, [-1]), scale * tf.reshape(of_vectors, [-1, settings.dimensions]))
    update(weights, tf.reshape(wide_rows, [-1]), scale * tf.reshape(of_wide, [-1]))
    optimizer.apply(of_dense, dense)
    return loss


@tf.function(reduce_retracing=True)
def predict_batch(batch: dict[str, tf.Tensor]) -> tf.Tensor:
    integers, categories = inputs_of(batch)
    return predict_hashes(integers, hash_of(categories, SALTS))


def test_auc() -> float:
    probabilities = np.concatenate([predict_batch(batch).numpy() for batch in test_batches])
    return float(roc_auc_score(test_labels, probabilities))


optimizer.build(dense)
with naming_faults(train, select(train, COLUMNS, ["label"])):
    for epoch in range(1, settings.epochs + 1):
        bar = keras.utils.Progbar(
            math.ceil(train.records / settings.batch_size), verbose=1 if sys.stdout.isatty() else 0
        )
        loss = keras.metrics.Mean()
        for batch in train_batches:
            value = step(batch)
            loss.update_state(value)
            bar.add(1, [("loss", value)])
        with naming_faults(test, select(test, COLUMNS, ["label"])):
            metrics["test_auc"] = test_auc()
        print(f"epoch {epoch}: training loss {loss.result():.4f}, test AUC {metrics['test_auc']:.4f}")

# Baseline: a logistic regression on the same columns ----------------------------------


def one_hot(data: dataset.Dataset) -> scipy.sparse.csr_matrix:
    """[records, 2**16 + 26]: a one for each category, and the model's integers."""
    width = 1 << 16
    parts = []
    for batch in batches(data, 4096, cache=False, **reading):
        integers, categories = inputs_of(batch)
        columns = (hash_of(categories, SALTS) % width).numpy()
        indices = scipy.sparse.csr_matrix(
            (np.ones(columns.size), columns.ravel(), np.arange(0, columns.size + 1, CATEGORIES)),
            [len(columns), width],
        )
        integers = integers.numpy()
        known = (integers >= 0).astype(float)
        magnitudes = np.log1p(np.maximum(integers, 0)) * known
        parts.append(scipy.sparse.hstack([indices, magnitudes, known], format="csr"))
    return scipy.sparse.vstack(parts, format="csr")


baseline = LogisticRegression(C=0.1, max_iter=500).fit(one_hot(train), train_labels)
metrics["test_auc_logistic"] = float(roc_auc_score(test_labels, baseline.decision_function(one_hot(test))))
metrics["test_click_rate"] = float(test_labels.mean())
print("test AUC: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if "auc" in name))

# Export -------------------------------------------------------------------------------


@tf.function(
    input_signature=[
        tf.TensorSpec([None, INTEGERS], tf.int64, name="integers"),
        tf.TensorSpec([None, CATEGORIES], tf.string, name="categories"),
    ]
)
def predict(integers: tf.Tensor, categories: tf.Tensor) -> dict[str, tf.Tensor]:
    """Integers [n, 13] (-1: not known), categories [n, 26] -> probability [n]."""
    return {"probability": predict_hashes(integers, hash_of(categories, SALTS))}


@tf.function(
    input_signature=[
        tf.TensorSpec([1, USER_INTEGERS], tf.int64, name="user_integers"),
        tf.TensorSpec([1, USER_CATEGORIES], tf.string, name="user_categories"),
        tf.TensorSpec([None, INTEGERS - USER_INTEGERS], tf.int64, name="candidate_integers"),
        tf.TensorSpec([None, CATEGORIES - USER_CATEGORIES], tf.string, name="candidate_categories"),
    ]
)
def rank(
    user_integers: tf.Tensor,
    user_categories: tf.Tensor,
    candidate_integers: tf.Tensor,
    candidate_categories: tf.Tensor,
) -> dict[str, tf.Tensor]:
    """One user [1, ...], hashed once, and candidates [n, ...] -> probability [n]."""
    count = tf.shape(candidate_integers)[0]
    user_hashes = hash_of(user_categories, SALTS[:USER_CATEGORIES])
    candidate_hashes = hash_of(candidate_categories, SALTS[USER_CATEGORIES:])
    integers = tf.concat([tf.repeat(user_integers, count, axis=0), candidate_integers], axis=1)
    hashes = tf.concat([tf.repeat(user_hashes, count, axis=0), candidate_hashes], axis=1)
    return {"probability": predict_hashes(integers, hashes)}


sample = next(iter(test_batches))
integers, categories = (values.numpy()[: settings.candidates] for values in inputs_of(sample))
categories = np.char.decode(categories.astype(bytes)).tolist()
integers = integers.tolist()


def rank_request(candidates: int) -> dict[str, Any]:
    return {
        "signature_name": "rank",
        "inputs": {
            "user_integers": [integers[0][:USER_INTEGERS]],
            "user_categories": [categories[0][:USER_CATEGORIES]],
            "candidate_integers": [row[USER_INTEGERS:] for row in integers[:candidates]],
            "candidate_categories": [row[USER_CATEGORIES:] for row in categories[:candidates]],
        },
    }


def predict_request(count: int) -> dict[str, Any]:
    return {
        "signature_name": "serving_default",
        "inputs": {"integers": integers[:count], "categories": categories[:count]},
    }


compiled = """
The network is compiled by XLA, which TensorFlow Serving has switched off: start it with
`--xla_cpu_compilation_enabled`. Without that the model's warmup fails, and so does the load.
"""
sizes = sorted({1, min(10, len(integers)), len(integers)})
run = export(
    name="ctr",
    signatures={"serving_default": predict, "rank": rank},
    samples=[request(size) for request in (rank_request, predict_request) for size in sizes],
    settings=vars(settings),
    metrics=metrics,
    seconds=time.monotonic() - started,
    card=f"""
Probability of a click, from 13 integers and 26 categories of a user and a candidate (Criteo format).

Wide & Deep: categories are hashed into one table of {settings.table_rows} embeddings of {settings.dimensions}
dimensions ({settings.table_rows * settings.dimensions * 4 / 1e6:,.1f} MB). `rank` takes one user and many
candidates, up to {
        settings.candidates
    } in the sample requests; `serving_default` takes complete rows. Do not put
several `rank` requests into one batch on the server: each has a user of its own.
{compiled if settings.xla else ""}
Data: {train.records} records to train on, {test.records} to test on. {
        "SYNTHETIC: made by training/criteo_synthetic.py, never clicked by anyone; `test_auc_ceiling` is the "
        "AUC of the probabilities that the labels were drawn with, which no model can beat but by chance."
        if "test_auc_ceiling" in metrics
        else ""
    }
`test_auc_logistic` is a logistic regression on the same columns.
""",
    warmup_batch_sizes=(),
    runs=settings.runs,
)
print(f"run directory: {run}")
