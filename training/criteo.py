"""Write click logs in the Criteo format as TFRecords of tf.Example.

In: a tab-separated file without a header: a label (1 for a click), 13 integers I1-I13,
26 categories C1-C26; any of them but the label may be empty. Out: a directory as
`spikeless.training.dataset` describes it, whole or not at all.

    python training/criteo.py day_0.tsv day-0

One process writes about 10,000 rows a second. The records are those that
training/spark_to_tfrecord.py writes, which is for logs that outgrow one machine.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spikeless.errors import InvalidArgument, NotFound, SpikelessError
from spikeless.training import dataset

INTEGERS = 13
CATEGORIES = 26
#: C1-C13 describe the user, C14-C26 the candidate.
USER_CATEGORIES = 13
#: The columns, for Spark.
SCHEMA_FILE = Path(__file__).with_name("data") / "criteo.ddl"
#: The same as JSON of a Spark ``StructType``.
SCHEMA = {
    "type": "struct",
    "fields": [
        {"name": name, "type": kind, "nullable": True, "metadata": {}}
        for name, kind in [
            ("label", "integer"),
            *((f"I{number}", "integer") for number in range(1, INTEGERS + 1)),
            *((f"C{number}", "string") for number in range(1, CATEGORIES + 1)),
        ]
    ],
}
SHARDS = 8


def rows(file: Path) -> Iterator[list[Any]]:
    """Label, integers and categories of each row; None where nothing is.

    Raises:
        NotFound: the file cannot be read.
        InvalidArgument: a row that is none; names the file and the line.
    """
    columns = 1 + INTEGERS + CATEGORIES
    try:
        with open(file, encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                values = line.rstrip("\r\n").split("\t")
                if len(values) != columns:
                    raise InvalidArgument(f"{file}, line {number}: {len(values)} columns, not {columns}")
                if not values[0]:
                    raise InvalidArgument(f"{file}, line {number}: 'label' is missing")
                try:
                    integers = [_integer(value) for value in values[: 1 + INTEGERS]]
                except ValueError as error:
                    raise InvalidArgument(f"{file}, line {number}: {error}") from None
                yield integers + [value or None for value in values[1 + INTEGERS :]]
    except OSError as error:
        raise NotFound(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{file} is not UTF-8 text: {error}") from None


def _integer(text: str) -> int | None:
    """A 32-bit integer, as Spark's INT, or None."""
    if not text:
        return None
    number = int(text)
    if not -(1 << 31) <= number < 1 << 31:
        raise ValueError(f"{text} is no 32-bit integer")
    return number


def write(file: Path, directory: Path, *, spark: bool = False) -> dataset.Dataset:
    """Write a file's rows to a new directory and return what was written.

    Args:
        spark: let Spark do it, on all cores of this machine or on the cluster that it
            is configured for.
    """
    if not spark:
        return dataset.write(directory, SCHEMA, rows(file), shards=SHARDS)
    import spark_to_tfrecord as spark_job  # Spark is started only when there is something to do

    session = spark_job.session()
    try:
        frame = spark_job.read_input(session, str(file), "csv", SCHEMA_FILE.read_text(), {"sep": "\t"})
        return spark_job.write(frame.repartition(SHARDS), directory, mode="new")
    finally:
        spark_job.stop(session)


def records(path: Path, folder: Path, *, spark: bool = False) -> dataset.Dataset:
    """The records of a file, written once to a folder; or those of a directory.

    A file that has changed since is written again, under another name.
    """
    if not path.is_file():
        return dataset.read(path)
    status = path.stat()
    state = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    directory = folder / f"{path.stem}-{zlib.crc32(state.encode()):08x}"
    return dataset.read(directory) if directory.exists() else write(path, directory, spark=spark)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="tab-separated, without a header")
    parser.add_argument("directory", type=Path, help="where the records are written")
    settings = parser.parse_args()
    written = write(settings.file, settings.directory)
    print(f"{written.records} records in {len(written.shards)} shards: {written.path}")


if __name__ == "__main__":
    try:
        main()
    except SpikelessError as error:
        print(f"criteo: error: {error}", file=sys.stderr)
        sys.exit(1)
