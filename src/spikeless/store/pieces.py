"""Pieces of files: whole, or as the difference to what was there before.

In: the content of a piece, and of the piece at the same place in an earlier version.
Out: an object to store, and the content again. Rows of a table are at fixed offsets in
its file, so where few rows changed, the exclusive or of old and new is zero but for
those rows, and compression leaves little more than them, whatever their length.

Objects come from a store, so what one may expand to is known before it is expanded.
"""

from __future__ import annotations

import hashlib

import numpy as np
import zstandard

from spikeless.errors import DataLoss
from spikeless.store.manifest import MAX_DIFFERENCES, Stored

#: Parameters hardly compress, so a whole piece is tried quickly; long zeros compress
#: well at any level.
_LEVEL = {"zstd": 1, "xor": 3}
#: A piece is stored whole again when its differences would take more than this share of
#: it: whoever has none of its versions fetches all of them.
_MAX_SHARE = 0.25


def digest(content: bytes | memoryview) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(content).hexdigest()


def whole(content: bytes) -> tuple[Stored, bytes]:
    """A piece as it is, compressed where that makes it smaller."""
    packed = zstandard.ZstdCompressor(level=_LEVEL["zstd"]).compress(content)
    if len(packed) < len(content):
        return Stored(digest(content), "zstd", digest(packed), len(packed)), packed
    return Stored(digest(content), "raw", digest(content), len(content)), content


def difference(content: bytes, base: bytes, chain: tuple[Stored, ...]) -> tuple[Stored, bytes] | None:
    """A piece as the difference to ``base``, which ``chain`` makes.

    None where a whole piece serves better: too much has changed, or too often.
    """
    if len(chain) > MAX_DIFFERENCES:
        return None
    packed = zstandard.ZstdCompressor(level=_LEVEL["xor"]).compress(_xor(content, base))
    if sum(stored.bytes for stored in chain[1:]) + len(packed) > _MAX_SHARE * len(content):
        return None
    return Stored(digest(content), "xor", digest(packed), len(packed)), packed


def apply(stored: Stored, data: bytes, size: int, base: bytes | None) -> bytes:
    """The content of ``size`` bytes that an object makes.

    Args:
        data: the object. Its digest has been compared.
        base: the content that a difference is from.

    Raises:
        DataLoss: it makes something else.
    """
    if stored.encoding == "raw":
        content = data
    else:
        content = _expanded(stored, data, size)
        if stored.encoding == "xor":
            content = _xor(content, base or b"")
    if len(content) != size:
        raise DataLoss(f"object {stored.object} has {len(content)} bytes instead of {size}")
    return content


def _expanded(stored: Stored, data: bytes, size: int) -> bytes:
    try:
        # What the frame says is what is allocated.
        if zstandard.frame_content_size(data) != size:
            raise DataLoss(f"object {stored.object} does not expand to the {size} bytes of its piece")
        return zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DataLoss(f"object {stored.object} cannot be expanded: {error}") from None


def _xor(content: bytes, base: bytes) -> bytes:
    """Exclusive or; a base that is shorter is continued with zeros."""
    base = base[: len(content)].ljust(len(content), b"\0")
    return np.bitwise_xor(np.frombuffer(content, np.uint8), np.frombuffer(base, np.uint8)).tobytes()
