"""TFRecord files: the framing is TensorFlow's, and damage is found and located."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikeless.errors import DataLoss, NotFound
from spikeless.formats import checksum, tfrecord

RECORDS = [b"first", b"", b"third" * 100]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "records"
    tfrecord.write(file, RECORDS)
    return file


@given(st.lists(st.binary(max_size=300)))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, records: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip"
    tfrecord.write(path, records)
    assert list(tfrecord.read(path)) == records


def test_masked_checksum_of_a_known_value() -> None:
    # crc32c("123456789") is the algorithm's published check value, 0xE3069283.
    crc = 0xE3069283
    expected = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert checksum.masked_crc32c(b"123456789") == expected


def test_reads_what_tensorflow_writes_and_the_other_way_round(tmp_path: Path, path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    theirs = tmp_path / "theirs"
    with tf.io.TFRecordWriter(str(theirs)) as writer:
        for record in RECORDS:
            writer.write(record)
    assert theirs.read_bytes() == path.read_bytes()
    zipped = tmp_path / "zipped"
    with tf.io.TFRecordWriter(str(zipped), options="GZIP") as writer:
        for record in RECORDS:
            writer.write(record)
    assert list(tfrecord.read(zipped, gzipped=None)) == RECORDS
    assert list(tfrecord.read(path, gzipped=None)) == RECORDS


def test_a_record_whose_length_looks_like_gzip_is_read_as_it_is(tmp_path: Path) -> None:
    record = b"x" * int.from_bytes(b"\x1f\x8b", "little")
    tfrecord.write(tmp_path / "f", [record])
    assert (tmp_path / "f").read_bytes()[:2] == b"\x1f\x8b"
    assert list(tfrecord.read(tmp_path / "f", gzipped=None)) == [record]


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(NotFound, match="cannot be read"):
            list(tfrecord.read(path))


def test_every_truncation_is_found_unless_it_leaves_whole_records(tmp_path: Path, path: Path) -> None:
    content = path.read_bytes()
    boundaries = {0}
    for record in RECORDS:
        boundaries.add(max(boundaries) + 16 + len(record))
    cut = tmp_path / "cut"
    for size in range(len(content)):
        cut.write_bytes(content[:size])
        if size in boundaries:
            list(tfrecord.read(cut))
        else:
            number = sum(size > boundary for boundary in boundaries)
            with pytest.raises(DataLoss, match=f"cut: record {number} is truncated"):
                list(tfrecord.read(cut))


def test_every_flipped_byte_is_found_in_its_record(tmp_path: Path, path: Path) -> None:
    content = path.read_bytes()
    damaged = tmp_path / "damaged"
    ends = [16 + len(RECORDS[0]), 32 + len(RECORDS[0]) + len(RECORDS[1])]
    for position in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[position] ^= 0x40
        damaged.write_bytes(flipped)
        number = 1 + sum(position >= end for end in ends)
        with pytest.raises(DataLoss, match=f"damaged: record {number} "):
            list(tfrecord.read(damaged))


def test_an_absurd_length_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for length, text in ((1 << 62, "claims to have"), (1 << 30, "is truncated: 0 of")):
        header = struct.pack("<Q", length)
        content = header + struct.pack("<I", checksum.masked_crc32c(header))
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(DataLoss, match=text):
            list(tfrecord.read(tmp_path / "f"))


def test_a_long_record_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfrecord, "_PIECE_BYTES", 1000)
    record = os.urandom(4321)
    tfrecord.write(tmp_path / "f", [record])
    assert list(tfrecord.read(tmp_path / "f")) == [record]


def test_damaged_gzip(tmp_path: Path, path: Path) -> None:
    zipped = gzip.compress(path.read_bytes())
    file = tmp_path / "f.gz"
    for content in (zipped[:-9], zipped[:30] + b"\0" * 20 + zipped[50:], zipped[:12] + b"\xff" * 9):
        file.write_bytes(content)
        with pytest.raises(DataLoss, match=r"f\.gz: record"):
            list(tfrecord.read(file, gzipped=None))
    file.write_bytes(zipped)
    with pytest.raises(DataLoss, match="corrupt header"):
        list(tfrecord.read(file))


def test_text_is_no_tfrecord_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text('{"instances": [[1, 2, 3]]}')
    with pytest.raises(DataLoss, match="no TFRecord file"):
        list(tfrecord.read(tmp_path / "f"))
