"""What each step of training/input_pipeline.py is worth, on the same records.

In: synthetic Criteo records, written by Spark when they are not there yet. Out: a table, the raw times and a
plot in benchmarks/results/input_pipeline.md, .json and .svg.

    make bench-input-pipeline

Each rung adds one step to the rung before. A rung is timed over three epochs, once alone and once feeding a
training step of a small network; the rungs take turns, and the median of the repeats counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import criteo_synthetic
import matplotlib
import tensorflow as tf
from input_pipeline import BLOCK, CYCLE, batches, feature_specification, select

from spikeless import dataset
from spikeless.bench.machine import describe_machine, source_commit

# Settings -------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]

parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
parser.add_argument("--rows", type=int, default=50_000, help="records in 8 shards")
parser.add_argument("--batch-size", type=int, default=512, help="records a batch")
parser.add_argument("--epochs", type=int, default=3, help="passes over the records in one timing")
parser.add_argument("--repeats", type=int, default=5, help="timings of each rung")
parser.add_argument("--data", type=Path, default=ROOT / "runs" / ".data", help="where the records are kept")
parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where results go")
settings = parser.parse_args()

# Records --------------------------------------------------------------------------------------------------

made = criteo_synthetic.Settings(train_rows=settings.rows, test_rows=1)
directory = settings.data / f"criteo-synthetic-{settings.rows}"
criteo_synthetic.records(directory, made)
data = dataset.read(directory / "train")
files = [str(shard.path) for shard in data.shards]
specification = feature_specification(select(data, None))

# The ladder: each rung is one epoch of batches --------------------------------------------------------------


def naive() -> tf.data.Dataset:
    """File after file, one record parsed at a time: the loop that everybody writes first."""
    records = tf.data.TFRecordDataset(files)
    return records.map(lambda r: tf.io.parse_single_example(r, specification)).batch(settings.batch_size)


def interleave() -> tf.data.Dataset:
    """Several shards at once."""
    records = tf.data.Dataset.from_tensor_slices(files).interleave(
        tf.data.TFRecordDataset, cycle_length=CYCLE, num_parallel_calls=tf.data.AUTOTUNE
    )
    return records.map(lambda r: tf.io.parse_single_example(r, specification)).batch(settings.batch_size)


def vectorised_parse() -> tf.data.Dataset:
    """Blocks of records in one call, blocks in parallel."""
    blocks = tf.data.Dataset.from_tensor_slices(files).interleave(
        lambda file: tf.data.TFRecordDataset(file).batch(BLOCK),
        cycle_length=CYCLE,
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    return blocks.map(
        lambda block: tf.io.parse_example(block, specification), num_parallel_calls=tf.data.AUTOTUNE
    ).rebatch(settings.batch_size)


def cache() -> tf.data.Dataset:
    """Parsed blocks kept in memory."""
    blocks = tf.data.Dataset.from_tensor_slices(files).interleave(
        lambda file: tf.data.TFRecordDataset(file).batch(BLOCK),
        cycle_length=CYCLE,
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    parsed = blocks.map(
        lambda block: tf.io.parse_example(block, specification), num_parallel_calls=tf.data.AUTOTUNE
    )
    return parsed.cache().rebatch(settings.batch_size)


def prefetch() -> tf.data.Dataset:
    """input_pipeline.batches without shuffling."""
    return batches(data, settings.batch_size)


def shuffle() -> tf.data.Dataset:
    """input_pipeline.batches as training uses it: the same and shuffled, which costs instead of earning."""
    return batches(data, settings.batch_size, seed=1)


LADDER: dict[str, Callable[[], tf.data.Dataset]] = {
    "naive loop": naive,
    "+ interleave": interleave,
    "+ vectorised parse": vectorised_parse,
    "+ cache": cache,
    "+ prefetch": prefetch,
    "+ shuffle": shuffle,
}

# Timing ---------------------------------------------------------------------------------------------------

integers = [field.name for field in data.fields if field.name.startswith("I")]
network = tf.keras.Sequential([tf.keras.layers.Dense(64, "relu"), tf.keras.layers.Dense(1)])
optimizer = tf.keras.optimizers.SGD(0.01)


@tf.function(reduce_retracing=True)
def train(batch: dict[str, tf.Tensor]) -> None:
    """One step of a small network on the integer columns."""
    features = tf.math.log1p(tf.cast(tf.stack([batch[name] for name in integers], axis=1), tf.float32))
    with tf.GradientTape() as tape:
        logits = network(features)[:, 0]
        labels = tf.cast(batch["label"], tf.float32)
        loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, logits))
    optimizer.apply(tape.gradient(loss, network.trainable_variables), network.trainable_variables)


def records_per_second(rung: str, step: Callable[[dict[str, tf.Tensor]], None] | None) -> float:
    pipeline = LADDER[rung]()
    seen = 0
    started = time.perf_counter()
    for _ in range(settings.epochs):
        for batch in pipeline:
            seen += int(batch["label"].shape[0])
            if step is not None:
                step(batch)
    seconds = time.perf_counter() - started
    if seen != settings.epochs * data.records:
        raise RuntimeError(f"{rung} gave {seen} records instead of {settings.epochs * data.records}")
    return seen / seconds


for batch in batches(data, settings.batch_size):  # traces both batch sizes, outside the timing
    train(batch)
alone: dict[str, list[float]] = {rung: [] for rung in LADDER}
trained: dict[str, list[float]] = {rung: [] for rung in LADDER}
load = os.getloadavg()
for repeat in range(settings.repeats):
    for rung in LADDER:
        alone[rung].append(records_per_second(rung, None))
        trained[rung].append(records_per_second(rung, train))
        print(
            f"{repeat + 1}/{settings.repeats} {rung:20} {alone[rung][-1]:12,.0f} records/s", file=sys.stderr
        )

# Results --------------------------------------------------------------------------------------------------

commit = source_commit()
machine = describe_machine()
record = {
    "benchmark": "input_pipeline",
    "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "commit": commit,
    "machine": {
        "cpu": machine.cpu,
        "cores": machine.cpus,
        "memory_bytes": machine.memory,
        "kernel": machine.kernel,
        "load_before": load,
    },
    "versions": {"python": platform.python_version(), "tensorflow": tf.__version__},
    "settings": {key: value for key, value in vars(settings).items() if isinstance(value, int)},
    "records": data.records,
    "bytes": sum(shard.path.stat().st_size for shard in data.shards),
    "records_per_second": {"alone": alone, "with_training_step": trained},
}
median = {rung: statistics.median(values) for rung, values in alone.items()}
lines = [
    "# Input pipeline: what each step is worth",
    "",
    f"{data.records} records of 40 columns in {len(files)} shards, {settings.epochs} epochs, "
    f"median of {settings.repeats} (least to most), records/s.",
    "",
    "| step | alone | x naive | with a training step | x naive |",
    "|---|---:|---:|---:|---:|",
]
for rung in LADDER:
    cells = []
    for values in (alone, trained):
        middle = statistics.median(values[rung])
        cells.append(f"{middle:,.0f} ({min(values[rung]):,.0f} to {max(values[rung]):,.0f})")
        cells.append(f"{middle / statistics.median(values['naive loop']):.1f}")
    lines.append(f"| {rung} | {' | '.join(cells)} |")
lines += [
    "",
    f"{record['machine']['cpu']}, {record['machine']['cores']} cores, load average before {load[0]:.1f}; "
    f"TensorFlow {tf.__version__}, Python {platform.python_version()}; {record['time']}, "
    f"commit {commit}.",
]

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "spikeless", "text.color": "#808080", "font.size": 11}
from matplotlib import pyplot  # noqa: E402 (after the backend was chosen)

figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
bars = axes.barh(list(LADDER), [median[rung] for rung in LADDER], color="#1a73e8")
axes.bar_label(
    bars, [f"{median[r]:,.0f}  ({median[r] / median['naive loop']:.1f} x)" for r in LADDER], padding=4
)
axes.set_title(f"Records per second, {settings.epochs} epochs on {record['machine']['cores']} cores")
axes.invert_yaxis()
axes.margins(x=0.2)
axes.xaxis.set_visible(False)
axes.tick_params(colors="#808080", length=0)
axes.spines[:].set_visible(False)

settings.results.mkdir(parents=True, exist_ok=True)
results = settings.results / "input_pipeline"
results.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
results.with_suffix(".md").write_text("\n".join(lines) + "\n")
figure.savefig(results.with_suffix(".svg"), transparent=True, metadata={"Date": None})
print("\n".join(lines))
