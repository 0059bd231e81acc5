"""Write a Spark DataFrame as sharded TFRecords of tf.Example, and read them back.

In: anything that Spark reads. Out: a directory that `spikeless.training.dataset`
describes: shards, schema, counts and a success marker. It appears whole or not at all;
a job that fails or is interrupted leaves nothing behind. After a `kill -9` or a power
cut one hidden directory beside it, .<name>.<job>.tmp, can be deleted.

    python training/spark_to_tfrecord.py clicks.parquet clicks-tfrecord --shards 8
    python training/spark_to_tfrecord.py day_0.tsv day-0 --format csv \\
        --option 'sep=\\t' --schema training/data/criteo.ddl

It runs on this machine's cores unless spark-submit, --master or spark-defaults.conf
name a cluster. There, the workers need this project's Python environment
(PYSPARK_PYTHON) and the output directory must be on a file system that all of them
mount at the same place. From other Spark programs, the data source ``tfrecord``:

    from spark_to_tfrecord import TFRecordDataSource
    spark.dataSource.register(TFRecordDataSource)
    writer = frame.write.format("tfrecord").mode("overwrite")
    writer.option("compression", "gzip").save("/data/clicks")
    spark.read.format("tfrecord").load("/data/clicks")

Spark needs Java 17 or newer.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

from py4j.protocol import Py4JError, Py4JJavaError
from pyspark import SparkConf, TaskContext, cloudpickle
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.datasource import (
    DataSource,
    DataSourceArrowWriter,
    DataSourceReader,
    InputPartition,
    WriterCommitMessage,
)
from pyspark.sql.types import StructType

from spikeless.disk import atomic
from spikeless.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, SpikelessError
from spikeless.formats import tfrecord
from spikeless.training import dataset

if TYPE_CHECKING:
    import pyarrow

# The data source ----------------------------------------------------------------------


class TFRecordDataSource(DataSource):
    """Options: ``path``; to write also ``compression`` and ``job`` (in file names)."""

    @classmethod
    def name(cls) -> str:
        return "tfrecord"

    def schema(self) -> StructType:
        return StructType.fromJson(dict(dataset.read(self._path("path")).schema))

    def reader(self, schema: StructType) -> DataSourceReader:
        return TFRecordReader(dataset.read(self._path("path")), dataset.fields_of(schema.jsonValue()))

    def writer(self, schema: StructType, overwrite: bool) -> DataSourceArrowWriter:
        path = self._path("path", "compression", "job")
        compression = self.options.get("compression", "none").lower()
        if compression not in dataset.SUFFIXES:
            raise InvalidArgument(
                f"compression {compression!r} is unknown; there is: {', '.join(dataset.SUFFIXES)}"
            )
        job = self.options.get("job", secrets.token_hex(4))
        return TFRecordWriter(path, schema.jsonValue(), overwrite, compression, job)

    def _path(self, *known: str) -> Path:
        unknown = sorted(set(self.options) - set(known))
        if unknown:
            raise InvalidArgument(f"option {unknown[0]!r} is unknown; there is: {', '.join(known)}")
        if "path" not in self.options:
            raise InvalidArgument("name the directory: load(path) or save(path)")
        return local_path(self.options["path"])


def local_path(uri: str) -> Path:
    """A path or ``file:`` URI as an absolute path; other schemes are refused."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    if parts.scheme:
        raise InvalidArgument(
            f"{uri}: records are written to mounted file systems only; mount it, name the path"
        )
    return Path(uri).absolute()


def staging_of(target: Path, job: str) -> Path:
    """Where a job keeps what it writes until all of it is there."""
    return target.with_name(f".{target.name}.{job}.tmp")


class TFRecordReader(DataSourceReader):
    """One partition a shard; Spark wants one for an empty dataset too."""

    def __init__(self, source: dataset.Dataset, fields: tuple[dataset.Field, ...]) -> None:
        self.shards = source.shards
        self.gzipped = source.compression == "gzip"
        self.fields = fields

    def partitions(self) -> list[InputPartition]:
        return [InputPartition([shard]) for shard in self.shards] or [InputPartition([])]

    def read(self, partition: InputPartition) -> Iterator[tuple[Any, ...]]:
        for shard in partition.value:
            yield from map(tuple, dataset.rows(shard, self.fields, gzipped=self.gzipped))


@dataclass(frozen=True)
class Written(WriterCommitMessage):
    """What one task wrote: a file in the staging directory, from this partition."""

    partition: int
    file: str
    records: int
    bytes: int


class TFRecordWriter(DataSourceArrowWriter):
    """Tasks write into a hidden directory beside the target, which `commit` renames.

    The driver creates that directory and takes it away in `abort`. A task that is still
    running then finds no place for its file and fails, instead of leaving something
    behind.
    """

    def __init__(
        self, target: Path, schema: dict[str, Any], overwrite: bool, compression: str, job: str
    ) -> None:
        self.target = target
        self.schema = schema
        self.fields = dataset.fields_of(schema, "the DataFrame")
        self.suffix = dataset.SUFFIXES[compression]
        self.job = job
        self.previous: dataset.Dataset | None = None
        if target.is_dir() and any(target.iterdir()):
            # Also when it is to be replaced: what is not a complete dataset is not ours
            # to delete.
            self.previous = dataset.read(target)
        elif target.exists() and not target.is_dir():
            raise AlreadyExists(f"{target} is a file; name a directory")
        self.keep = self.previous is not None and not overwrite
        if self.keep and self.previous is not None:
            if dataset.fields_of(self.previous.schema) != self.fields:
                raise FailedPrecondition(
                    f"{target} has another schema ({dataset.SCHEMA_FILE}) than the DataFrame to append; "
                    "cast the columns, or write to another directory"
                )
            if self.previous.shards and self.previous.compression != compression:
                raise FailedPrecondition(
                    f"{target} has compression {self.previous.compression}, not {compression}; "
                    "append with the same one"
                )
        self.staging = staging_of(target, job)
        self.staging.mkdir(parents=True)

    def write(self, iterator: Iterator[pyarrow.RecordBatch]) -> Written:
        context = TaskContext.get()
        assert context is not None
        partition = context.partitionId()
        file = self.staging / f"{partition:05d}-{context.taskAttemptId()}"
        records = 0
        with ExitStack() as stack:
            raw = stack.enter_context(open(file, "xb"))
            out: Any = raw
            if self.suffix == dataset.SUFFIXES["gzip"]:
                # Neither name nor time in the header: the same rows give the same
                # bytes.
                out = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0))
            for batch in iterator:
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    records += 1
                    where = f"partition {partition}, row {records}"
                    out.write(tfrecord.frame(dataset.encode(values, self.fields, where)))
        return Written(partition, file.name, records, file.stat().st_size)

    def commit(self, messages: list[WriterCommitMessage | None]) -> None:
        # Not by their class: that of another process is another one.
        written = cast("list[Written]", [message for message in messages if message is not None])
        written.sort(key=lambda message: message.partition)
        shards: dict[str, dict[str, int]] = {}
        for message in written:
            if message.records:
                name = f"part-{len(shards):05d}-{self.job}{self.suffix}"
                (self.staging / message.file).rename(self.staging / name)
                shards[name] = {"records": message.records, "bytes": message.bytes}
        for file in self.staging.iterdir():
            if file.name not in shards:
                file.unlink()  # of an empty partition, or of a task that failed and was tried again
        if self.keep and self.previous is not None:
            earlier = {}
            for shard in self.previous.shards:
                os.link(shard.path, self.staging / shard.path.name)
                earlier[shard.path.name] = {"records": shard.records, "bytes": shard.path.stat().st_size}
            shards = earlier | shards
        dataset.complete(self.staging, self.schema, shards)
        atomic.sync_tree(self.staging)
        self._replace_target()
        atomic.sync(self.target.parent)

    def _replace_target(self) -> None:
        old = self.staging.with_suffix(".old")
        if self.target.exists():
            self.target.rename(old)
        try:
            self.staging.rename(self.target)
        except OSError:
            if old.exists():
                old.rename(self.target)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def abort(self, messages: list[WriterCommitMessage | None]) -> None:
        doomed = self.staging.with_suffix(".aborted")
        if self.staging.exists():
            self.staging.rename(doomed)  # first, so that no task can add a file while others are removed
            shutil.rmtree(doomed)


# Workers import nothing from this folder: what they need of this module travels with
# the job.
if __name__ != "__main__":
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]

#: The oldest Java that Spark 4 runs on.
JAVA = 17
# Those of Spark's that PySpark knows, and the others.
SPARK_ERRORS = (PySparkException, Py4JJavaError)

# The command --------------------------------------------------------------------------


def require_java() -> None:
    """Check that there is a Java that Spark runs on.

    Raises:
        NotFound: there is none, or it is too old.
    """
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home, "bin", "java")) if home else "java"
    remedy = "apt-get install openjdk-17-jre-headless, or set JAVA_HOME"
    try:
        done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise NotFound(f"Spark needs Java {JAVA} or newer; {java}: {error.strerror}: {remedy}") from None
    # `openjdk version "17.0.2"`, or "1.8.0_292" up to Java 8.
    found = re.search(r'version "(?:1\.)?(\d+)', done.stderr)
    if done.returncode or found is None:
        raise NotFound(f"Spark needs Java {JAVA} or newer; `{java} -version` fails: {remedy}")
    if int(found[1]) < JAVA:
        raise NotFound(f"Spark needs Java {JAVA} or newer, and {java} is {found[1]}: {remedy}")


def session(master: str | None = None, *, verbose: bool = False) -> SparkSession:
    """A Spark session with the data source registered.

    Args:
        master: ``local[2]``, ``spark://host:7077``, ``yarn``, ...; None for what Spark
            was configured with, and without that all cores of this machine.
        verbose: Spark's own warnings and stack traces on standard error.
    """
    require_java()
    # Spark would start its workers with whichever python3 comes first on the PATH.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    configuration = SparkConf().setAppName("spark_to_tfrecord")
    if master is not None:
        configuration.setMaster(master)
    if configuration.get("spark.master", "local").startswith("local"):
        configuration.setIfMissing("spark.master", "local[*]")
        configuration.setIfMissing("spark.driver.host", "127.0.0.1")
        configuration.setIfMissing("spark.driver.bindAddress", "127.0.0.1")
        configuration.setIfMissing("spark.ui.enabled", "false")
    configuration.setIfMissing("spark.ui.showConsoleProgress", str(sys.stderr.isatty()).lower())
    configuration.setIfMissing("spark.log.level", "WARN" if verbose else "OFF")
    spark = SparkSession.builder.config(conf=configuration).getOrCreate()
    spark.dataSource.register(TFRecordDataSource)
    return spark


def read_input(
    spark: SparkSession,
    path: str,
    format: str,
    schema: str | None = None,
    options: dict[str, str] | None = None,
) -> DataFrame:
    """Anything that Spark reads; malformed rows and forbidden nulls fail the job.

    Args:
        schema: Spark DDL, such as ``label INT NOT NULL, name STRING``; None for the
            input's own.
    """
    reader = spark.read.format(format).options(**{"mode": "FAILFAST", **(options or {})})
    if schema is None:
        return reader.load(path)
    wanted = cast(StructType, StructType.fromDDL(schema))
    frame = reader.schema(wanted).load(path)
    row = F.to_json(F.struct("*"))
    for field in wanted:
        # File sources take NOT NULL for a remark.
        if not field.nullable:
            message = F.concat(F.input_file_name(), F.lit(f": {field.name!r} is missing in the row "), row)
            filled = F.when(F.col(field.name).isNull(), F.raise_error(message)).otherwise(F.col(field.name))
            frame = frame.withColumn(field.name, filled)
    return frame


def write(frame: DataFrame, path: Path, *, mode: str, compression: str = "none") -> dataset.Dataset:
    """Write a DataFrame and return what was written; raises one `SpikelessError`.

    Args:
        mode: ``new`` (nothing may be there), ``append`` or ``overwrite``.
    """
    if mode == "new" and path.exists():
        raise AlreadyExists(f"{path} exists; choose --mode append or --mode overwrite, or another directory")
    spark_mode = "overwrite" if mode == "overwrite" else "append"
    job = secrets.token_hex(4)
    writer = frame.write.format("tfrecord").mode(spark_mode).options(compression=compression, job=job)
    try:
        with cancelled_by_interrupt(frame.sparkSession):
            writer.save(str(path))
    except SPARK_ERRORS as error:
        raise InvalidArgument(f"{path} was not written: {cause(error)}") from None
    finally:
        # Spark has done so, unless it was itself ended by a signal.
        shutil.rmtree(staging_of(path, job), ignore_errors=True)
    return dataset.read(path)


@contextmanager
def cancelled_by_interrupt(spark: SparkSession) -> Iterator[None]:
    """Ctrl-C and SIGTERM cancel Spark's jobs first, and are raised when Spark is done.

    PySpark's own handler talks to Spark over the connection that it interrupts, which
    fails.
    """
    interrupted, over = threading.Event(), threading.Event()

    def cancel() -> None:
        with suppress(Py4JError, OSError):  # Spark may have got the signal too, and be gone
            spark.sparkContext.cancelAllJobs()
            while not over.wait(0.5):  # again, in case there was no job yet
                spark.sparkContext.cancelAllJobs()

    def on_interrupt(*_: object) -> None:
        if not interrupted.is_set():
            interrupted.set()
            threading.Thread(target=cancel).start()

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, on_interrupt) for number in signals}
    try:
        yield
    finally:
        over.set()
        for number, handler in previous.items():
            signal.signal(number, handler)
        if interrupted.is_set():
            raise KeyboardInterrupt


def stop(spark: SparkSession) -> None:
    """End Spark, also when it has gone before."""
    with suppress(Py4JError, OSError):
        spark.stop()


def cause(error: Exception) -> str:
    """The sentences that matter in a Spark error, which is mostly stack traces."""
    text = str(error)
    ours = re.findall(r"^spikeless\.errors\.\w+: (.*)$", text, re.MULTILINE)
    if ours:
        return str(ours[-1])
    raised = re.search(r"\[USER_RAISED_EXCEPTION\] (.*)", text)
    if raised:
        return raised[1]
    # The outermost error and its causes, without the names of Java classes.
    sentences = re.findall(r"^(?:Caused by|): (?:[\w.$]+: )?(.*)$", text, re.MULTILINE)
    return "; ".join(dict.fromkeys(sentences)) or text.partition("\nJVM stacktrace")[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="spark_to_tfrecord.py",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("input", help="path or URI of the input")
    parser.add_argument("output", help="directory to write")
    parser.add_argument("--format", default="parquet", help="of the input: parquet, csv, json, ...")
    parser.add_argument("--schema", help="Spark DDL of the input, or a file that holds it")
    parser.add_argument(
        "--option", action="append", default=[], help="key=value for Spark's reader, such as sep=\\t"
    )
    parser.add_argument("--shards", type=int, help="how many files; as Spark's partitions fall if not given")
    parser.add_argument(
        "--compression", choices=sorted(dataset.SUFFIXES), default="none", help="of each shard"
    )
    parser.add_argument("--mode", choices=["new", "append", "overwrite"], default="new", help="if it exists")
    parser.add_argument("--master", help="Spark master; local[*] if nothing else is configured")
    parser.add_argument("--verbose", action="store_true", help="show Spark's own messages")
    settings = parser.parse_args()
    if settings.shards is not None and settings.shards < 1:
        parser.error("--shards must be 1 or more")
    if not all("=" in option for option in settings.option):
        parser.error("--option must be key=value")

    options = dict(option.split("=", 1) for option in settings.option)
    schema = settings.schema
    if schema is not None and Path(schema).is_file():
        schema = Path(schema).read_text()
    output = local_path(settings.output)
    spark = session(settings.master, verbose=settings.verbose)
    try:
        frame = read_input(spark, settings.input, settings.format, schema, options)
        if settings.shards is not None:
            frame = frame.repartition(settings.shards)
        written = write(frame, output, mode=settings.mode, compression=settings.compression)
    except SPARK_ERRORS as error:
        raise InvalidArgument(f"{settings.input} cannot be read: {cause(error)}") from None
    finally:
        stop(spark)
    print(f"{written.records} records in {len(written.shards)} shards: {written.path}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
    try:
        main()
    except SpikelessError as error:
        print(f"spark_to_tfrecord: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("spark_to_tfrecord: interrupted", file=sys.stderr)
        sys.exit(130)
