"""Protocol buffer encoding, where a message object would cost too much.

In: serialized messages. Out: their top-level fields as views, without a copy. The
format is described in "Encoding" of the protocol buffer
documentation.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

from spikeless.errors import InvalidArgument

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {FIXED64: 8, FIXED32: 4}
#: Of a message from a client, and of those in it, that are looked at one by one. The
#: numbers of a large tensor are one field; other messages are for the parser.
MAX_FIELDS = 1 << 12
#: Of a number, as for every parser.
_MAX_VARINT_BYTES = 10


def read_varint(content: bytes | memoryview, position: int) -> tuple[int, int]:
    """The number at ``position``, and the position after it.

    Raises:
        InvalidArgument: the content ends within the number, or it is too long.
    """
    value = shift = 0
    for byte in content[position : position + _MAX_VARINT_BYTES]:
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    if position < len(content):
        raise InvalidArgument(f"the message has a number of more than {_MAX_VARINT_BYTES} bytes")
    raise InvalidArgument("the message ends within a number")


def write_varint(value: int) -> bytes:
    """A number that is not negative."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


@functools.lru_cache(maxsize=1024)
def head(number: int, size: int) -> bytes:
    """What comes before the ``size`` bytes of a field that holds bytes."""
    return write_varint(number << 3 | BYTES) + write_varint(size)


def field(number: int, content: bytes | memoryview) -> bytes:
    """A field that holds bytes: a string, a message or packed numbers."""
    return b"".join((head(number, len(content)), content))


def allowance(count: int = MAX_FIELDS) -> Iterator[None]:
    """For `fields`: as many of them, in one message or in several."""
    return itertools.repeat(None, count)


def fields(
    content: memoryview, allowed: Iterator[None] | None = None
) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Each top-level field: its number, the whole, and the value where it holds bytes.

    Args:
        content: a serialized message.
        allowed: an `allowance`, from which each field takes one. A field may be two
            bytes, and costs a microsecond and some hundred bytes here.

    Raises:
        InvalidArgument: the content is no message, or one with groups, or has more
            fields than are allowed.
    """
    position = 0
    while position < len(content):
        if allowed is not None and next(allowed, content) is content:
            raise InvalidArgument("the message has too many fields")
        start = position
        tag, position = read_varint(content, position)
        kind, value = tag & 7, position
        if kind == BYTES:
            length, value = read_varint(content, position)
            position = value + length
        elif kind == VARINT:
            _, position = read_varint(content, position)
        elif kind in _FIXED_SIZES:
            position += _FIXED_SIZES[kind]
        else:
            raise InvalidArgument("the message has a field of an unknown kind")
        if position > len(content):
            raise InvalidArgument("the message ends within a field")
        yield tag >> 3, content[start:position], content[value:position]
