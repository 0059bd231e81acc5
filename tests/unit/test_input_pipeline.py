"""The tf.data pipeline on records written by hand: output, order, refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import input_pipeline
import numpy as np
import pytest
import tensorflow as tf

from spikeless.errors import DataLoss, InvalidArgument
from spikeless.formats import tfrecord
from spikeless.training import dataset
from spikeless.training.dataset import Field

FIELDS = (
    Field("id", "long"),
    Field("weight", "double"),
    Field("name", "string"),
    Field("tags", "string", array=True),
)
TYPES = {"tags": {"type": "array", "elementType": "string", "containsNull": True}}


def row(number: int) -> list[Any]:
    return [number, number / 2, f"n{number}", [f"t{tag}" for tag in range(number % 3)]]


def write(directory: Path, shards: Sequence[Sequence[bytes]]) -> dataset.Dataset:
    directory.mkdir()
    counts = {}
    for number, records in enumerate(shards):
        file = directory / f"part-{number:05d}.tfrecord"
        tfrecord.write(file, records)
        counts[file.name] = {"records": len(records), "bytes": file.stat().st_size}
    columns = [
        {"name": field.name, "type": TYPES.get(field.name, field.element), "nullable": True, "metadata": {}}
        for field in FIELDS
    ]
    (directory / "_schema.json").write_text(json.dumps({"type": "struct", "fields": columns}))
    (directory / "_counts.json").write_text(json.dumps({"shards": counts}))
    (directory / "_SUCCESS").touch()
    return dataset.read(directory)


@pytest.fixture
def data(tmp_path: Path) -> dataset.Dataset:
    """5,000 rows in shards of unequal size."""
    records = [dataset.encode(row(number), FIELDS, "row") for number in range(5000)]
    return write(tmp_path / "data", [records[:1500], records[1500:1501], records[1501:]])


def epoch(pipeline: tf.data.Dataset) -> list[list[Any]]:
    rows = []
    for batch in pipeline:
        columns = [
            values.to_list() if isinstance(values, tf.RaggedTensor) else values.numpy().tolist()
            for values in (batch[field.name] for field in FIELDS)
        ]
        rows += [
            [number, weight, name.decode(), [tag.decode() for tag in tags]]
            for number, weight, name, tags in zip(*columns, strict=True)
        ]
    return rows


@pytest.mark.parametrize("cache", [False, True, "file"])
def test_every_record_once_an_epoch_in_another_order(
    data: dataset.Dataset, tmp_path: Path, cache: bool | str
) -> None:
    tf.random.set_seed(99)  # a global seed counts too; and no use of random numbers in between does
    where = tmp_path / "cache" if cache == "file" else cache
    pipeline = input_pipeline.batches(data, 64, cache=where, seed=3)
    first, second = epoch(pipeline), epoch(pipeline)
    expected = [row(number) for number in range(5000)]
    assert first != second
    assert sorted(first) == sorted(second) == expected
    # Mixed across all shards, not within them: neighbours have nothing to do with each
    # other.
    ids = np.array([values[0] for values in first])
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.1
    tf.random.uniform([])
    again = input_pipeline.batches(data, 64, cache=False, seed=3)
    assert [epoch(again), epoch(again)] == [first, second]
    assert epoch(input_pipeline.batches(data, 64, cache=False, seed=4)) != first


def test_batches_are_full_but_for_the_last(data: dataset.Dataset) -> None:
    pipeline = input_pipeline.batches(data, 300, columns=["id"])
    assert pipeline.element_spec.keys() == {"id"}
    sizes = [int(batch["id"].shape[0]) for batch in pipeline]
    assert sizes == [300] * 16 + [200]
    dropped = input_pipeline.batches(data, 300, columns=["id"], drop_remainder=True)
    assert len([batch for batch in dropped]) == 16


def test_a_null_is_zero_or_empty(tmp_path: Path) -> None:
    data = write(tmp_path / "data", [[dataset.encode([None] * 4, FIELDS, "row")]])
    assert epoch(input_pipeline.batches(data, 1)) == [[0, 0.0, "", []]]


def test_what_cannot_be_read_is_refused_at_once(data: dataset.Dataset, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="has no column 'price'; there is: id, weight, name, tags"):
        input_pipeline.batches(data, 1, columns=["id", "price"])
    with pytest.raises(InvalidArgument, match="has no column 'label'"):
        input_pipeline.batches(data, 1, required=["label"])
    with pytest.raises(InvalidArgument, match="holds no records"):
        input_pipeline.batches(write(tmp_path / "empty", []), 1)


def test_damage_is_traced_to_file_and_record(data: dataset.Dataset) -> None:
    file = data.shards[2].path
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)
    pipeline = input_pipeline.batches(data, 64)
    with (
        pytest.raises(DataLoss, match=r"part-00002\.tfrecord: record 3499 fails its checksum"),
        input_pipeline.naming_faults(data, data.fields),
    ):
        epoch(pipeline)


def test_a_missing_label_is_traced_to_file_and_record(tmp_path: Path) -> None:
    good = dataset.encode(row(1), FIELDS, "row")
    bad = dataset.encode([None, *row(1)[1:]], FIELDS, "row")
    data = write(tmp_path / "data", [[good], [good, bad]])
    pipeline = input_pipeline.batches(data, 64, required=["id"])
    fields = input_pipeline.select(data, None, ["id"])
    with (
        pytest.raises(InvalidArgument, match=r"part-00001\.tfrecord: record 2 has no 'id'"),
        input_pipeline.naming_faults(data, fields),
    ):
        epoch(pipeline)


def test_an_error_that_is_not_the_datas_stays_what_it_was(data: dataset.Dataset) -> None:
    with (
        pytest.raises(tf.errors.InvalidArgumentError, match="Incompatible shapes"),
        input_pipeline.naming_faults(data, data.fields),
    ):
        tf.ones([2]) + tf.ones([3])
