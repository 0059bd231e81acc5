"""Frames of HTTP/2 (RFC 9113): their kinds, flags and codes of errors."""

from __future__ import annotations

import struct
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
#: The largest window, and number of a stream, that there is.
MAX_WINDOW = (1 << 31) - 1
#: Bytes before the content of each frame: size, kind, flags, stream.
FRAME_HEAD = struct.Struct(">HBBBI")

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = range(5)
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(5, 10)
END_STREAM, ACK, END_HEADERS, PADDED, HAS_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20


class ErrorCode(IntEnum):
    """Why a stream or a connection ends."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC


class BrokenProtocol(Exception):
    """The other end broke the protocol: its connection ends."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return frame_head(kind, flags, stream, len(payload)) + payload


def frame_head(kind: int, flags: int, stream: int, size: int) -> bytes:
    """What comes before a frame's content of ``size`` bytes."""
    return FRAME_HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream)


def unpadded(content: bytes, start: int, end: int) -> tuple[int, int]:
    """Where padded content between ``start`` and ``end`` begins and ends by itself."""
    if start == end or start + 1 + content[start] > end:
        raise BrokenProtocol(ErrorCode.PROTOCOL_ERROR, "more padding than there is")
    return start + 1, end - content[start]
