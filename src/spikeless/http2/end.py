"""What both ends of an HTTP/2 connection do alike: frames, header blocks, windows.

In: bytes of the other end, to `Http2End._read`. Out: bytes for it, in
`Http2End.output`. What a frame means is for the end that inherits this.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

from spikeless.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_HEAD,
    HAS_PRIORITY,
    HEADERS,
    MAX_WINDOW,
    PADDED,
    SETTINGS,
    WINDOW_UPDATE,
    BrokenProtocol,
    ErrorCode,
    frame,
    unpadded,
)
from spikeless.http2.headers import MAX_BLOCK_BYTES

_DEFAULT_WINDOW = 65535
#: The largest frame that is taken: HTTP/2's least.
MAX_FRAME = 16384
#: The largest frame that is sent, where the other end takes it.
_LARGEST_SENT = 1 << 20
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT, INITIAL_WINDOW, MAX_FRAME_SIZE, MAX_HEADER_LIST = range(1, 7)

_SETTING = struct.Struct(">HI")
NUMBER = struct.Struct(">I")


class _Stream(Protocol):
    #: Bytes that the other end may still be sent.
    window: int


_S = TypeVar("_S", bound=_Stream)


class Http2End(ABC, Generic[_S]):
    """The state that a client and a server have alike.

    It takes messages of any size: its own windows are the largest there are.
    """

    def __init__(self, settings: dict[int, int]) -> None:
        self.streams: dict[int, _S] = {}
        #: What is to be sent.
        self.output: list[bytes | memoryview] = []
        self._rest = b""
        self._window = _DEFAULT_WINDOW
        self._initial_window = _DEFAULT_WINDOW
        self._largest = MAX_FRAME
        self._consumed = 0
        # A header block that is not complete: its stream, whether that ends, and parts.
        self._block: tuple[int, bool, list[bytes]] | None = None
        # The connection's window, or every stream's, has grown.
        self._is_open_again = False
        settings = {INITIAL_WINDOW: MAX_WINDOW, **settings}
        self.output.append(
            frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*setting) for setting in settings.items()))
            + frame(WINDOW_UPDATE, 0, 0, NUMBER.pack(MAX_WINDOW - _DEFAULT_WINDOW))
        )

    @property
    def is_within_frame(self) -> bool:
        """Whether the last bytes ended within a frame, so that more will come."""
        return bool(self._rest)

    def _read(self, content: bytes, position: int = 0) -> None:
        """Take what has arrived, from ``position`` on; ``_rest`` is in it already."""
        end = len(content)
        while end - position >= 9:
            high, low, kind, flags, number = FRAME_HEAD.unpack_from(content, position)
            size = high << 8 | low
            if size > MAX_FRAME:
                raise BrokenProtocol(ErrorCode.FRAME_SIZE_ERROR, "a frame that is too large")
            start = position + 9
            if end - start < size:
                break
            position = start + size
            number &= MAX_WINDOW
            if self._block is not None and (kind != CONTINUATION or number != self._block[0]):
                raise BrokenProtocol(ErrorCode.PROTOCOL_ERROR, "a header block that does not end")
            if kind == DATA:
                self._data_frame(number, flags, content, start, position)
            elif kind == HEADERS:
                self._headers_frame(number, flags, content[start:position])
            else:
                self._other(kind, number, flags, content[start:position])
        self._rest = content[position:]

    def _data_frame(self, number: int, flags: int, content: bytes, start: int, end: int) -> None:
        self._consumed += end - start
        if self._consumed > MAX_WINDOW // 2:
            self.output.append(frame(WINDOW_UPDATE, 0, 0, NUMBER.pack(self._consumed)))
            self._consumed = 0
        if flags & PADDED:
            start, end = unpadded(content, start, end)
        self._data(number, bool(flags & END_STREAM), content, start, end)

    def _headers_frame(self, number: int, flags: int, block: bytes) -> None:
        if flags & (PADDED | HAS_PRIORITY):
            start, end = unpadded(block, 0, len(block)) if flags & PADDED else (0, len(block))
            start += 5 if flags & HAS_PRIORITY else 0
            if start > end:
                raise BrokenProtocol(ErrorCode.PROTOCOL_ERROR, "headers without their priority")
            block = block[start:end]
        if flags & END_HEADERS:
            self._headers(number, bool(flags & END_STREAM), block)
        else:
            self._block = number, bool(flags & END_STREAM), [block]

    def _continue(self, flags: int, part: bytes) -> None:
        if self._block is None:
            raise BrokenProtocol(ErrorCode.PROTOCOL_ERROR, "a continuation of nothing")
        number, ends, parts = self._block
        parts.append(part)
        # An empty part costs something, too.
        if sum(map(len, parts)) > MAX_BLOCK_BYTES or len(parts) > 64:
            raise BrokenProtocol(ErrorCode.ENHANCE_YOUR_CALM, "a header block that is too large")
        if flags & END_HEADERS:
            self._block = None
            self._headers(number, ends, b"".join(parts))

    def _more_window(self, number: int, payload: bytes) -> None:
        more = self._number(payload) & MAX_WINDOW
        stream = self.streams.get(number)
        if not number:
            # Streams wait for it only while there is none.
            self._is_open_again |= self._window <= 0
            self._window += more
            if not more or self._window > MAX_WINDOW:
                raise BrokenProtocol(ErrorCode.FLOW_CONTROL_ERROR, "a window that is too large")
        elif stream is None:
            self._require_known(number)
        else:
            stream.window += more
            self._grown(stream, bool(more) and stream.window <= MAX_WINDOW)

    def _settings(self, payload: bytes) -> None:
        if len(payload) % _SETTING.size:
            raise BrokenProtocol(ErrorCode.FRAME_SIZE_ERROR, "settings of a wrong size")
        # Of equal settings the last, as if all were followed one after the other.
        for name, value in dict(_SETTING.iter_unpack(payload)).items():
            if name == INITIAL_WINDOW:
                if value > MAX_WINDOW:
                    raise BrokenProtocol(ErrorCode.FLOW_CONTROL_ERROR, "a window that is too large")
                for stream in self.streams.values():
                    stream.window += value - self._initial_window
                self._initial_window = value
                self._is_open_again = True
            elif name == MAX_FRAME_SIZE:
                if not MAX_FRAME <= value < 1 << 24:
                    raise BrokenProtocol(ErrorCode.PROTOCOL_ERROR, "a frame size that there is not")
                self._largest = min(value, _LARGEST_SENT)
            else:
                self._setting(name, value)
        self.output.append(frame(SETTINGS, ACK, 0))

    def _require_size(self, payload: bytes, size: int) -> None:
        if len(payload) != size:
            raise BrokenProtocol(ErrorCode.FRAME_SIZE_ERROR, "a frame of a wrong size")

    def _number(self, payload: bytes) -> int:
        """What a frame says that says only a number."""
        self._require_size(payload, NUMBER.size)
        number: int = NUMBER.unpack(payload)[0]
        return number

    # --- what it means ----------------------------------------------------------------

    @abstractmethod
    def _data(self, number: int, ends: bool, content: bytes, start: int, end: int) -> None:
        """A part of a message, between ``start`` and ``end``."""

    @abstractmethod
    def _headers(self, number: int, ends: bool, block: bytes) -> None:
        """A whole header block."""

    @abstractmethod
    def _other(self, kind: int, number: int, flags: int, payload: bytes) -> None:
        """Any other frame."""

    @abstractmethod
    def _setting(self, name: int, value: int) -> None:
        """A setting that has nothing to do with windows and frames."""

    @abstractmethod
    def _require_known(self, number: int) -> None:
        """That a stream was begun, be it over or not."""

    @abstractmethod
    def _grown(self, stream: _S, is_valid: bool) -> None:
        """A stream's window has grown; not ``is_valid``: beyond what there is."""
