"""A minimal gRPC connection: one socket, unary calls as bytes, no event loop.

In: method path and serialised message. Out: status, and the answer's bytes. The framing
of gRPC over HTTP/2 is described in grpc's ``doc/PROTOCOL-HTTP2.md``.

The caller waits on `fileno`, then calls `read` and `parse`, so that it can take the
time of arrival before anything is parsed. The sockets are those of the operating
system, even where gevent has patched them.
"""

from __future__ import annotations

import ssl
import struct
from dataclasses import dataclass
from typing import Any

from gevent.monkey import get_original

from spikeless.errors import Code, InvalidArgument, Unavailable
from spikeless.http2.client import Answer, Http2Client
from spikeless.http2.frames import BrokenProtocol, ErrorCode
from spikeless.http2.headers import HeaderList
from spikeless.openloop.tls import TlsSession

#: The compressed flag and the length in front of each message.
PREFIX = struct.Struct(">BI")

_socket = get_original("socket", "socket")
_getaddrinfo = get_original("socket", "getaddrinfo")

_AF_UNSPEC, _SOCK_STREAM, _IPPROTO_TCP, _TCP_NODELAY = 0, 1, 6, 1
_CONNECT_SECONDS = 1.0
_RECEIVE_BYTES = 1 << 18


@dataclass
class Reply:
    """The end of a call."""

    #: The caller's.
    tag: int
    #: The gRPC status.
    code: int
    #: Empty unless the status is OK.
    message: bytes = b""


class Connection:
    """One HTTP/2 connection to a gRPC server. `target` is ``host:port``.

    `tls` is for a server with TLS: whom to trust, and what to show.
    """

    def __init__(self, target: str, tls: ssl.SSLContext | None = None) -> None:
        self.target = target
        self.host, self.port = parse_target(target)
        self._headers: dict[str, HeaderList] = {}
        self._outgoing = b""
        self._sock: Any = None
        self._context = tls
        self._tls: TlsSession | None = None
        self._http2 = Http2Client()

    def open(self, timeout: float) -> None:
        """Connect. `timeout` (seconds) is the deadline that every call carries.

        Raises:
            Unavailable: nobody listens there.
        """
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
        self.flush()

    @property
    def is_open(self) -> bool:
        return self._sock is not None

    @property
    def ended(self) -> bool:
        """The server has announced the end of the connection: nothing can be sent."""
        return self._http2.ended

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
        calls, self._http2 = self._http2.waiting(), Http2Client()
        self._outgoing = b""
        return [Reply(tag, Code.UNAVAILABLE) for tag in calls]

    def send(self, tag: int, path: str, message: bytes) -> None:
        """Start a call; `parse` returns its end with the same `tag`."""
        headers = self._headers.get(path) or self._header_list(path)
        self._http2.call(tag, headers, PREFIX.pack(0, len(message)) + message)

    def _header_list(self, path: str) -> HeaderList:
        headers = (
            (b":method", b"POST"),
            (b":scheme", b"http" if self._tls is None else b"https"),
            (b":path", path.encode()),
            (b":authority", self.target.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"user-agent", b"spikeless"),
            (b"grpc-timeout", self._timeout),
        )
        self._headers[path] = headers
        return headers

    def flush(self) -> None:
        """Send what the socket takes; the rest waits for the next call.

        Raises:
            OSError: the connection is broken.
            Unavailable: there is no TLS with the server.
        """
        content = b"".join(self._http2.output)
        self._http2.output.clear()
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
            answers = self._http2.receive(content)
        except BrokenProtocol as error:
            raise Unavailable(f"{self.target} does not speak HTTP/2: {error}") from None
        return [_reply(answer) for answer in answers]


def _reply(answer: Answer) -> Reply:
    if answer.reset is not None:
        return Reply(answer.tag, _RESET_CODES.get(answer.reset, Code.INTERNAL))
    code = _STATUSES.get(answer.headers.get(b"grpc-status", b""), Code.UNKNOWN)
    return Reply(answer.tag, code, b"".join(answer.parts)[PREFIX.size :])


_STATUSES = {str(code.value).encode(): code for code in Code}
#: HTTP/2 error -> gRPC status (PROTOCOL-HTTP2.md, "HTTP2 Transport Mapping").
_RESET_CODES: dict[int, Code] = {
    ErrorCode.REFUSED_STREAM: Code.UNAVAILABLE,
    ErrorCode.CANCEL: Code.CANCELLED,
    ErrorCode.ENHANCE_YOUR_CALM: Code.RESOURCE_EXHAUSTED,
    ErrorCode.INADEQUATE_SECURITY: Code.PERMISSION_DENIED,
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
