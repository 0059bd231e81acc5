"""The server's side of an HTTP/2 connection (RFC 9113), without a socket.

In: bytes of the client. Out: the streams that have news, and bytes for the client in
`Http2.output`. It is not safe for threads: the caller holds a lock.
"""

from __future__ import annotations

import struct

from spikeless.engine.transport.headers import HeaderWriter, RequestHeaders
from spikeless.engine.transport.limits import Allowance
from spikeless.engine.transport.streams import Stream
from spikeless.http2.end import (
    HEADER_TABLE_SIZE,
    MAX_CONCURRENT,
    MAX_FRAME,
    MAX_HEADER_LIST,
    NUMBER,
    Http2End,
)
from spikeless.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    MAX_WINDOW,
    PING,
    PREFACE,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    BrokenProtocol,
    ErrorCode,
    frame,
    frame_head,
)
from spikeless.http2.headers import HeaderReader

#: Streams that a client may have open at once.
MAX_STREAMS = 1 << 14
#: Bytes that a connection may make the server hold, and how many pass between looks.
MAX_HELD, _LOOK_AFTER = MAX_WINDOW, 64 << 20
#: Parts of a message that are smaller are put together.
_SMALL = 4096
#: What settings, which every stream may have to follow, and an answer count in frames.
_SETTINGS_COST, _ANSWER_EARNS = 100, 4

_MESSAGE = struct.Struct(">BI")

_DRAINING = b"draining"


class Http2(Http2End[Stream]):
    """The state of one connection."""

    def __init__(self, allowance: Allowance | None = None) -> None:
        super().__init__({MAX_CONCURRENT: MAX_STREAMS, MAX_HEADER_LIST: MAX_FRAME})
        #: Nothing new is accepted any more.
        self.draining = False
        #: The client has sent its preface and its first settings.
        self.has_begun = False
        self._has_preface = False
        self._last = 0
        self._reader = HeaderReader(RequestHeaders)
        self._writer = HeaderWriter()
        # Streams with something to send that a window holds back.
        self._waiting: dict[int, Stream] = {}
        self._allowance = allowance or Allowance()
        # Bytes that came or went since the last look at what is held.
        self._passed = 0
        self._news: list[Stream] = []

    @property
    def has_called(self) -> bool:
        """Whether the client has opened a stream."""
        return self._last > 0

    # --- what comes in ----------------------------------------------------------------

    def receive(self, content: bytes) -> list[Stream]:
        """The streams for which these bytes are news: begun, data, ended, reset.

        Raises:
            BrokenProtocol: the client broke the protocol.
        """
        self._limit_held(len(content))
        if self._rest:
            content = self._rest + content
        position = 0
        if not self._has_preface:
            if not PREFACE.startswith(content[: len(PREFACE)]):
                raise BrokenProtocol(ErrorCode.PROTOCOL_ERROR, "no HTTP/2")
            if len(content) < len(PREFACE):
                self._rest = content
                return []
            self._has_preface = True
            position = len(PREFACE)
        self._read(content, position)
        if self._is_open_again:
            self._is_open_again = False
            for stream in [*self._waiting.values()]:
                if self._window <= 0:
                    break
                self._pump(stream)
        news, self._news = self._news, []
        for stream in news:
            stream.has_news = False
        return news

    def _limit_held(self, size: int) -> None:
        self._passed += size
        if self._passed > _LOOK_AFTER:
            self._passed = 0
            if sum(stream.held for stream in self.streams.values()) > MAX_HELD:
                raise BrokenProtocol(ErrorCode.ENHANCE_YOUR_CALM, "too much is held for this connection")

    def _spend(self, count: int = 1) -> None:
        if not self._allowance.spend(count):
            raise BrokenProtocol(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that carry nothing")

    def _tell(self, stream: Stream) -> None:
        if not stream.has_news:
            stream.has_news = True
            self._news.append(stream)

    def _data(self, number: int, ends: bool, content: bytes, start: int, end: int) -> None:
        stream = self.streams.get(number)
        if start == end and not ends:
            self._spend()
        if stream is None:
            self._require_known(number)
            return
        if stream.ended:
            self._spend()
            self.reset(stream, ErrorCode.PROTOCOL_ERROR)
            return
        if end > start:
            stream.size += end - start
            # Small parts are copied: a view would keep the whole that was read.
            if end - start >= _SMALL:
                stream.received.append(memoryview(content)[start:end])
            elif stream.received and len(stream.received[-1]) < _SMALL:
                last = stream.received[-1]
                last = stream.received[-1] = last if isinstance(last, bytearray) else bytearray(last)
                last += content[start:end]
            else:
                stream.received.append(content[start:end])
        if ends:
            stream.ended = True
        self._tell(stream)

    def _require_known(self, number: int) -> None:
        if not number & 1 or (number > self._last and not self.draining):
            raise BrokenProtocol(ErrorCode.PROTOCOL_ERROR, "a stream that was not begun")

    def _headers(self, number: int, ends: bool, block: bytes) -> None:
        try:
            headers = self._reader.read(block)
        except ValueError as error:
            raise BrokenProtocol(ErrorCode.COMPRESSION_ERROR, str(error)) from None
        stream = self.streams.get(number)
        if stream is not None:  # the client's trailers
            self._spend()
            stream.ended = True
            self._tell(stream)
            return
        if number <= self._last and number & 1:
            self._spend()
            return  # of a stream that is over
        if not number & 1:
            raise BrokenProtocol(ErrorCode.PROTOCOL_ERROR, "a stream with the server's number")
        if self.draining:
            return  # said before: what comes after the last stream is not answered
        self._last = number
        stream = Stream(number, headers, self._initial_window, ended=ends)
        if not headers.is_request:
            self._spend()
            self._send_reset(number, ErrorCode.INTERNAL_ERROR)  # as grpcio says it
        elif len(self.streams) >= MAX_STREAMS:
            self._spend()
            self._send_reset(number, ErrorCode.REFUSED_STREAM)
        else:
            self.streams[number] = stream
            self._tell(stream)

    def _other(self, kind: int, number: int, flags: int, payload: bytes) -> None:
        self._spend(_SETTINGS_COST if kind == SETTINGS else 1)
        if kind == WINDOW_UPDATE:
            self._more_window(number, payload)
        elif kind == RST_STREAM:
            self._require_size(payload, 4)
            self._require_known(number)
            if stream := self.streams.get(number):
                self._close(stream)
                self._tell(stream)
        elif kind == SETTINGS:
            if not flags & ACK:
                self._settings(payload)
                self.has_begun = True
        elif kind == PING:
            self._require_size(payload, 8)
            if not flags & ACK:
                self.output.append(frame(PING, ACK, 0, payload))
            elif payload == _DRAINING and not self.draining:
                self.draining = True
                self.output.append(self._goaway(self._last, ErrorCode.NO_ERROR))
        elif kind == CONTINUATION:
            self._continue(flags, payload)
        elif kind == PUSH_PROMISE:
            raise BrokenProtocol(ErrorCode.PROTOCOL_ERROR, "a push by a client")
        # GOAWAY: the client opens no more streams, and closes when it has its answers.
        # PRIORITY and kinds that are not known say nothing.

    def _setting(self, name: int, value: int) -> None:
        if name == HEADER_TABLE_SIZE:
            self._writer.limit_table(value)

    def _grown(self, stream: Stream, is_valid: bool) -> None:
        if not is_valid:
            self.reset(stream, ErrorCode.FLOW_CONTROL_ERROR)
        elif stream.waiting:
            self._pump(stream)

    # --- what goes out ----------------------------------------------------------------

    def answer(self, stream: Stream, message: bytes) -> None:
        """The one message of a call, and its success."""
        if stream.closed:
            return
        size = len(message) + 5
        if stream.has_head or size > min(self._window, stream.window, self._largest):
            self.send(stream, message)
            self.finish(stream)
            return
        self._window -= size
        self._allowance.earn(_ANSWER_EARNS)
        number, head, success = stream.number, self._writer.head(), self._writer.success()
        self.output.append(
            b"".join(
                (
                    frame_head(HEADERS, END_HEADERS, number, len(head)),
                    head,
                    frame_head(DATA, 0, number, size),
                    _MESSAGE.pack(0, size - 5),
                    message,
                    frame_head(HEADERS, END_HEADERS | END_STREAM, number, len(success)),
                    success,
                )
            )
        )
        self._end(stream)

    def send(self, stream: Stream, message: bytes) -> None:
        """One of the messages of a call."""
        if stream.closed:
            return
        if not stream.has_head:
            stream.has_head = True
            self.output.append(frame(HEADERS, END_HEADERS, stream.number, self._writer.head()))
        self._passed += len(message)
        stream.waiting.append(_MESSAGE.pack(0, len(message)))
        if message:
            stream.waiting.append(memoryview(message))
        self._pump(stream)

    def finish(self, stream: Stream) -> None:
        """The call has succeeded, with all messages that were sent."""
        self._finish(stream, None)

    def fail(
        self, stream: Stream, code: int, message: str, trailing: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        """The call has ended in another way."""
        if not stream.closed:
            self._finish(stream, (code, message, trailing))

    def _finish(
        self, stream: Stream, failure: tuple[int, str, tuple[tuple[bytes, bytes], ...]] | None
    ) -> None:
        if stream.closed:
            return
        if failure is None:
            stream.trailers = b""
        else:
            # Literals, which are the same bytes whenever they are sent.
            stream.waiting.clear()
            stream.trailers = self._writer.failure(*failure, stream.has_head)
        self._pump(stream)

    def _pump(self, stream: Stream) -> None:
        """Send as much as the windows allow."""
        waiting, number = stream.waiting, stream.number
        while waiting and (size := min(len(waiting[0]), self._window, stream.window, self._largest)) > 0:
            part = waiting[0]
            self.output += (frame_head(DATA, 0, number, size), part[:size])
            self._allowance.earn(_ANSWER_EARNS)
            self._window -= size
            stream.window -= size
            if size == len(part):
                waiting.popleft()
            else:
                waiting[0] = part[size:]
        if not waiting and stream.trailers is not None:
            block = stream.trailers or self._writer.success()
            self.output.append(frame(HEADERS, END_HEADERS | END_STREAM, number, block))
            self._end(stream)
        elif waiting:
            self._waiting[number] = stream
        else:
            self._waiting.pop(number, None)

    def _end(self, stream: Stream) -> None:
        """All is sent; a client that would go on is told not to."""
        if not stream.ended:
            self._send_reset(stream.number, ErrorCode.NO_ERROR)
        self._close(stream)

    def _close(self, stream: Stream) -> None:
        stream.closed = True
        stream.waiting.clear()
        stream.received.clear()
        self.streams.pop(stream.number, None)
        self._waiting.pop(stream.number, None)

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """End a stream without an answer."""
        if not stream.closed:
            self._send_reset(stream.number, code)
            self._close(stream)
            self._tell(stream)

    def _send_reset(self, number: int, code: ErrorCode) -> None:
        self.output.append(frame(RST_STREAM, 0, number, NUMBER.pack(code)))

    def drain(self) -> None:
        """Ask the client for no new streams; those on their way are answered.

        Its answer to a ping tells when it knows.
        """
        self.output.append(self._goaway(MAX_WINDOW, ErrorCode.NO_ERROR) + frame(PING, 0, 0, _DRAINING))

    def refuse(self, code: ErrorCode) -> None:
        """End all streams and say why: the client broke the protocol."""
        self.draining = True
        for stream in [*self.streams.values()]:
            self._close(stream)
        self.output.append(self._goaway(self._last, code))

    def _goaway(self, last: int, code: ErrorCode) -> bytes:
        return frame(GOAWAY, 0, 0, NUMBER.pack(last) + NUMBER.pack(code))
