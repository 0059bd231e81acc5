"""Rows to ``tf.Example`` and back, and what a directory of them says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikeless.errors import DataLoss, InvalidArgument
from spikeless.formats import tfrecord
from spikeless.training import dataset
from spikeless.training.dataset import Field

ELEMENTS: dict[str, st.SearchStrategy[Any]] = {
    "boolean": st.booleans(),
    "long": st.integers(-(2**63), 2**63 - 1),
    "double": st.floats(width=32),
    "string": st.text(),
    "binary": st.binary(),
}
FIELDS = tuple(Field(f"{kind}-{array}", kind, array) for kind in ELEMENTS for array in (False, True))
ROWS = st.tuples(
    *(
        st.none() | (st.lists(ELEMENTS[field.element]) if field.array else ELEMENTS[field.element])
        for field in FIELDS
    )
)


@given(ROWS)
def test_rows_come_back(row: tuple[Any, ...]) -> None:
    again = dataset.decode(dataset.encode(row, FIELDS, "row 1"), FIELDS, "row 1")
    for value, decoded in zip(row, again, strict=True):
        np.testing.assert_equal(decoded, value)
        assert type(decoded) is type(value)


@given(st.binary(max_size=50))
def test_any_bytes_are_a_row_or_a_clear_error(record: bytes) -> None:
    try:
        dataset.decode(record, FIELDS, "f: record 3")
    except InvalidArgument as error:
        refusal = str(error)
    else:
        return
    assert refusal.startswith("f: record 3")


def column(name: str, data_type: Any) -> dict[str, Any]:
    return {"name": name, "type": data_type, "nullable": False, "metadata": {}}


def write(directory: Path, *shards: list[bytes]) -> dataset.Dataset:
    """A dataset of one long column ``x``, by hand."""
    directory.mkdir()
    counts = {}
    for number, records in enumerate(shards):
        file = directory / f"part-{number:05d}.tfrecord"
        tfrecord.write(file, records)
        counts[file.name] = {"records": len(records), "bytes": file.stat().st_size}
    (directory / "_schema.json").write_text(json.dumps({"fields": [column("x", "long")]}))
    (directory / "_counts.json").write_text(json.dumps({"shards": counts}))
    (directory / "_SUCCESS").touch()
    return dataset.read(directory)


def record(value: int) -> bytes:
    return dataset.encode([value], [Field("x", "long")], "row")


def test_a_dataset_knows_its_records(tmp_path: Path) -> None:
    read = write(tmp_path / "d", [record(1), record(2)], [record(3)])
    assert (read.records, read.compression, [shard.records for shard in read.shards]) == (3, "none", [2, 1])
    assert read.fields == (Field("x", "long", nullable=False),)
    rows = [row for shard in read.shards for row in dataset.rows(shard, read.fields, gzipped=False)]
    assert rows == [[1], [2], [3]]
    dataset.find_fault(read, read.fields)


def test_the_first_bad_record_is_named(tmp_path: Path) -> None:
    text = dataset.encode(["one"], [Field("x", "string")], "row")
    read = write(tmp_path / "d", [record(1)], [record(2), text])
    with pytest.raises(InvalidArgument, match=r"part-00001\.tfrecord: record 2: 'x' is a bytes_list"):
        dataset.find_fault(read, read.fields)
    with pytest.raises(InvalidArgument, match=r"part-00000\.tfrecord: record 1 has no 'y'"):
        dataset.find_fault(read, [Field("y", "long", nullable=False)])


def test_a_shard_with_fewer_records_than_it_was_written_with(tmp_path: Path) -> None:
    read = write(tmp_path / "d", [record(1), record(2)])
    file = read.shards[0].path
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])  # a whole record less: no checksum fails
    with pytest.raises(DataLoss, match="ends after record 1; it was written with 2"):
        dataset.find_fault(read, read.fields)
    with pytest.raises(DataLoss, match="was truncated or replaced"):
        dataset.read(read.path)


def test_strange_files_are_refused(tmp_path: Path) -> None:
    read = write(tmp_path / "d", [record(1)])
    (read.path / "part-00009.tfrecord").touch()
    with pytest.raises(DataLoss, match=r"part-00009\.tfrecord is not listed"):
        dataset.read(read.path)
    (read.path / "_counts.json").write_text("{")
    with pytest.raises(DataLoss, match=r"_counts\.json is not JSON"):
        dataset.read(read.path)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"fields": []}, "has no columns"),
        ({"columns": []}, "is not the JSON form of a Spark StructType"),
        ({"fields": [column("a", "long"), column("a", "string")]}, "two columns are called 'a'"),
        ({"fields": [column("a", "timestamp")]}, "column 'a' has type timestamp"),
        ({"fields": [column("a", {"type": "array", "elementType": {"type": "array"}})]}, "cannot hold"),
    ],
)
def test_schemas_that_cannot_be_kept(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        dataset.fields_of(schema)
