"""Read a directory of TFRecords with tf.data as it should be read.

In: a directory that training/spark_to_tfrecord.py wrote. Out: batches, a dictionary of
tensors by column: [batch] for a scalar column, a ragged [batch, None] for an array;
int64, float32 or string.

    python training/input_pipeline.py clicks-tfrecord       # its records a second here

benchmarks/read_training_records.py measures what each step is worth:

    interleave    several shards are read at once, which hides the wait for storage
    parse         a whole block of tf.Examples in one call, blocks in parallel
    cache         parsed blocks are kept: the second epoch reads and parses nothing
    shuffle       blocks in random order, then records inside several blocks at once
    prefetch      the next batch is made while the model works on this one
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tensorflow as tf

from spikeless.errors import InvalidArgument, SpikelessError
from spikeless.training import dataset

#: Records that are read, parsed and cached together: enough that a block's overhead
#: does not matter.
BLOCK = 1024
#: Shards that are read at once.
CYCLE = 8
#: Blocks whose order is shuffled, and how many of them are then mixed record by record.
SHUFFLE_BLOCKS = 256
MIX_BLOCKS = 8

COMPRESSION = {"none": "", "gzip": "GZIP"}
DTYPES = {"int64_list": tf.int64, "float_list": tf.float32, "bytes_list": tf.string}


def batches(
    data: dataset.Dataset,
    batch_size: int,
    *,
    columns: Sequence[str] | None = None,
    required: Sequence[str] = (),
    null_integer: int = 0,
    cache: bool | str | Path = True,
    seed: int | None = None,
    drop_remainder: bool = False,
) -> tf.data.Dataset:
    """One epoch of a dataset, batched; another iteration is another order.

    Args:
        data: what `spikeless.training.dataset.read` returned.
        batch_size: records a batch.
        columns: the columns wanted; all of them if None.
        required: columns in which a null is an error (see `naming_faults`). Elsewhere
            it becomes an empty string, 0.0, or ``null_integer``.
        cache: keep parsed records in memory; or in files, given a path to start their
            names with; or not.
        seed: shuffle, in an order that this seed and TensorFlow's global one decide;
            None keeps the order of the shards.
        drop_remainder: leave out a last batch that is not full.

    Raises:
        InvalidArgument: the dataset is empty, or lacks a column.
    """
    fields = select(data, columns, required)
    if not data.records:
        raise InvalidArgument(f"{data.path} holds no records; write it again from an input that has rows")
    specification = feature_specification(fields, null_integer)
    files = [str(shard.path) for shard in data.shards]

    def read(file: tf.Tensor) -> tf.data.Dataset:
        return tf.data.TFRecordDataset(file, COMPRESSION[data.compression]).batch(BLOCK)

    def parse(block: tf.Tensor) -> dict[str, tf.Tensor]:
        parsed: dict[str, tf.Tensor] = tf.io.parse_example(block, specification)
        return parsed

    def mix(block: dict[str, tf.Tensor], random: tf.Tensor) -> dict[str, tf.Tensor]:
        first = next(iter(block.values()))
        count = first.nrows() if isinstance(first, tf.RaggedTensor) else tf.shape(first)[0]
        order = tf.random.experimental.stateless_shuffle(tf.range(count), random)
        return {name: tf.gather(values, order) for name, values in block.items()}

    blocks = tf.data.Dataset.from_tensor_slices(files)
    blocks = blocks.interleave(read, cycle_length=CYCLE, num_parallel_calls=tf.data.AUTOTUNE)
    blocks = blocks.map(parse, num_parallel_calls=tf.data.AUTOTUNE)
    if cache:
        blocks = blocks.cache("" if cache is True else str(cache))
    if seed is not None:
        blocks = blocks.shuffle(SHUFFLE_BLOCKS, seed=seed)
        numbers = tf.data.Dataset.random(seed, rerandomize_each_iteration=True).batch(2)
        blocks = tf.data.Dataset.zip(blocks.rebatch(MIX_BLOCKS * BLOCK), numbers)
        blocks = blocks.map(mix, num_parallel_calls=tf.data.AUTOTUNE)
    made = blocks.rebatch(batch_size, drop_remainder=drop_remainder).prefetch(tf.data.AUTOTUNE)

    options = tf.data.Options()
    # With a seed, the same order every time is what was asked for; without one, that of
    # the shards.
    options.deterministic = True
    return made.with_options(options)


def select(
    data: dataset.Dataset, columns: Sequence[str] | None, required: Sequence[str] = ()
) -> tuple[dataset.Field, ...]:
    """The fields of ``columns``, nullable unless ``required``; all must exist."""
    known = {field.name: field for field in data.fields}
    names = list(known) if columns is None else list(columns)
    for name in [*names, *required]:
        if name not in known:
            raise InvalidArgument(f"{data.path} has no column {name!r}; there is: {', '.join(known)}")
    return tuple(
        dataset.Field(name, known[name].element, known[name].array, nullable=name not in required)
        for name in names
    )


def feature_specification(
    fields: Sequence[dataset.Field], null_integer: int = 0
) -> dict[str, tf.io.FixedLenFeature | tf.io.RaggedFeature]:
    """What ``tf.io.parse_example`` needs to know of the fields."""
    nulls = {"int64_list": null_integer, "float_list": 0.0, "bytes_list": b""}
    return {
        field.name: tf.io.RaggedFeature(DTYPES[field.kind], row_splits_dtype=tf.int64)
        if field.array
        else tf.io.FixedLenFeature(
            [], DTYPES[field.kind], default_value=nulls[field.kind] if field.nullable else None
        )
        for field in fields
    }


@contextmanager
def naming_faults(data: dataset.Dataset, fields: Sequence[dataset.Field]) -> Iterator[None]:
    """Report TensorFlow's reading and parsing errors with the file and the record."""
    try:
        yield
    except (tf.errors.DataLossError, tf.errors.InvalidArgumentError):
        dataset.find_fault(data, fields)
        raise  # the records are good: it was something else


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", help="written by training/spark_to_tfrecord.py")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=3)
    settings = parser.parse_args()
    data = dataset.read(settings.directory)
    pipeline = batches(data, settings.batch_size, seed=1)
    for epoch in range(1, settings.epochs + 1):
        started = time.monotonic()
        with naming_faults(data, data.fields):
            for _ in pipeline:
                pass
        rate = data.records / (time.monotonic() - started)
        print(f"epoch {epoch}: {rate:,.0f} records/s")


if __name__ == "__main__":
    try:
        main()
    except SpikelessError as error:
        print(f"input_pipeline: error: {error}", file=sys.stderr)
        sys.exit(1)
