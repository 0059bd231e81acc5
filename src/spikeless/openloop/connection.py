"""A minimal gRPC connection: one socket, unary calls as bytes, no event loop.

In: method path and serialised message. Out: status, and the answer's bytes. The framing
of gRPC over HTTP/2 is described in grpc's ``doc/PROTOCOL-HTTP2.md``; h2 speaks HTTP/2.

The caller waits on `fileno`, then calls `read` and `parse`, so that it can take the
time of arrival before anything is parsed. The sockets are those of the operating
system, even where gevent has patched them.
"""

from __future__ import annotations

import ssl
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import h2.connection
import h2.errors
import h2.exceptions
import h2.settings
from gevent.monkey import get_original
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)

from spikeless.errors import Code, InvalidArgument, Unavailable
from spikeless.openloop.http2 import PREFIX, configuration
from spikeless.openloop.tls import TlsSession

_socket = get_original("socket", "socket")
_getaddrinfo = get_original("socket", "getaddrinfo")

_AF_UNSPEC, _SOCK_STREAM, _IPPROTO_TCP, _TCP_NODELAY = 0, 1, 6, 1
_CONNECT_SECONDS = 1.0
_RECEIVE_BYTES = 1 << 18
_MAX_WINDOW = (1 << 31) - 1


@dataclass
class Reply:
    """The end of a call."""

    #: The caller's.
    tag: int
    #: The gRPC status.
    code: int
    #: Empty unless the status is OK.
    message: bytes = b""


@dataclass
class _PendingCall:
    tag: int
    body: memoryview
    code: int = Code.UNKNOWN
    parts: list[bytes] = field(default_factory=list)


class Connection:
    """One HTTP/2 connection to a gRPC server. `target` is ``host:port``.

    `tls` is for a server with TLS: whom to trust, and what to show.
    `ended`: the server has announced the end of the connection, so nothing can be sent.
    """

    def __init__(self, target: str, tls: ssl.SSLContext | None = None) -> None:
        self.ended = False
        self.target = target
        self.host, self.port = parse_target(target)
        self._calls: dict[int, _PendingCall] = {}
        self._waiting: deque[tuple[str, _PendingCall]] = deque()  # Until the server allows another stream.
        self._blocked: deque[int] = deque()  # Streams with a body that the flow-control window held back.
        self._headers: dict[str, list[tuple[bytes, bytes]]] = {}
        self._outgoing = b""
        self._sock: Any = None
        self._context = tls
        self._tls: TlsSession | None = None

    def open(self, timeout: float) -> None:
        """Connect. `timeout` (seconds) is the deadline that every call carries.

        Raises:
            Unavailable: nobody listens there.
        """
        self.ended = False
        self._headers.clear()
        self._timeout = f"{round(timeout * 1000)}m".encode()
        try:
            family, kind, protocol, _, address = _getaddrinfo(self.host, self.port, _AF_UNSPEC, _SOCK_STREAM)[
                0
            ]
            self._sock = _socket(family, kind, protocol)
            self._sock.settimeout(_CONNECT_SECONDS)
            self._sock.connect(address)
            self._sock.setsockopt(_IPPROTO_TCP, _TCP_NODELAY, 1)
            self._sock.setblocking(False)
        except OSError as error:
            self.close()
            raise Unavailable(f"cannot connect to {self.target}: {error}") from None
        if self._context is not None:
            self._tls = TlsSession(self._context, self.host, "h2")
        self._h2 = h2.connection.H2Connection(configuration(client_side=True))
        self._h2.initiate_connection()
        self._h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: _MAX_WINDOW})
        self._h2.increment_flow_control_window(_MAX_WINDOW - 65535)
        self.flush()

    @property
    def is_open(self) -> bool:
        return self._sock is not None

    @property
    def wants_write(self) -> bool:
        """Whether bytes wait: call `flush` once the socket is writable."""
        return bool(self._outgoing)

    def fileno(self) -> int:
        number: int = self._sock.fileno()
        return number

    def close(self) -> list[Reply]:
        """Close the socket; calls in flight end as UNAVAILABLE."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        calls = [*self._calls.values(), *(call for _, call in self._waiting)]
        self._calls.clear()
        self._waiting.clear()
        self._blocked.clear()
        self._outgoing = b""
        return [Reply(call.tag, Code.UNAVAILABLE) for call in calls]

    def send(self, tag: int, path: str, message: bytes) -> None:
        """Start a call; `parse` returns its end with the same `tag`."""
        call = _PendingCall(tag, memoryview(PREFIX.pack(0, len(message)) + message))
        if len(self._calls) < self._h2.remote_settings.max_concurrent_streams:
            self._start(path, call)
        else:
            self._waiting.append((path, call))

    def _start(self, path: str, call: _PendingCall) -> None:
        stream = self._h2.get_next_available_stream_id()
        self._h2.send_headers(stream, self._headers.get(path) or self._header_list(path))
        self._calls[stream] = call
        self._send_body(stream)

    def _header_list(self, path: str) -> list[tuple[bytes, bytes]]:
        headers = [
            (b":method", b"POST"),
            (b":scheme", b"http" if self._tls is None else b"https"),
            (b":path", path.encode()),
            (b":authority", self.target.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"user-agent", b"spikeless"),
            (b"grpc-timeout", self._timeout),
        ]
        self._headers[path] = headers
        return headers

    def _send_body(self, stream: int) -> None:
        """Send as much of a call's message as the flow-control windows allow."""
        call = self._calls[stream]
        while call.body:
            size = min(
                len(call.body), self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size
            )
            if size <= 0:
                self._blocked.append(stream)
                return
            self._h2.send_data(stream, call.body[:size].tobytes(), end_stream=size == len(call.body))
            call.body = call.body[size:]

    def flush(self) -> None:
        """Send what the socket takes; the rest waits for the next call.

        Raises:
            OSError: the connection is broken.
            Unavailable: there is no TLS with the server.
        """
        content = self._h2.data_to_send()
        self._outgoing += content if self._tls is None else self._tls.encrypt(content)
        if self._outgoing:
            try:
                taken = self._sock.send(self._outgoing)
            except BlockingIOError:
                return
            self._outgoing = self._outgoing[taken:]

    def read(self) -> bytes:
        """The bytes that have arrived; empty once the server has hung up."""
        content: bytes = self._sock.recv(_RECEIVE_BYTES)
        return content

    def parse(self, content: bytes) -> list[Reply]:
        """The calls that end with these bytes.

        Raises:
            Unavailable: the server does not speak HTTP/2, or there is no TLS with it.
        """
        if self._tls is not None:
            content = self._tls.decrypt(content)
        try:
            events = self._h2.receive_data(content)
        except h2.exceptions.ProtocolError as error:
            raise Unavailable(f"{self.target} does not speak HTTP/2: {error}") from None
        replies = []
        for event in events:
            if isinstance(event, DataReceived):
                if call := self._calls.get(event.stream_id):
                    call.parts.append(event.data)
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, (TrailersReceived, ResponseReceived)):
                if call := self._calls.get(event.stream_id):
                    headers = dict(event.headers)
                    call.code = int(headers.get(b"grpc-status", call.code))
            elif isinstance(event, StreamEnded):
                if call := self._calls.pop(event.stream_id, None):
                    message = b"".join(call.parts)[PREFIX.size :]
                    replies.append(Reply(call.tag, call.code, message))
            elif isinstance(event, StreamReset):
                if call := self._calls.pop(event.stream_id, None):
                    replies.append(Reply(call.tag, _RESET_CODES.get(event.error_code, Code.INTERNAL)))
            elif isinstance(event, WindowUpdated):
                self._unblock()
            elif isinstance(event, ConnectionTerminated):
                self.ended = True
        while (
            self._waiting
            and not self.ended
            and len(self._calls) < self._h2.remote_settings.max_concurrent_streams
        ):
            self._start(*self._waiting.popleft())
        return replies

    def _unblock(self) -> None:
        for _ in range(len(self._blocked)):
            stream = self._blocked.popleft()
            if stream in self._calls:
                self._send_body(stream)


#: HTTP/2 error -> gRPC status (PROTOCOL-HTTP2.md, "HTTP2 Transport Mapping").
_RESET_CODES: dict[int, Code] = {
    h2.errors.ErrorCodes.REFUSED_STREAM: Code.UNAVAILABLE,
    h2.errors.ErrorCodes.CANCEL: Code.CANCELLED,
    h2.errors.ErrorCodes.ENHANCE_YOUR_CALM: Code.RESOURCE_EXHAUSTED,
    h2.errors.ErrorCodes.INADEQUATE_SECURITY: Code.PERMISSION_DENIED,
}


def parse_target(target: str) -> tuple[str, int]:
    """Host and port of ``host:port``.

    Raises:
        InvalidArgument: it is something else.
    """
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise InvalidArgument(f"{target!r} is no address: give host:port, for example 127.0.0.1:8500")
    return host.strip("[]"), int(port)
