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
_STEP_BYTES = 1 << 18
_MAX_WINDOW_BYTES = 1 << 27


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

    None where a whole piece serves better: its length or too much has changed, or it
    has changed too often.
    """
    if len(chain) > MAX_DIFFERENCES or len(content) != len(base):
        return None
    changes = np.bitwise_xor(np.frombuffer(content, np.uint8), np.frombuffer(base, np.uint8))
    packed = zstandard.ZstdCompressor(level=_LEVEL["xor"]).compress(changes.tobytes())
    if sum(stored.bytes for stored in chain[1:]) + len(packed) > _MAX_SHARE * len(content):
        return None
    return Stored(digest(content), "xor", digest(packed), len(packed)), packed


def apply(stored: Stored, data: bytes, content: memoryview) -> None:
    """Turn what a piece was into what an object makes of it, in place.

    Args:
        data: the object. Its digest has been compared.
        content: the whole piece, writable. A difference is to what is in it; other
            objects replace that.

    Raises:
        DataLoss: the object makes a piece of another length.
    """
    if stored.encoding == "raw":
        if len(data) != len(content):
            raise DataLoss(f"object {stored.object} has {len(data)} bytes instead of {len(content)}")
        content[:] = data
    else:
        _expand(stored, data, content)


def _expand(stored: Stored, data: bytes, content: memoryview) -> None:
    """Expand an object step by step, whatever it claims to expand to."""
    step = memoryview(bytearray(_STEP_BYTES))
    target = np.frombuffer(content, np.uint8)
    try:
        if zstandard.frame_content_size(data) != len(content):
            raise DataLoss(f"object {stored.object} does not expand to the {len(content)} bytes of its piece")
        expander = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
        with expander.stream_reader(data, read_across_frames=True) as stream:
            done = 0
            while count := stream.readinto(step):
                if count > len(content) - done:
                    raise DataLoss(f"object {stored.object} expands to more than its piece")
                part = target[done : done + count]
                new = np.frombuffer(step[:count], np.uint8)
                if stored.encoding == "xor":
                    np.bitwise_xor(part, new, out=part)
                else:
                    part[:] = new
                done += count
    except zstandard.ZstdError as error:
        raise DataLoss(f"object {stored.object} cannot be expanded: {error}") from None
    if done != len(content):
        raise DataLoss(f"object {stored.object} expands to {done} bytes instead of {len(content)}")
