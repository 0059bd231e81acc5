"""Directories of ``tf.Example`` records: TFRecord shards with a schema and counts.

In: rows of typed columns. Out, and the other way round:

    part-00000-<job>.tfrecord   records of ``tf.Example``; ``.tfrecord.gz``: compressed
    _schema.json                columns and types, as JSON of a Spark ``StructType``
    _counts.json                records and bytes of each shard
    _SUCCESS                    empty, written last: without it, the rest is incomplete

A column's value is a list of int64, float32 or bytes, as ``tf.Example`` has them
(``tensorflow/core/example/feature.proto``). A null is a feature that is not there; an
empty array is one without values. TensorFlow is not imported, so that a cluster's
workers need none.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from google.protobuf.message import DecodeError

from spikeless.disk import atomic
from spikeless.errors import AlreadyExists, DataLoss, FailedPrecondition, InvalidArgument, NotFound
from spikeless.formats import tfrecord
from spikeless.formats.protos import example_pb2

SCHEMA_FILE = "_schema.json"
COUNTS_FILE = "_counts.json"
SUCCESS_FILE = "_SUCCESS"
SUFFIXES = {"none": ".tfrecord", "gzip": ".tfrecord.gz"}

#: Spark's name of an element type -> the list of ``tf.train.Feature`` that holds it.
KINDS = {
    "boolean": "int64_list",
    "byte": "int64_list",
    "short": "int64_list",
    "integer": "int64_list",
    "long": "int64_list",
    "float": "float_list",
    "double": "float_list",
    "string": "bytes_list",
    "binary": "bytes_list",
}
_FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class Field:
    """One column: its name, the type of its elements, and whether it holds arrays."""

    name: str
    #: A key of `KINDS`. Doubles are stored as float32, the only float type that
    #: ``tf.Example`` has.
    element: str
    array: bool = False
    nullable: bool = True

    @property
    def kind(self) -> str:
        """``int64_list``, ``float_list`` or ``bytes_list``."""
        return KINDS[self.element]


@dataclass(frozen=True)
class Shard:
    """One file of a dataset."""

    path: Path
    records: int


@dataclass(frozen=True)
class Dataset:
    """A complete directory of records."""

    path: Path
    #: The Spark ``StructType`` as JSON.
    schema: Mapping[str, Any]
    fields: tuple[Field, ...]
    shards: tuple[Shard, ...]
    #: ``none`` or ``gzip``, the same for all shards.
    compression: str

    @property
    def records(self) -> int:
        """How many records all shards have together."""
        return sum(shard.records for shard in self.shards)


def fields_of(schema: Mapping[str, Any], source: str = "the schema") -> tuple[Field, ...]:
    """The columns of a Spark ``StructType`` given as JSON.

    Raises:
        InvalidArgument: no column, two of one name, or a type that ``tf.Example``
            cannot hold.
    """
    fields: dict[str, Field] = {}
    try:
        for column in schema["fields"]:
            name, data_type = column["name"], column["type"]
            array = isinstance(data_type, Mapping) and data_type.get("type") == "array"
            element = data_type["elementType"] if array else data_type
            if not isinstance(element, str) or element not in KINDS:
                raise InvalidArgument(
                    f"{source}: column {name!r} has type {_type_text(data_type)}, which tf.Example cannot "
                    f"hold; cast it to one of {', '.join(KINDS)} or an array of one of these, or drop it"
                )
            if name in fields:
                raise InvalidArgument(f"{source}: two columns are called {name!r}; rename one")
            fields[name] = Field(name, element, array, bool(column.get("nullable", True)))
    except (KeyError, TypeError):
        raise InvalidArgument(f"{source} is not the JSON form of a Spark StructType") from None
    if not fields:
        raise InvalidArgument(f"{source} has no columns")
    return tuple(fields.values())


def _type_text(data_type: Any) -> str:
    return data_type if isinstance(data_type, str) else json.dumps(data_type)


def read(path: str | os.PathLike[str]) -> Dataset:
    """Read a dataset's description and check its files, but not the records.

    Raises:
        NotFound: there is no such directory.
        FailedPrecondition: it is no dataset, or not a complete one.
        DataLoss: a shard is missing, has another size than it was written with, or
            belongs to nothing.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise NotFound(f"{directory} does not exist; write it with training/spark_to_tfrecord.py")
    if not (directory / SUCCESS_FILE).is_file():
        raise FailedPrecondition(
            f"{directory} has no {SUCCESS_FILE}: it is no TFRecord dataset or was not written to the end; "
            "write it with training/spark_to_tfrecord.py"
        )
    schema = _read_json(directory / SCHEMA_FILE)
    counts = _read_json(directory / COUNTS_FILE)
    try:
        shards = tuple(
            Shard(directory / name, int(entry["records"])) for name, entry in counts["shards"].items()
        )
        sizes = {name: int(entry["bytes"]) for name, entry in counts["shards"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataLoss(f"{directory / COUNTS_FILE} does not list shards with records and bytes") from None
    present = {file.name: file.stat().st_size for file in directory.glob("part-*")}
    for name, size in sizes.items():
        if name not in present:
            raise DataLoss(f"{directory / name} is missing; {COUNTS_FILE} lists it")
        if present[name] != size:
            raise DataLoss(
                f"{directory / name} has {present[name]} bytes, but was written with {size}: "
                "it was truncated or replaced"
            )
    for name in sorted(present.keys() - sizes.keys()):
        raise DataLoss(f"{directory / name} is not listed in {COUNTS_FILE}; remove it")
    gzipped = any(name.endswith(SUFFIXES["gzip"]) for name in sizes)
    return Dataset(
        directory,
        schema,
        fields_of(schema, str(directory / SCHEMA_FILE)),
        shards,
        "gzip" if gzipped else "none",
    )


def write(
    path: str | os.PathLike[str],
    schema: Mapping[str, Any],
    rows: Iterable[Sequence[Any]],
    shards: int = 1,
) -> Dataset:
    """Write rows to a new directory, in turns to each shard; it appears whole.

    Args:
        schema: the columns, as JSON of a Spark ``StructType``.
        rows: a value for each column, as `encode` takes them.

    Raises:
        AlreadyExists: there is something of that name.
        InvalidArgument: the schema or a row is not one that can be written.
    """
    directory = Path(path)
    if directory.exists():
        raise AlreadyExists(f"{directory} exists; remove it or name another directory")
    fields = fields_of(schema)
    with atomic.staging(directory.parent / ".staging") as staging, ExitStack() as files:
        made = staging / "data"
        made.mkdir()
        written: dict[str, dict[str, int]] = {}
        out: list[BinaryIO] = []
        for number, row in enumerate(rows):
            name = f"part-{number % shards:05d}{SUFFIXES['none']}"
            if number < shards:
                out.append(files.enter_context(open(made / name, "wb")))
                written[name] = {"records": 0, "bytes": 0}
            content = tfrecord.frame(encode(row, fields, f"row {number + 1}"))
            out[number % shards].write(content)
            written[name]["records"] += 1
            written[name]["bytes"] += len(content)
        files.close()
        complete(made, schema, written)
        atomic.sync_tree(made)
        made.rename(directory)
        atomic.sync(directory.parent)
    return read(directory)


def complete(directory: Path, schema: Mapping[str, Any], shards: Mapping[str, Mapping[str, int]]) -> None:
    """Add the schema, the counts and the success marker to written shards.

    Args:
        shards: file name -> its ``records`` and ``bytes``.
    """
    counts = {"records": sum(shard["records"] for shard in shards.values()), "shards": shards}
    (directory / SCHEMA_FILE).write_text(json.dumps(schema, indent=1) + "\n")
    (directory / COUNTS_FILE).write_text(json.dumps(counts, indent=1) + "\n")
    (directory / SUCCESS_FILE).touch()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataLoss(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataLoss(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataLoss(f"{file} is not a JSON object")
    return content


def rows(shard: Shard, fields: Sequence[Field], *, gzipped: bool) -> Iterator[list[Any]]:
    """The rows of one shard, a value for each field.

    A value is an ``int``, ``float``, ``bool``, ``str`` or ``bytes``, a list of these
    for an array, or None.

    Raises:
        DataLoss: a damaged file, or one with another number of records than it was
            written with.
        InvalidArgument: a record that does not fit the fields. Both name the file and
            the record.
    """
    number = 0
    for number, record in enumerate(tfrecord.read(shard.path, gzipped=gzipped), start=1):
        yield decode(record, fields, f"{shard.path}: record {number}")
    if number != shard.records:
        raise DataLoss(
            f"{shard.path} ends after record {number}; it was written with {shard.records} records"
        )


def find_fault(dataset: Dataset, fields: Sequence[Field]) -> None:
    """Read every record and raise the error of `rows` for the first bad one.

    TensorFlow's readers and parsers name neither the file nor the record that they fail
    on. This is the slow way to find out, for when they did.
    """
    for shard in dataset.shards:
        for _ in rows(shard, fields, gzipped=dataset.compression == "gzip"):
            pass


def encode(values: Sequence[Any], fields: Sequence[Field], where: str) -> bytes:
    """One row, a value for each field, as a serialized ``tf.Example``; deterministic.

    Args:
        where: what the row is called in errors.

    Raises:
        InvalidArgument: a null inside an array, or a double that float32 cannot hold.
    """
    example = example_pb2.Example()
    features = example.features.feature
    for field, value in zip(fields, values, strict=True):
        if value is None:
            continue
        elements = value if field.array else (value,)
        if field.array and None in elements:
            raise InvalidArgument(
                f"{where}: the array in column {field.name!r} holds a null, which tf.Example cannot; "
                "filter nulls out or replace them"
            )
        if field.element == "boolean":
            elements = [int(truth) for truth in elements]
        elif field.element == "string":
            elements = [text.encode() for text in elements]
        elif field.element == "double":
            for number in elements:
                if abs(number) > _FLOAT32_MAX and not math.isinf(number):
                    raise InvalidArgument(
                        f"{where}: {number} in column {field.name!r} is too large for tf.Example's float32"
                    )
        content = getattr(features[field.name], field.kind)
        content.SetInParent()  # an empty array is not a null
        content.value.extend(elements)
    return bytes(example.SerializeToString(deterministic=True))


def decode(record: bytes, fields: Sequence[Field], where: str) -> list[Any]:
    """The inverse of `encode`; features that no field names are passed over."""
    try:
        features = example_pb2.Example.FromString(record).features.feature
    except DecodeError:
        raise InvalidArgument(f"{where} is not a tf.Example") from None
    return [_value(features, field, where) for field in fields]


def _value(features: Any, field: Field, where: str) -> Any:
    # Looking up a missing key of a protobuf map would create it.
    feature = features[field.name] if field.name in features else None  # noqa: SIM401
    kind = feature.WhichOneof("kind") if feature is not None else None
    if kind is None:
        if not field.nullable:
            raise InvalidArgument(f"{where} has no {field.name!r}, which may not be missing")
        return None
    if kind != field.kind:
        raise InvalidArgument(f"{where}: {field.name!r} is a {kind}, but the schema needs a {field.kind}")
    elements: list[Any] = list(getattr(feature, kind).value)
    if field.element == "boolean":
        elements = [bool(element) for element in elements]
    elif field.element == "string":
        try:
            elements = [element.decode() for element in elements]
        except UnicodeDecodeError:
            raise InvalidArgument(f"{where}: {field.name!r} is not UTF-8 text; read it as binary") from None
    if field.array:
        return elements
    if len(elements) != 1:
        raise InvalidArgument(f"{where}: {field.name!r} has {len(elements)} values, but the schema needs one")
    return elements[0]
