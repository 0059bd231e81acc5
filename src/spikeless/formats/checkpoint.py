"""Read and rewrite TensorFlow checkpoints without holding a tensor in memory.

In: a checkpoint's prefix, such as ``<saved model>/variables/variables``. Out: what it
holds, and a copy of it in which chosen tensors have files of their own.

A checkpoint ("tensor bundle", ``tensorflow/core/util/tensor_bundle``) is
``<prefix>.index``, a sorted string table from tensor name to ``BundleEntryProto``, and
data shards ``<prefix>.data-00000-of-00002`` with the raw little-endian bytes. An entry
says which shard, offset, size and masked CRC-32C; the empty key holds the
``BundleHeaderProto``. A tensor that was saved in slices has an entry that lists them,
and each slice one of its own under an encoded key.

The layout is free: any tensor may be at any offset of any shard. ``rewrite`` uses that
to put a tensor at offset 0 of a shard of its own, where it can be memory-mapped, and
what it writes is still a checkpoint like any other.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import google_crc32c
from google.protobuf.message import DecodeError

from spikeless.errors import DataLoss, NotFound, Unimplemented
from spikeless.formats import string_table
from spikeless.formats.checksum import masked
from spikeless.formats.protos import tensor_bundle_pb2, tensor_slice_pb2, types_pb2

_HEADER_KEY = b""
_CHUNK_BYTES = 4 << 20
_ENCODED_TYPES = frozenset({types_pb2.DT_STRING, types_pb2.DT_VARIANT})
#: What ``TensorSlice`` stores as the length of a dimension that is taken whole.
_FULL_EXTENT = -1

Slice = Sequence[tuple[int, int]]
#: A tensor as the keys of the entries that make it up: one, or slices that are stacked
#: along the first dimension.
Pieces = tuple[bytes, ...]
READ_ONLY = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH


@dataclass(frozen=True)
class DataFile:
    """One data shard that ``rewrite`` wrote."""

    path: Path
    size: int
    #: Hex digest of the whole file.
    sha256: str


@dataclass(frozen=True)
class Rewritten:
    """What ``rewrite`` wrote."""

    checkpoint: Checkpoint
    #: The shard of all that was not set apart.
    rest: DataFile
    #: The files of the tensors that were; tensors with the same bytes share one.
    apart: Mapping[Pieces, DataFile]


class Checkpoint:
    """What a checkpoint's index says."""

    def __init__(
        self, prefix: Path, entries: dict[bytes, tensor_bundle_pb2.BundleEntryProto], num_shards: int
    ) -> None:
        #: The path without ``.index``.
        self.prefix = prefix
        #: Each tensor and each slice of one by its key in the index, in key order.
        self.entries = entries
        self.num_shards = num_shards

    @classmethod
    def read(cls, prefix: str | os.PathLike[str]) -> Checkpoint:
        """Read ``<prefix>.index``.

        Raises:
            NotFound: there is no such file.
            DataLoss: it is truncated or fails its checksums.
            Unimplemented: it is big-endian, compressed, or of a later format.
        """
        prefix = Path(prefix)
        index = index_file(prefix)
        try:
            content = index.read_bytes()
        except FileNotFoundError:
            raise NotFound(f"{index} is missing: export the model again, with its variables") from None
        try:
            table = dict(string_table.read(content))
            header = tensor_bundle_pb2.BundleHeaderProto.FromString(table.pop(_HEADER_KEY))
            entries = {
                key: tensor_bundle_pb2.BundleEntryProto.FromString(value) for key, value in table.items()
            }
            for key, entry in entries.items():
                _check(key, entry)
        except (DataLoss, KeyError, DecodeError) as error:
            raise DataLoss(
                f"{index} is no readable checkpoint index ({error}): copy or export it again"
            ) from error
        if header.endianness != tensor_bundle_pb2.BundleHeaderProto.LITTLE or header.version.min_consumer > 1:
            raise Unimplemented(f"{index}: only little-endian checkpoints of format version 1 can be read")
        return cls(prefix, entries, header.num_shards)

    def shard(self, shard_id: int) -> Path:
        return data_file(self.prefix, shard_id, self.num_shards)

    def find(self, name: str, shape_and_slice: str = "") -> Pieces | None:
        """The entries whose bytes, in this order, are what ``RestoreV2`` would return.

        Args:
            name: the tensor's name in the checkpoint.
            shape_and_slice: empty for the whole tensor, else its full shape and the
                slice: ``10 4 0,5:-`` is the first five of ten rows of four
                (``tensorflow/core/util/saved_tensor_slice_util.h``).

        Returns:
            None for an unknown name, and where a stored piece would have to be cut or
            woven into others.
        """
        key = name.encode("utf-8", "surrogateescape")
        shape = self._shape(key)
        if shape is None:
            return None
        entry = self.entries[key]
        wanted = _parse_slice(shape_and_slice, shape)
        if not entry.slices:
            return (key,) if wanted == [(0, size) for size in shape] else None
        if not wanted:
            return None
        (start, length), *columns = wanted
        rows = {}
        for stored in map(_extents, entry.slices):
            (first, count), *others = _whole_lengths(stored, shape)
            piece = _slice_key(key, stored)
            sizes = [count, *(size for _, size in others)]
            if (
                count > 0
                and others == columns
                and start <= first
                and first + count <= start + length
                and self._shape(piece) == sizes
            ):
                rows[first] = (count, piece)
        keys, row = [], start
        while row in rows:
            count, key = rows[row]
            keys.append(key)
            row += count
        return tuple(keys) if row == start + length else None

    def _shape(self, key: bytes) -> list[int] | None:
        entry = self.entries.get(key)
        return None if entry is None else [dim.size for dim in entry.shape.dim]


def _check(key: bytes, entry: tensor_bundle_pb2.BundleEntryProto) -> None:
    """What no reader looks at again: places, and the dimensions of slices."""
    rank = len(entry.shape.dim)
    numbers = (entry.shard_id, entry.offset, entry.size, *(dim.size for dim in entry.shape.dim))
    if min(numbers) < 0 or any(len(each.extent) != rank for each in entry.slices):
        raise DataLoss(f"the entry of {key.decode(errors='replace')!r} is damaged")


def index_file(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.index")


def data_file(prefix: Path, shard_id: int, num_shards: int) -> Path:
    return prefix.with_name(f"{prefix.name}.data-{shard_id:05d}-of-{num_shards:05d}")


def rewrite(source: Checkpoint, prefix: Path, apart: Collection[Pieces]) -> Rewritten:
    """Copy a checkpoint, with a data shard for each tensor in ``apart``, at offset 0.

    Everything else goes into shard 0. Entries with the same bytes are stored once and
    share them. The bytes are copied by the kernel, from file to file, then read back
    from the copy and compared with the checksums in the index. All files are synced to
    disk; those of tensors in ``apart`` are made read-only.

    Args:
        source: the checkpoint to copy.
        prefix: where to write; its folder exists and holds no checkpoint of that name.
        apart: tensors, as the keys of their pieces (see ``Checkpoint.find``).

    Raises:
        NotFound: a data shard of the source is missing.
        DataLoss: a data shard is too short, or a tensor's bytes do not match their
            checksum.
    """
    stored = {key: entry for key, entry in source.entries.items() if not entry.slices}
    original = _originals(source, stored)
    own = sorted({tuple(original[key] for key in pieces) for pieces in apart})
    rest = {*original.values()}.difference(*own)
    shards = [tuple(sorted(rest, key=lambda key: (stored[key].shard_id, stored[key].offset))), *own]
    files = {}
    place: dict[bytes, tuple[int, int]] = {}
    for shard_id, keys in enumerate(shards):
        path = data_file(prefix, shard_id, len(shards))
        offset = 0
        with path.open("xb") as target:
            for key in keys:
                place.setdefault(key, (shard_id, offset))
                with _open_shard(source, stored[key]) as data:
                    _copy_range(data, stored[key].offset, target, stored[key].size)
                offset += stored[key].size
            os.fsync(target.fileno())
        files[keys] = _checked(path, [(key, stored[key]) for key in keys])
        if shard_id:
            path.chmod(READ_ONLY)
    entries = {}
    for key, entry in source.entries.items():
        entries[key] = type(entry).FromString(entry.SerializeToString())
        if not entry.slices:
            entries[key].shard_id, entries[key].offset = place[original[key]]
    copy = Checkpoint(prefix, entries, len(shards))
    _write_index(copy)
    return Rewritten(
        copy,
        rest=files[shards[0]],
        apart={pieces: files[tuple(original[key] for key in pieces)] for pieces in apart},
    )


def _write_index(checkpoint: Checkpoint) -> None:
    header = tensor_bundle_pb2.BundleHeaderProto(num_shards=checkpoint.num_shards)
    header.version.producer = 1
    table = {_HEADER_KEY: header.SerializeToString()}
    table.update((key, entry.SerializeToString()) for key, entry in sorted(checkpoint.entries.items()))
    with index_file(checkpoint.prefix).open("xb") as file:
        file.write(string_table.write(table))
        file.flush()
        os.fsync(file.fileno())


def _originals(
    source: Checkpoint, stored: dict[bytes, tensor_bundle_pb2.BundleEntryProto]
) -> dict[bytes, bytes]:
    """For each key the first key whose entry has the same bytes (often its own)."""
    alike: dict[tuple[int, int], list[bytes]] = {}
    original = {}
    for key, entry in stored.items():
        candidates = alike.setdefault((entry.size, entry.crc32c), [])
        same = (other for other in candidates if _same_bytes(source, stored[other], entry))
        original[key] = next(same, key)
        if original[key] == key:
            candidates.append(key)
    return original


def _open_shard(source: Checkpoint, entry: tensor_bundle_pb2.BundleEntryProto) -> BinaryIO:
    path = source.shard(entry.shard_id)
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise NotFound(f"{path} is missing: copy or export the checkpoint again") from None


def _chunks(data: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        chunk = data.read(min(size, _CHUNK_BYTES))
        if not chunk:
            raise DataLoss(f"{data.name} ends {size} bytes too early: copy or export the checkpoint again")
        size -= len(chunk)
        yield chunk


def _same_bytes(
    source: Checkpoint, one: tensor_bundle_pb2.BundleEntryProto, other: tensor_bundle_pb2.BundleEntryProto
) -> bool:
    with _open_shard(source, one) as first, _open_shard(source, other) as second:
        first.seek(one.offset)
        second.seek(other.offset)
        return all(
            mine == theirs
            for mine, theirs in zip(_chunks(first, one.size), _chunks(second, other.size), strict=True)
        )


def _copy_range(data: BinaryIO, offset: int, target: BinaryIO, size: int) -> None:
    """Append bytes of one file to another, in the kernel, which may share blocks."""
    shares = True
    while size:
        try:
            if shares:
                copied = os.copy_file_range(data.fileno(), target.fileno(), size, offset)
            else:
                copied = os.sendfile(target.fileno(), data.fileno(), offset, size)
        except OSError as error:
            # Not between these file systems, or not on this kernel; sendfile takes any
            # pair of files.
            unsupported = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
            if not shares or error.errno not in unsupported:
                raise
            shares = False
            continue
        if not copied:
            raise DataLoss(f"{data.name} ends {size} bytes too early: copy or export the checkpoint again")
        offset += copied
        size -= copied


def _checked(path: Path, entries: Sequence[tuple[bytes, tensor_bundle_pb2.BundleEntryProto]]) -> DataFile:
    """Read a file of consecutive entries back, check each, and digest the whole.

    Strings and variants are stored in an encoding with its own checksums, which
    TensorFlow checks when it reads.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as data:
        for key, entry in entries:
            crc = 0
            for chunk in _chunks(data, entry.size):
                crc = google_crc32c.extend(crc, chunk)
                digest.update(chunk)
            if entry.dtype not in _ENCODED_TYPES and masked(crc) != entry.crc32c:
                raise DataLoss(
                    f"tensor {key.decode(errors='replace')!r} does not match its checksum in the checkpoint: "
                    "copy or export it again"
                )
    return DataFile(path, path.stat().st_size, digest.hexdigest())


# Slices. ``TensorSlice`` and its text form: tensorflow/core/framework/tensor_slice.h.


def _parse_slice(shape_and_slice: str, shape: Sequence[int]) -> list[tuple[int, int]] | None:
    """(start, length) per dimension; None where it is none of this shape."""
    if not shape_and_slice:
        return [(0, size) for size in shape]
    *full, spec = shape_and_slice.split() or [""]
    parts = [part.partition(",") for part in spec.split(":")]
    if full != [str(size) for size in shape] or len(parts) != len(shape):
        return None
    try:
        extents = [
            (0, _FULL_EXTENT) if start == "-" else (int(start), int(length)) for start, _, length in parts
        ]
    except ValueError:
        return None
    return _whole_lengths(extents, shape)


def _extents(proto: tensor_slice_pb2.TensorSliceProto) -> list[tuple[int, int]]:
    return [
        (extent.start, extent.length if extent.HasField("length") else _FULL_EXTENT)
        for extent in proto.extent
    ]


def _whole_lengths(extents: Slice, shape: Sequence[int]) -> list[tuple[int, int]]:
    return [
        (start, size if length == _FULL_EXTENT else length)
        for (start, length), size in zip(extents, shape, strict=True)
    ]


def _slice_key(name: bytes, extents: Slice) -> bytes:
    """``checkpoint::EncodeTensorNameSlice``, in the code of ``ordered_code.h``."""
    escaped = name.replace(b"\xff", b"\xff\x00").replace(b"\x00", b"\x00\xff")
    key = _ordered_number(0) + escaped + b"\x00\x01" + _ordered_number(len(extents))
    return key + b"".join(_ordered_signed(start) + _ordered_signed(length) for start, length in extents)


def _ordered_number(value: int) -> bytes:
    size = (value.bit_length() + 7) // 8
    return bytes([size]) + value.to_bytes(size, "big")


def _ordered_signed(value: int) -> bytes:
    """A number of 7n - 1 bits in n bytes (``OrderedCode::WriteSignedNumIncreasing``).

    As many leading ones as bytes, then its two's complement; all inverted below zero.
    """
    size = (value ^ (value >> 63)).bit_length() // 7 + 1
    leading_ones = ((1 << size) - 1) << (7 * size)
    return ((leading_ones ^ value) & ((1 << (8 * size)) - 1)).to_bytes(size, "big")
