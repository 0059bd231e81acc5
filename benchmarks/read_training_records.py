"""What each step of training/input_pipeline.py is worth, on the same records.

In: synthetic Criteo records, written by Spark when they are not there yet. Out: a
table, the raw numbers and a plot in benchmarks/results/input_pipeline.md, .json and
.svg.

    make bench-input-pipeline

Each rung of the ladder adds one step to the rung before. A rung is timed over three
epochs, once alone and once feeding a training step of a small network. A step may do
something else in company than when it was added, so the tuned pipeline is also timed
without each of its steps. All take turns, and the median of the repeats counts. Bar:
the tuned pipeline gives at least five times the records of the naive loop.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import criteo_synthetic
import matplotlib
import tensorflow as tf
from input_pipeline import BLOCK, CYCLE, batches, feature_specification, select

from spikeless.bench.machine import describe_machine, source_commit
from spikeless.training import dataset

# Settings.

ROOT = Path(__file__).resolve().parents[1]

parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
parser.add_argument("--rows", type=int, default=50_000, help="records in 8 shards")
parser.add_argument("--batch-size", type=int, default=512, help="records a batch")
parser.add_argument("--epochs", type=int, default=3, help="passes over the records in one timing")
parser.add_argument("--repeats", type=int, default=5, help="timings of each rung")
parser.add_argument("--data", type=Path, default=ROOT / "runs" / ".data", help="where the records are kept")
parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where results go")
settings = parser.parse_args()

# Records.

# Those that `spikeless train ctr` would make and keep in the same place.
made = criteo_synthetic.Settings(train_rows=settings.rows, test_rows=settings.rows // 4)
directory = settings.data / f"criteo-synthetic-{made.train_rows}-{made.seed}"
criteo_synthetic.records(directory, made)
data = dataset.read(directory / "train")
files = [str(shard.path) for shard in data.shards]
specification = feature_specification(select(data, None))

# The ladder.

STEPS = ("interleave", "vectorised parse", "parallel parse", "cache", "prefetch")
#: How many times the records of the naive loop the tuned pipeline has to give.
BAR = 5


def pipeline(steps: Collection[str]) -> tf.data.Dataset:
    """One epoch of batches, made with these of the `STEPS`.

    Without any it is the naive loop: file after file, one record parsed at a time.
    """
    vectorised = "vectorised parse" in steps

    def read(file: str | list[str] | tf.Tensor) -> tf.data.Dataset:
        records = tf.data.TFRecordDataset(file)
        return records.batch(BLOCK) if vectorised else records

    def parse(records: tf.Tensor) -> dict[str, tf.Tensor]:
        parser = tf.io.parse_example if vectorised else tf.io.parse_single_example
        parsed: dict[str, tf.Tensor] = parser(records, specification)
        return parsed

    if "interleave" in steps:
        made = tf.data.Dataset.from_tensor_slices(files)
        made = made.interleave(read, cycle_length=CYCLE, num_parallel_calls=tf.data.AUTOTUNE)
    else:
        made = read(files)
    made = made.map(parse, num_parallel_calls=tf.data.AUTOTUNE if "parallel parse" in steps else None)
    if "cache" in steps:
        made = made.cache()
    made = made.rebatch(settings.batch_size) if vectorised else made.batch(settings.batch_size)
    return made.prefetch(tf.data.AUTOTUNE) if "prefetch" in steps else made


NAIVE, TUNED, SHUFFLED = "naive loop", f"+ {STEPS[-1]}", "+ shuffle"
LADDER: dict[str, Callable[[], tf.data.Dataset]] = {
    NAIVE: lambda: pipeline(()),
    **{f"+ {step}": partial(pipeline, STEPS[:count]) for count, step in enumerate(STEPS, start=1)},
    # What training gets. In order it is the pipeline of all steps; shuffling costs, and
    # no step replaces it.
    TUNED: lambda: batches(data, settings.batch_size),
    SHUFFLED: lambda: batches(data, settings.batch_size, seed=1),
}
WITHOUT: dict[str, Callable[[], tf.data.Dataset]] = {
    step: partial(pipeline, [other for other in STEPS if other != step]) for step in STEPS
}

# Timing.

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


def records_per_second(
    make: Callable[[], tf.data.Dataset], step: Callable[[dict[str, tf.Tensor]], None] | None
) -> float:
    made = make()
    seen = 0
    started = time.perf_counter()
    for _ in range(settings.epochs):
        for batch in made:
            seen += int(batch["label"].shape[0])
            if step is not None:
                step(batch)
    seconds = time.perf_counter() - started
    if seen != settings.epochs * data.records:
        raise RuntimeError(f"{seen} records came out instead of {settings.epochs * data.records}")
    return seen / seconds


for batch in batches(data, settings.batch_size):  # traces both batch sizes, outside the timing
    train(batch)
alone: dict[str, list[float]] = {rung: [] for rung in LADDER}
trained: dict[str, list[float]] = {rung: [] for rung in LADDER}
without: dict[str, list[float]] = {step: [] for step in STEPS}
load = os.getloadavg()
for repeat in range(1, settings.repeats + 1):
    for rung, make in LADDER.items():
        alone[rung].append(records_per_second(make, None))
        trained[rung].append(records_per_second(make, train))
        print(f"{repeat}/{settings.repeats} {rung:28} {alone[rung][-1]:12,.0f} records/s", file=sys.stderr)
    for step, make in WITHOUT.items():
        without[step].append(records_per_second(make, train))
        name = f"tuned without {step}"
        print(f"{repeat}/{settings.repeats} {name:28} {without[step][-1]:12,.0f} records/s", file=sys.stderr)

# Results.

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
    "records_per_second": {
        "alone": alone,
        "with_training_step": trained,
        "with_training_step_without": without,
    },
}
median = {rung: statistics.median(values) for rung, values in alone.items()}
times = {rung: value / median[NAIVE] for rung, value in median.items()}
trained_median = {rung: statistics.median(values) for rung, values in trained.items()}


def cells(values: list[float], naive: float) -> str:
    middle = statistics.median(values)
    return f"{middle:,.0f} ({min(values):,.0f} to {max(values):,.0f}) | {middle / naive:.1f}"


lines = [
    "# Input pipeline: what each step is worth",
    "",
    f"{data.records:,} records of {len(data.fields)} columns in {len(files)} shards, read {settings.epochs} "
    f"times from the page cache. Records a second: median of {settings.repeats} (least to most).",
    "",
    "| step | alone | x naive | with a training step | x naive | tuned pipeline without it |",
    "|---|---:|---:|---:|---:|---:|",
]
for rung in LADDER:
    step = rung.removeprefix("+ ")
    left = f"{statistics.median(without[step]) / trained_median[TUNED]:.2f} x" if step in without else ""
    columns = (cells(alone[rung], median[NAIVE]), cells(trained[rung], trained_median[NAIVE]), left)
    lines.append(f"| {rung} | {' | '.join(columns)} |")
lines += [
    "",
    f"Bar: the tuned pipeline (`{TUNED}`) at least {BAR} times the naive loop, on the same records: "
    f"{times[TUNED]:.1f} times, {'reached' if times[TUNED] >= BAR else 'MISSED'}. "
    f"Shuffled, as training uses it: {times[SHUFFLED]:.1f} times.",
    "",
    "How to read it: each row adds one step to the row above. The last column takes that step out of the "
    "tuned pipeline, with the training step: below 1 it earns its place, about 1 it changes nothing here.",
    "",
    "- *interleave* hides the wait for storage, for which it is there. In the page cache there is no wait, "
    "and records that change threads one by one cost time; once they travel in blocks, hardly any.",
    "- *cache* spares all passes but the first the reading and parsing: it is worth more, the more passes.",
    "- *prefetch* overlaps with the training step; alone there is nothing to overlap with.",
    "- *shuffle* is the price of a random order, which the naive loop does not pay: each record is copied.",
]
lines += [
    "",
    f"{machine.cpu}, {machine.cpus} cores, load average before {load[0]:.1f}; "
    f"TensorFlow {tf.__version__}, Python {platform.python_version()}; {record['time']}, "
    f"commit {commit}.",
]

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "spikeless", "text.color": "#808080", "font.size": 11}
from matplotlib import pyplot  # noqa: E402 (after the backend was chosen)

figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
axes.barh(list(LADDER), [median[rung] for rung in LADDER], color="#1a73e8")
for row, rung in enumerate(LADDER):  # in a column of its own, where no line crosses the numbers
    label = f"{median[rung]:,.0f}  ({times[rung]:.1f} x)"
    axes.text(1.02, row, label, va="center", transform=axes.get_yaxis_transform())
axes.axvline(BAR * median[NAIVE], color="#808080", linestyle=":", zorder=0)
axes.text(BAR * median[NAIVE], -0.6, f" bar: {BAR} x the naive loop", va="center")
axes.set_title(f"Records per second, {settings.epochs} epochs on {machine.cpus} cores", pad=16)
axes.invert_yaxis()
axes.xaxis.set_visible(False)
axes.tick_params(colors="#808080", length=0)
axes.spines[:].set_visible(False)

settings.results.mkdir(parents=True, exist_ok=True)
results = settings.results / "input_pipeline"
results.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
results.with_suffix(".md").write_text("\n".join(lines) + "\n")
figure.savefig(results.with_suffix(".svg"), transparent=True, metadata={"Date": None})
print("\n".join(lines))
