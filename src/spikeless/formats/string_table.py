"""Sorted string tables, the format of checkpoint indexes.

In: pairs of keys and values in key order. Out: the bytes of a file, and the other way
round. The format is LevelDB's (``doc/table_format.md`` there), without compression.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence

from spikeless.errors import DataLoss, InvalidArgument
from spikeless.formats.checksum import masked_crc32c
from spikeless.formats.wire import read_varint, write_varint

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_TRAILER_BYTES = 5  # of a block: compression type, masked CRC-32C
_BLOCK_BYTES = 256 * 1024
_RESTART_INTERVAL = 16


def read(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of a table.

    Raises:
        DataLoss: it is truncated, damaged or compressed.
    """
    try:
        yield from _pairs(content)
    except (InvalidArgument, IndexError, struct.error) as error:
        raise DataLoss(str(error)) from None


def _pairs(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(content) < _FOOTER_BYTES or struct.unpack("<Q", content[-8:])[0] != _MAGIC:
        raise DataLoss("it does not end as a table does")
    footer = content[-_FOOTER_BYTES:]
    _, position = _read_handle(footer, 0)  # the metaindex, which checkpoints do not use
    index, _ = _read_handle(footer, position)
    for _, handle in _read_block(content, *index):
        block, _ = _read_handle(handle, 0)
        yield from _read_block(content, *block)


def _read_handle(data: bytes, position: int) -> tuple[tuple[int, int], int]:
    """Offset and size of a block, and the position after them."""
    offset, position = read_varint(data, position)
    size, position = read_varint(data, position)
    return (offset, size), position


def _read_block(content: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    checked = content[offset : offset + size + 1]
    (checksum,) = struct.unpack("<I", content[offset + size + 1 : offset + size + _TRAILER_BYTES])
    if masked_crc32c(checked) != checksum:
        raise DataLoss("a block fails its checksum")
    if checked[-1]:
        raise DataLoss("it is compressed, which checkpoints are not")
    block = checked[:-1]
    (restarts,) = struct.unpack("<I", block[-4:])
    end = len(block) - 4 * (restarts + 1)
    key, position = b"", 0
    while position < end:
        shared, position = read_varint(block, position)
        unshared, position = read_varint(block, position)
        length, position = read_varint(block, position)
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        yield key, block[position : position + length]
        position += length


def write(pairs: Mapping[bytes, bytes]) -> bytes:
    """A table of these pairs, which are in key order."""
    content = bytearray()

    def append(block: bytes) -> bytes:
        """Add a block and its trailer; returns its handle."""
        handle = write_varint(len(content)) + write_varint(len(block))
        content.extend(block + b"\x00" + struct.pack("<I", masked_crc32c(block + b"\x00")))
        return handle

    index: list[tuple[bytes, bytes]] = []
    pending: list[tuple[bytes, bytes]] = []
    size = 0
    for key, value in pairs.items():
        pending.append((key, value))
        size += len(key) + len(value)
        if size >= _BLOCK_BYTES:
            index.append((key, append(_block(pending))))
            pending, size = [], 0
    if pending:
        index.append((pending[-1][0], append(_block(pending))))
    handles = append(_block([])) + append(_block(index))
    return bytes(content + handles.ljust(_FOOTER_BYTES - 8, b"\x00") + struct.pack("<Q", _MAGIC))


def _block(pairs: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A block that stores every key in full; to share prefixes is optional."""
    content, restarts = bytearray(), [0]
    for position, (key, value) in enumerate(pairs):
        if position and position % _RESTART_INTERVAL == 0:
            restarts.append(len(content))
        content += write_varint(0) + write_varint(len(key)) + write_varint(len(value)) + key + value
    return bytes(content) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
