"""Read and write TFRecord files without TensorFlow.

In: bytes per record. Out: a file of records, each framed as
(``tensorflow/core/lib/io/record_writer.h``)

    uint64 length, uint32 masked crc32c of it, the bytes, uint32 masked crc32c of them

all little-endian.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from spikeless.disk.atomic import atomic_writer
from spikeless.errors import DataLoss, NotFound
from spikeless.formats.checksum import masked_crc32c

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_GZIP_MAGIC = b"\x1f\x8b"

#: A record longer than this is taken for corruption: no protocol message is longer.
MAX_RECORD_BYTES = (1 << 31) - 1
#: Long records are read in pieces of this size, so that a wrong length takes no memory
#: that the file lacks.
_PIECE_BYTES = 1 << 24


def frame(record: bytes) -> bytes:
    """One record with its header and footer, as it stands in a file."""
    length = struct.pack("<Q", len(record))
    return b"".join((length, _checksum(length), record, _checksum(record)))


def _checksum(content: bytes) -> bytes:
    return _FOOTER.pack(masked_crc32c(content))


def write(path: str | os.PathLike[str], records: Iterable[bytes]) -> None:
    """Write ``records`` to ``path``, whole or not at all."""
    with atomic_writer(path) as file:
        file.writelines(map(frame, records))


def read(path: str | os.PathLike[str], *, gzipped: bool | None = False) -> Iterator[bytes]:
    """The records of a file, one at a time.

    Args:
        path: the file.
        gzipped: whether the file is gzip-compressed; None detects it. TensorFlow
            Serving reads its warmup file uncompressed only.

    Raises:
        NotFound: there is no such file, or it may not be read.
        DataLoss: the file is truncated or fails a checksum; names the file and the
            record, counted from 1.
    """
    with _open(path) as raw:
        if gzipped is None:
            gzipped = _looks_gzipped(raw)
        if not gzipped:
            yield from _records(raw, os.fspath(path))
            return
        with gzip.GzipFile(fileobj=raw) as unzipped:
            yield from _records(unzipped, os.fspath(path))


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise NotFound(f"{os.fspath(path)} cannot be read: {error.strerror}") from None


def _looks_gzipped(file: BinaryIO) -> bool:
    """The magic number says so, and it is not the length of a record by chance."""
    start = file.read(_HEADER.size)
    file.seek(0)
    return start.startswith(_GZIP_MAGIC) and not _is_header(start)


def _is_header(content: bytes) -> bool:
    return len(content) == _HEADER.size and _checksum(content[:8]) == content[8:]


def _records(file: BinaryIO | gzip.GzipFile, name: str) -> Iterator[bytes]:
    number = 0
    while True:
        number += 1
        where = f"{name}: record {number}"
        header = _read(file, _HEADER.size, where)
        if not header:
            return
        if len(header) < _HEADER.size:
            raise DataLoss(f"{where} is truncated in its header")
        if not _is_header(header):
            raise DataLoss(f"{where} has a corrupt header: this is no TFRecord file, or it was damaged")
        length = _HEADER.unpack(header)[0]
        if length > MAX_RECORD_BYTES:
            raise DataLoss(f"{where} claims to have {length} bytes; at most {MAX_RECORD_BYTES} are possible")
        record = _read(file, length, where)
        footer = _read(file, _FOOTER.size, where)
        if len(record) < length or len(footer) < _FOOTER.size:
            raise DataLoss(f"{where} is truncated: {len(record)} of its {length} bytes are there")
        if _checksum(record) != footer:
            raise DataLoss(f"{where} fails its checksum: the file was damaged")
        yield record


def _read(file: BinaryIO | gzip.GzipFile, size: int, where: str) -> bytes:
    try:
        if size <= _PIECE_BYTES:
            return file.read(size)
        pieces = []
        while size and (piece := file.read(min(size, _PIECE_BYTES))):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataLoss(f"{where} cannot be decompressed: {error}") from None
