"""The checksums of TFRecord files and checkpoints: CRC-32C, masked.

The mask turns a checksum by 15 bits to the right and adds a constant, so that checksums
of data that holds checksums stay good ones (``tensorflow/core/lib/hash/crc32c.h``).
"""

from __future__ import annotations

import google_crc32c

_MASK_DELTA = 0xA282EAD8


def masked_crc32c(content: bytes) -> int:
    """The checksum as files store it."""
    return masked(google_crc32c.value(content))


def masked(crc: int) -> int:
    """A plain CRC-32C as files store it."""
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF
