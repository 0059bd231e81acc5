"""Checkpoints: what TensorFlow wrote is read, what is rewritten TensorFlow reads."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spikeless.errors import DataLoss, NotFound, Unimplemented
from spikeless.formats import checkpoint, string_table
from spikeless.formats.checkpoint import Checkpoint, index_file, rewrite
from spikeless.formats.protos import tensor_bundle_pb2

#: Writes checkpoints with TensorFlow: one with odd values, one with slices in two
#: shards.
_WRITE = """
import sys
import numpy as np
import tensorflow as tf

directory = sys.argv[1]
tf.train.Checkpoint(
    table=tf.Variable(np.arange(4000, dtype=np.float32).reshape(1000, 4)),
    copy=tf.Variable(np.arange(4000, dtype=np.float32).reshape(1000, 4)),
    other=tf.Variable(np.arange(4000, dtype=np.float32).reshape(1000, 4) + 1),
    empty=tf.Variable(np.zeros((0, 3), np.float32)),
    text=tf.Variable([["a", ""], ["c" * 300, "\u00fc"]]),
).write(f"{directory}/plain")

rows, columns = tf.random.normal([70000, 3]), tf.random.normal([3, 130])
saved = {
    "first": [
        *((f"many/{number:04}/" + "x" * 60, "", tf.constant(number)) for number in range(3000)),
        ("rows", "70000 3 0,23334:0,3", rows[:23334]),
        ("rows", "70000 3 46667,23333:0,3", rows[46667:]),
        ("columns", "3 130 -:0,65", columns[:, :65]),
    ],
    "second": [
        ("rows", "70000 3 23334,23333:0,3", rows[23334:46667]),
        ("columns", "3 130 -:65,65", columns[:, 65:]),
        ("\u00fc\xff", "300 0,300", tf.zeros([300])),
        ("\u00fc", "300 0,299", tf.zeros([299])),
        ("\u00fc", "300 299,1", tf.ones([1])),
    ],
}
parts = [f"{directory}/part-{name}" for name in saved]
for prefix, (names, slices, tensors) in zip(parts, (zip(*tensors) for tensors in saved.values())):
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=names, shape_and_slices=slices, tensors=tensors)
tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=f"{directory}/sliced")
"""
#: Exits 0 if TensorFlow reads the same from both checkpoints.
_COMPARE = """
import sys
import numpy as np
import tensorflow as tf

one, other = (tf.train.load_checkpoint(prefix) for prefix in sys.argv[1:])
names = one.get_variable_to_shape_map()
assert names == other.get_variable_to_shape_map() and names
for name in names:
    mine, theirs = one.get_tensor(name), other.get_tensor(name)
    assert np.array_equal(mine, theirs) and getattr(mine, "dtype", 0) == getattr(theirs, "dtype", 0), name
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    subprocess.run([sys.executable, "-c", _WRITE, str(directory)], check=True, timeout=240)
    return directory


def _key(name: str) -> bytes:
    return f"{name}/.ATTRIBUTES/VARIABLE_VALUE".encode()


def test_a_rewritten_checkpoint_reads_the_same(written: Path, tmp_path: Path) -> None:
    plain = Checkpoint.read(written / "plain")
    apart = [(_key("table"),), (_key("copy"),), (_key("other"),)]
    result = rewrite(plain, tmp_path / "plain", apart)
    # The same bytes are stored once.
    files = [result.apart[pieces] for pieces in apart]
    assert files[0] == files[1] != files[2]
    assert files[0].path.read_bytes() == (b"".join(_floats(range(4000))))
    assert files[0].size == 16000
    assert not os.access(files[0].path, os.W_OK) or os.geteuid() == 0
    assert files[0].path.stat().st_mode & 0o222 == 0
    assert result.rest.size < 16000
    assert Checkpoint.read(tmp_path / "plain").entries.keys() == plain.entries.keys()

    sliced = Checkpoint.read(written / "sliced")
    rows = sliced.find("rows")
    assert rows is not None
    assert len(rows) == 3
    other = sliced.find("\u00fc")
    assert other is not None
    assert len(other) == 2
    rewrite(sliced, tmp_path / "sliced", [rows, other])
    for name in ("plain", "sliced"):
        command = [sys.executable, "-c", _COMPARE, str(written / name), str(tmp_path / name)]
        subprocess.run(command, check=True, timeout=240)


def _floats(values: range) -> list[bytes]:
    import struct

    return [struct.pack("<f", value) for value in values]


def test_slices_are_found_by_rows(written: Path) -> None:
    sliced = Checkpoint.read(written / "sliced")
    pieces = sliced.find("rows")
    assert pieces is not None
    assert sliced.find("rows", "70000 3 0,23334:0,3") == pieces[:1]
    assert sliced.find("rows", "70000 3 0,46667:-") == pieces[:2]
    assert sliced.find("rows", "70000 3 23334,46666:-") == pieces[1:]
    assert sliced.find("rows", "70000 3 0,5:-") is None, "a piece would have to be cut"
    assert sliced.find("rows", "7 3 -:-") is None, "another shape"
    assert sliced.find("columns") is None, "columns would have to be woven"
    assert sliced.find("columns", "3 130 -:65,65") is not None
    assert sliced.find("absent") is None
    assert sliced.find("many/0007/" + "x" * 60) == (b"many/0007/" + b"x" * 60,)


def test_copies_where_file_systems_cannot_share(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "not between these")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    result = rewrite(Checkpoint.read(written / "plain"), tmp_path / "plain", [(_key("other"),)])
    assert result.apart[(_key("other"),)].path.read_bytes() == b"".join(_floats(range(1, 4001)))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda prefix: index_file(prefix).unlink(), NotFound, "export the model again"),
        (lambda prefix: _truncate(index_file(prefix), 100), DataLoss, "does not end as a table"),
        (lambda prefix: index_file(prefix).write_bytes(b""), DataLoss, "does not end as a table"),
        (lambda prefix: _flip(index_file(prefix), 5), DataLoss, "fails its checksum"),
        (lambda prefix: _flip(index_file(prefix), -45), DataLoss, "no readable checkpoint index"),
        (
            lambda prefix: checkpoint.data_file(prefix, 0, 1).unlink(),
            NotFound,
            "data-00000-of-00001 is missing",
        ),
        (
            lambda prefix: _truncate(checkpoint.data_file(prefix, 0, 1), 9000),
            DataLoss,
            "ends .* bytes too early",
        ),
        (
            lambda prefix: _flip(checkpoint.data_file(prefix, 0, 1), 20),
            DataLoss,
            "does not match its checksum",
        ),
    ],
)
def test_damage_is_refused(
    written: Path, tmp_path: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    prefix = tmp_path / "damaged"
    for file in written.glob("plain.*"):
        (tmp_path / file.name.replace("plain", "damaged")).write_bytes(file.read_bytes())
    damage(prefix)
    (tmp_path / "out").mkdir()
    with pytest.raises(error, match=message):
        rewrite(Checkpoint.read(prefix), tmp_path / "out" / "copy", [(_key("table"),)])


def _truncate(file: Path, size: int) -> None:
    os.truncate(file, size)


def _flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x10
    file.write_bytes(content)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": -1},
        {"offset": -1},
        {"shard_id": -1},
        {"shape": {"dim": [{"size": -3}, {"size": 4}]}},
        {"slices": [{"extent": [{"start": 0, "length": 2}]}]},
    ],
)
def test_an_entry_that_means_nothing_is_damage(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Its checksum may be right all the same."""
    header = tensor_bundle_pb2.BundleHeaderProto(num_shards=1)
    entry = tensor_bundle_pb2.BundleEntryProto(shape={"dim": [{"size": 3}, {"size": 4}]}, size=48)
    entry.MergeFrom(tensor_bundle_pb2.BundleEntryProto(**changes))
    table = {b"": header.SerializeToString(), b"v": entry.SerializeToString()}
    index_file(tmp_path / "strange").write_bytes(string_table.write(table))
    with pytest.raises(DataLoss, match="'v' is damaged"):
        Checkpoint.read(tmp_path / "strange")


@pytest.mark.parametrize("text", [" ", "1000 4 -", "1000 4 a:b", "1000 4 0,x:-", "x 4 -:-", "-:-", "1000 4"])
def test_a_slice_that_is_none_is_not_found(written: Path, text: str) -> None:
    read = Checkpoint.read(written / "plain")
    assert read.find(_key("table").decode(), "1000 4 -:-") == (_key("table"),)
    assert read.find(_key("table").decode(), text) is None


def test_big_endian_checkpoints_are_refused(tmp_path: Path) -> None:
    header = tensor_bundle_pb2.BundleHeaderProto(
        num_shards=1, endianness=tensor_bundle_pb2.BundleHeaderProto.BIG
    )
    index_file(tmp_path / "big").write_bytes(string_table.write({b"": header.SerializeToString()}))
    with pytest.raises(Unimplemented, match="little-endian"):
        Checkpoint.read(tmp_path / "big")
