"""The Spark data source on real Spark: local, and a cluster of separate processes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import spark_to_tfrecord
import tensorflow as tf
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from trained_models import NEEDS_JAVA

from spikeless.errors import AlreadyExists, DataLoss, FailedPrecondition, InvalidArgument
from spikeless.training import dataset

# One worker: Spark is started once.
pytestmark = [pytest.mark.xdist_group("spark"), NEEDS_JAVA]
SCRIPT = Path(spark_to_tfrecord.__file__)
SCHEMA = (
    "flag boolean, tiny tinyint, small smallint, i int, l bigint, f float, d double, s string, b binary, "
    "li array<bigint>, lf array<double>, ls array<string>"
)
ROWS = [
    (True, 1, 2, 3, 4, 0.5, 0.25, "naïve", b"\x00\xff", [1, 2], [0.5], ["a", ""]),
    (False, -128, -1, -2147483648, -(2**63), -1.5, float("inf"), "", b"", [], [], []),
    (None,) * 12,
]


@pytest.fixture(scope="module")
def spark() -> Iterator[SparkSession]:
    session = spark_to_tfrecord.session("local[2]")
    session.conf.set("spark.sql.shuffle.partitions", "2")
    yield session
    session.stop()


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_every_type_comes_back(spark: SparkSession, tmp_path: Path, compression: str) -> None:
    frame = spark.createDataFrame(ROWS, SCHEMA).coalesce(1)
    written = spark_to_tfrecord.write(frame, tmp_path / "data set", mode="new", compression=compression)
    assert written.records == 3
    again = spark.read.format("tfrecord").load(str(tmp_path / "data set"))
    assert again.schema == frame.schema
    assert [tuple(row) for row in again.collect()] == [tuple(row) for row in frame.collect()]
    names = leftovers(tmp_path / "data set")
    assert [name for name in names if name.startswith("_")] == ["_SUCCESS", "_counts.json", "_schema.json"]
    assert leftovers(tmp_path) == ["data set"]
    # TensorFlow reads the same: a null is a missing feature, an empty array a feature
    # without values.
    records = tf.data.TFRecordDataset(
        [str(shard.path) for shard in written.shards], "GZIP" if compression == "gzip" else ""
    )
    examples = [tf.train.Example.FromString(record) for record in records.as_numpy_iterator()]
    by_size = sorted(examples, key=lambda example: len(example.features.feature))
    assert len(by_size[0].features.feature) == 0
    features = next(e for e in examples if e.features.feature["s"].bytes_list.value == ["naïve".encode()])
    assert list(features.features.feature["li"].int64_list.value) == [1, 2]
    assert list(features.features.feature["flag"].int64_list.value) == [1]


def test_append_and_overwrite(spark: SparkSession, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = spark.range(10).repartition(2)
    assert spark_to_tfrecord.write(first, out, mode="new").records == 10
    with pytest.raises(AlreadyExists, match="--mode"):
        spark_to_tfrecord.write(first, out, mode="new")
    appended = spark_to_tfrecord.write(spark.range(10, 15), out, mode="append")
    assert appended.records == 15
    assert json.loads((out / "_counts.json").read_text())["records"] == 15
    ids = [row.id for row in spark.read.format("tfrecord").load(str(out)).collect()]
    assert sorted(ids) == list(range(15))
    with pytest.raises(InvalidArgument, match="another schema"):
        spark_to_tfrecord.write(spark.range(3).withColumnRenamed("id", "key"), out, mode="append")
    with pytest.raises(InvalidArgument, match="has compression none, not gzip"):
        spark_to_tfrecord.write(spark.range(3), out, mode="append", compression="gzip")
    assert spark_to_tfrecord.write(spark.range(3), out, mode="overwrite", compression="gzip").records == 3
    assert leftovers(tmp_path) == ["out"]


def test_an_empty_frame_is_a_dataset_without_shards(spark: SparkSession, tmp_path: Path) -> None:
    written = spark_to_tfrecord.write(spark.range(0), tmp_path / "none", mode="new")
    assert (written.records, written.shards) == (0, ())
    again = spark.read.format("tfrecord").load(str(tmp_path / "none"))
    assert again.schema == spark.range(0).schema
    assert again.collect() == []


def test_a_failed_job_leaves_nothing(spark: SparkSession, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fails = F.when(F.col("id") == 900, F.raise_error(F.lit("row 900 is bad"))).otherwise(F.col("id"))
    fails = fails.cast("long").alias("id")
    spark_to_tfrecord.write(spark.range(4).select(fails), out, mode="new")
    before = {name: (out / name).read_bytes() for name in leftovers(out)}
    frame = spark.range(0, 1000, numPartitions=4).select(fails)
    for target, mode in ((out, "overwrite"), (out, "append"), (tmp_path / "other", "new")):
        with pytest.raises(InvalidArgument, match="row 900 is bad"):
            spark_to_tfrecord.write(frame, target, mode=mode)
    assert leftovers(tmp_path) == ["out"]
    assert {name: (out / name).read_bytes() for name in leftovers(out)} == before


@pytest.mark.parametrize(
    ("schema", "row", "message"),
    [
        ("when timestamp", (None,), "column 'when' has type timestamp, which tf.Example cannot hold"),
        ("price decimal(10,2)", (None,), r"column 'price' has type decimal\(10,2\)"),
        ("deep array<array<int>>", (None,), "column 'deep' has type"),
        ("pair struct<a: int>", (None,), "column 'pair' has type"),
        ("m map<string, int>", (None,), "column 'm' has type"),
        ("a array<int>", ([1, None],), "partition 0, row 1: the array in column 'a' holds a null"),
        ("d double", (1e300,), "partition 0, row 1: 1e[+]300 in column 'd' is too large for"),
    ],
)
def test_what_cannot_be_written_is_refused(
    spark: SparkSession, tmp_path: Path, schema: str, row: tuple[object, ...], message: str
) -> None:
    frame = spark.createDataFrame([row], schema).coalesce(1)
    with pytest.raises(InvalidArgument, match=message):
        spark_to_tfrecord.write(frame, tmp_path / "out", mode="new")
    assert leftovers(tmp_path) == []


def test_wrong_options_and_targets_are_refused(spark: SparkSession, tmp_path: Path) -> None:
    writer = spark.range(1).write.format("tfrecord").mode("append")
    with pytest.raises(PySparkException, match="option 'codec' is unknown; there is: path, compression"):
        writer.option("codec", "gzip").save(str(tmp_path / "a"))
    with pytest.raises(InvalidArgument, match="compression 'zstd' is unknown"):
        spark_to_tfrecord.write(spark.range(1), tmp_path / "a", mode="new", compression="zstd")
    with pytest.raises(InvalidArgument, match="mounted file systems only"):
        spark_to_tfrecord.local_path("hdfs://name/records")
    precious = tmp_path / "home" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(InvalidArgument, match="has no _SUCCESS"):
        spark_to_tfrecord.write(spark.range(1), precious.parent, mode="overwrite")
    assert precious.read_text() == "years of work"


def test_damage_is_named(spark: SparkSession, tmp_path: Path) -> None:
    out = tmp_path / "out"
    written = spark_to_tfrecord.write(spark.range(100).coalesce(1), out, mode="new")
    (shard,) = written.shards
    content = bytearray(shard.path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    shard.path.write_bytes(content)
    with pytest.raises(PySparkException, match=rf"{shard.path.name}: record \d+ "):
        spark.read.format("tfrecord").load(str(out)).collect()
    shard.path.write_bytes(content[:-20])
    with pytest.raises(DataLoss, match="was truncated or replaced"):
        dataset.read(out)
    shard.path.unlink()
    with pytest.raises(DataLoss, match="is missing"):
        dataset.read(out)
    (out / "_SUCCESS").unlink()
    with pytest.raises(FailedPrecondition, match="not written to the end"):
        dataset.read(out)


def test_reading_with_another_schema(spark: SparkSession, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spark_to_tfrecord.write(spark.createDataFrame([(1, "x")], "a int, b string").coalesce(1), out, mode="new")
    read = spark.read.format("tfrecord")
    assert [tuple(row) for row in read.schema("b binary, c float").load(str(out)).collect()] == [(b"x", None)]
    with pytest.raises(
        PySparkException, match="record 1: 'a' is a int64_list, but the schema needs a float_list"
    ):
        read.schema("a double").load(str(out)).collect()
    with pytest.raises(PySparkException, match="record 1 has no 'c', which may not be missing"):
        read.schema("c int not null").load(str(out)).collect()


def test_nan_and_infinity_survive(spark: SparkSession, tmp_path: Path) -> None:
    frame = spark.createDataFrame([(float("nan"),), (float("-inf"),)], "d double").coalesce(1)
    spark_to_tfrecord.write(frame, tmp_path / "out", mode="new")
    nan, infinity = (row.d for row in spark.read.format("tfrecord").load(str(tmp_path / "out")).collect())
    assert math.isnan(nan)
    assert infinity == float("-inf")


# The command --------------------------------------------------------------------------


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=250)


def test_the_command_writes_the_same_on_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``local-cluster`` is Spark's standalone cluster: executors are own processes."""
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    monkeypatch.setenv("SPARK_WORKER_DIR", str(tmp_path / "workers"))
    source = tmp_path / "in.tsv"
    source.write_text("".join(f"{i % 2}\t{i}\tname {i}\n" for i in range(50)))
    schema = tmp_path / "in.ddl"
    schema.write_text("label INT NOT NULL, number BIGINT, name STRING")
    arguments: list[str | Path] = [
        "--format",
        "csv",
        "--option",
        "sep=\t",
        "--schema",
        schema,
        "--shards",
        "2",
    ]
    cluster = command(source, tmp_path / "cluster", *arguments, "--master", "local-cluster[2,1,1024]")
    assert cluster.returncode == 0, cluster.stderr
    assert cluster.stdout == f"50 records in 2 shards: {tmp_path / 'cluster'}\n"
    local = command(source, tmp_path / "local", *arguments, "--compression", "gzip")
    assert local.returncode == 0, local.stderr
    contents = []
    for name in ("cluster", "local"):
        read = dataset.read(tmp_path / name)
        gzipped = read.compression == "gzip"
        contents.append(
            sorted(
                tuple(row)
                for shard in read.shards
                for row in dataset.rows(shard, read.fields, gzipped=gzipped)
            )
        )
    assert contents[0] == contents[1] == sorted((i % 2, i, f"name {i}") for i in range(50))


def test_bad_input_is_one_clear_error(spark: SparkSession, tmp_path: Path) -> None:
    source = tmp_path / "in.tsv"
    source.write_text("1\t10\n\t11\n")
    schema = "label INT NOT NULL, number INT"
    missing = command(source, tmp_path / "out", "--format", "csv", "--option", "sep=\t", "--schema", schema)
    assert missing.returncode == 1
    error = missing.stderr.splitlines()[-1]
    assert error.startswith("spark_to_tfrecord: error: ")
    assert "in.tsv: 'label' is missing in the row {\"number\":11}" in error
    source.write_text("1\t10\nmany\t11\n")
    frame = spark_to_tfrecord.read_input(spark, str(source), "csv", schema, {"sep": "\t"})
    with pytest.raises(InvalidArgument, match=r"(?s)in\.tsv.*many"):
        spark_to_tfrecord.write(frame, tmp_path / "out", mode="new")
    assert leftovers(tmp_path) == ["in.tsv"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """The signal goes to the process group, as a terminal's does: Spark gets it too."""
    program = """
import pathlib, sys, time, spark_to_tfrecord
from pyspark.sql import functions as F
spark = spark_to_tfrecord.session("local[2]")
slow = F.udf(lambda i: time.sleep(1000), "long")
frame = spark.range(4).select(slow("id").alias("id"))
spark_to_tfrecord.write(frame, pathlib.Path(sys.argv[1]), mode="new")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "out"], env=environment, start_new_session=True
    )
    try:
        while not leftovers(tmp_path):
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, number)
        assert process.wait(200) != 0
    finally:
        process.kill()
        process.wait()
    assert leftovers(tmp_path) == []
