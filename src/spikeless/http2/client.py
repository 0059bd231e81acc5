"""A client's end of an HTTP/2 connection, without a socket.

In: calls as headers and a body, and bytes of the server. Out: how calls ended, and
bytes for the server in `Http2Client.output`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from spikeless.http2.end import ENABLE_PUSH, HEADER_TABLE_SIZE, MAX_CONCURRENT, Http2End
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
from spikeless.http2.headers import HeaderEncoder, HeaderList, HeaderReader


@dataclass(eq=False, slots=True)
class Answer:
    """What a server has said to one call."""

    #: The caller's.
    tag: int
    #: The headers that came last: trailers, where there are any.
    headers: dict[bytes, bytes] = field(default_factory=dict)
    #: The body, as it came.
    parts: list[bytes] = field(default_factory=list)
    #: Why the server ended the call before its answer did; None: it did not.
    reset: int | None = None


@dataclass(eq=False, slots=True)
class _Stream:
    answer: Answer
    #: Bytes that the server may still be sent.
    window: int
    #: What the windows held back of the body.
    body: memoryview


class Http2Client(Http2End[_Stream]):
    """The state of one connection.

    A call that the server has no place for waits here until it has.
    """

    def __init__(self) -> None:
        super().__init__({ENABLE_PUSH: 0})
        self.output.insert(0, PREFACE)
        #: The server has announced the end of the connection: nothing more can be sent.
        self.ended = False
        self._queue: deque[tuple[Answer, HeaderList, memoryview]] = deque()
        self._held: dict[int, _Stream] = {}  # Whose body the windows hold back.
        self._most = MAX_WINDOW
        self._next = 1
        self._reader = HeaderReader(dict[bytes, bytes])
        self._encoder = HeaderEncoder()
        self._answers: list[Answer] = []

    def call(self, tag: int, headers: HeaderList, body: bytes) -> None:
        """Start a call; `receive` gives its answer with the same `tag`."""
        answer = Answer(tag)
        if self._queue or len(self.streams) >= self._most:
            self._queue.append((answer, headers, memoryview(body)))
        else:
            self._begin(answer, headers, memoryview(body))

    def waiting(self) -> list[int]:
        """The tags of calls without an answer."""
        return [stream.answer.tag for stream in self.streams.values()] + [
            answer.tag for answer, _, _ in self._queue
        ]

    def _begin(self, answer: Answer, headers: HeaderList, body: memoryview) -> None:
        number = self._next
        self._next += 2
        stream = self.streams[number] = _Stream(answer, self._initial_window, body)
        block = self._encoder.write(headers)
        flags = END_HEADERS if body else END_HEADERS | END_STREAM
        self.output += (frame_head(HEADERS, flags, number, len(block)), block)
        self._send_body(number, stream)

    def _send_body(self, number: int, stream: _Stream) -> None:
        """Send as much of a body as the windows allow."""
        body = stream.body
        while (size := min(len(body), self._window, stream.window, self._largest)) > 0:
            flags = END_STREAM if size == len(body) else 0
            self.output += (frame_head(DATA, flags, number, size), body[:size])
            self._window -= size
            stream.window -= size
            body = body[size:]
        stream.body = body
        if body:
            self._held[number] = stream
        else:
            self._held.pop(number, None)

    # --- what comes in ----------------------------------------------------------------

    def receive(self, content: bytes) -> list[Answer]:
        """The calls that end with these bytes.

        Raises:
            BrokenProtocol: the server broke the protocol, or speaks another.
        """
        if self._rest:
            content = self._rest + content
        self._read(content)
        if not self.ended:
            self._go_on()
        answers, self._answers = self._answers, []
        return answers

    def _go_on(self) -> None:
        """Send what windows and places allow, now that all has been read."""
        if self._is_open_again:
            self._is_open_again = False
            for number, stream in [*self._held.items()]:
                if self._window <= 0:
                    break
                self._send_body(number, stream)
        while self._queue and len(self.streams) < self._most:
            self._begin(*self._queue.popleft())

    def _end(self, number: int) -> None:
        if stream := self.streams.pop(number, None):
            self._held.pop(number, None)
            self._answers.append(stream.answer)

    def _data(self, number: int, ends: bool, content: bytes, start: int, end: int) -> None:
        stream = self.streams.get(number)
        if stream is None:
            self._require_known(number)
            return
        stream.answer.parts.append(content[start:end])
        if ends:
            self._end(number)

    def _require_known(self, number: int) -> None:
        if not number & 1 or number >= self._next:
            raise BrokenProtocol(ErrorCode.PROTOCOL_ERROR, "a stream that was not begun")

    def _headers(self, number: int, ends: bool, block: bytes) -> None:
        self._require_known(number)
        try:
            headers = self._reader.read(block)
        except ValueError as error:
            raise BrokenProtocol(ErrorCode.COMPRESSION_ERROR, str(error)) from None
        if stream := self.streams.get(number):
            stream.answer.headers = headers
            if ends:
                self._end(number)

    def _other(self, kind: int, number: int, flags: int, payload: bytes) -> None:
        if kind == RST_STREAM:
            self._require_known(number)
            code = self._number(payload)
            if stream := self.streams.get(number):
                stream.answer.reset = code
                self._end(number)
        elif kind == CONTINUATION:
            self._continue(flags, payload)
        elif kind == WINDOW_UPDATE:
            self._more_window(number, payload)
        elif kind == SETTINGS and not flags & ACK:
            self._settings(payload)
        elif kind == PING and not flags & ACK:
            self.output.append(frame(PING, ACK, 0, payload))
        elif kind == GOAWAY:
            self.ended = True
        elif kind == PUSH_PROMISE:
            raise BrokenProtocol(ErrorCode.PROTOCOL_ERROR, "a push, which was not asked for")

    def _setting(self, name: int, value: int) -> None:
        if name == MAX_CONCURRENT:
            self._most = value
        elif name == HEADER_TABLE_SIZE:
            self._encoder.limit_table(value)

    def _grown(self, stream: _Stream, is_valid: bool) -> None:
        if not is_valid:
            raise BrokenProtocol(ErrorCode.FLOW_CONTROL_ERROR, "a window that is too large")
        self._is_open_again = True
