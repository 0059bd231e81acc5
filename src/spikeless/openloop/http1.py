"""POST calls of HTTP/1.1 over connections that are kept alive, for the open loop.

In: path and body, which is JSON. Out: the status as the gRPC one that means the same,
and the answer's body. h11 speaks HTTP/1.1.

A connection has one call at a time. Calls take the connection that has been idle
longest, so that the processes of a server share them. Where all are busy another is
made, up to `MOST_CONNECTIONS`; then calls wait here, and their latency counts that. As
by most clients, a POST that meets a broken connection is not sent again: it has failed.
"""

from __future__ import annotations

import errno
import os
import ssl
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import h11
from gevent.monkey import get_original

from spikeless.errors import Code, InvalidArgument, Unavailable
from spikeless.openloop.connection import Reply, parse_target
from spikeless.openloop.link import Ended, select

_socket = get_original("socket", "socket")
_getaddrinfo = get_original("socket", "getaddrinfo")
_AF_UNSPEC, _SOCK_STREAM, _IPPROTO_TCP, _TCP_NODELAY, _SOL_SOCKET, _SO_ERROR = 0, 1, 6, 1, 1, 4

#: Connections that are made before one is used again, and those that may be open.
FIRST_CONNECTIONS = 8
MOST_CONNECTIONS = 256
_RECEIVE_BYTES = 1 << 18
#: The gRPC status of each HTTP status, as TensorFlow Serving's REST API maps them
#: (``http_server.cc``); those that are missing are UNKNOWN.
STATUS_CODES: dict[int, Code] = {
    400: Code.INVALID_ARGUMENT,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.NOT_FOUND,
    408: Code.DEADLINE_EXCEEDED,
    409: Code.ABORTED,
    429: Code.RESOURCE_EXHAUSTED,
    499: Code.CANCELLED,
    500: Code.INTERNAL,
    501: Code.UNIMPLEMENTED,
    502: Code.UNAVAILABLE,
    503: Code.UNAVAILABLE,
    504: Code.DEADLINE_EXCEEDED,
}


class _HttpConnection:
    """One socket, and the call that it is busy with."""

    def __init__(self, address: Any) -> None:
        self.tag: int | None = None
        self._http = h11.Connection(h11.CLIENT)
        self._status = 0
        self._parts: list[bytes] = []
        self._outgoing = b""
        self._connecting = True
        family, kind, protocol, _, target = address
        self._sock = _socket(family, kind, protocol)
        self._sock.setblocking(False)
        self._sock.setsockopt(_IPPROTO_TCP, _TCP_NODELAY, 1)
        code = self._sock.connect_ex(target)
        if code not in (0, errno.EINPROGRESS):
            self._sock.close()
            raise OSError(code, os.strerror(code))

    def fileno(self) -> int:
        number: int = self._sock.fileno()
        return number

    @property
    def wants_write(self) -> bool:
        return self._connecting or bool(self._outgoing)

    @property
    def reusable(self) -> bool:
        """Whether the server has neither hung up nor said what it was not asked."""
        try:
            self._sock.recv(1)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def send(self, tag: int, request: h11.Request, message: bytes) -> None:
        self.tag = tag
        self._status, self._parts = 0, []
        parts = [self._http.send(event) for event in (request, h11.Data(message), h11.EndOfMessage())]
        self._outgoing = b"".join(part for part in parts if part)
        if not self._connecting:
            self.flush()

    def flush(self) -> None:
        """Send what the socket takes.

        Raises:
            OSError: the connection is broken, or was refused.
        """
        if self._connecting:
            if code := self._sock.getsockopt(_SOL_SOCKET, _SO_ERROR):
                raise OSError(code, os.strerror(code))
            self._connecting = False
        if self._outgoing:
            try:
                taken = self._sock.send(self._outgoing)
            except BlockingIOError:
                return
            self._outgoing = self._outgoing[taken:]

    def read(self) -> bytes:
        """What has arrived; empty when the server has hung up."""
        content: bytes = self._sock.recv(_RECEIVE_BYTES)
        return content

    def parse(self, content: bytes) -> Reply | None:
        """The end of the call, if it ends with these bytes.

        Raises:
            Unavailable: they are no answer of HTTP/1.1, or the server has hung up.
        """
        try:
            self._http.receive_data(content)
            while (event := self._http.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                if isinstance(event, h11.Response):
                    self._status = event.status_code
                elif isinstance(event, h11.Data):
                    self._parts.append(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    return self._ended()
                elif isinstance(event, h11.ConnectionClosed):
                    raise Unavailable("the server closed the connection")
        except h11.RemoteProtocolError as error:
            raise Unavailable(f"the server does not speak HTTP/1.1: {error}") from None
        return None

    def _ended(self) -> Reply:
        assert self.tag is not None
        good = 200 <= self._status < 300
        code = Code.OK if good else STATUS_CODES.get(self._status, Code.UNKNOWN)
        return Reply(self.tag, code, b"".join(self._parts) if good else b"")

    def next_call(self) -> bool:
        """Make ready for another call; False where the server wants no more."""
        self.tag = None
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    def close(self) -> None:
        self._sock.close()


class HttpLink:
    """POST calls to one HTTP/1.1 server."""

    kind = "HTTP"
    #: The deadline is the client's own: the server does not hear of it.
    grace = 0.0

    def __init__(self, target: str, timeout: float, tls: ssl.SSLContext | None = None) -> None:
        if tls is not None:
            raise InvalidArgument("requests over HTTP have no TLS here: send gRPC, or ask a proxy without it")
        self._host = target
        host, port = parse_target(target)
        try:
            self._address = _getaddrinfo(host, port, _AF_UNSPEC, _SOCK_STREAM)[0]
        except OSError as error:
            raise Unavailable(f"cannot find {target}: {error}") from None
        self._idle: deque[_HttpConnection] = deque()  # The longest idle one first.
        self._busy: dict[int, _HttpConnection] = {}
        self._waiting: dict[int, tuple[str, bytes]] = {}

    def send(self, tag: int, path: str, message: bytes) -> list[Ended]:
        count = len(self._idle) + len(self._busy)
        while self._idle and count >= FIRST_CONNECTIONS:
            connection = self._idle.popleft()
            if connection.reusable:
                return self._start(connection, tag, path, message)
            connection.close()
            count -= 1
        if count >= MOST_CONNECTIONS:
            self._waiting[tag] = (path, message)
            return []
        try:
            connection = _HttpConnection(self._address)
        except OSError:
            return [Ended(Reply(tag, Code.UNAVAILABLE), time.monotonic())]
        return self._start(connection, tag, path, message)

    def _start(self, connection: _HttpConnection, tag: int, path: str, message: bytes) -> list[Ended]:
        headers = [
            ("Host", self._host),
            ("User-Agent", "spikeless"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(message))),
        ]
        self._busy[tag] = connection
        try:
            connection.send(tag, h11.Request(method="POST", target=path, headers=headers), message)
        except OSError:
            return self._break(connection)
        return []

    def exchange(self, wait: float) -> list[Ended]:
        # An idle connection is readable when the server has hung up.
        watched = [*self._busy.values(), *self._idle]
        writers = [connection for connection in self._busy.values() if connection.wants_write]
        readable, writable, _ = select(watched, writers, [], wait)
        ended: list[Ended] = []
        for connection in writable:
            try:
                connection.flush()
            except OSError:
                ended += self._break(connection)
        # Everything is read before anything is parsed, which takes time.
        for connection, content, moment in [*_received(readable)]:
            ended += self._parse(connection, content, moment)
        while self._waiting and len(self._busy) < MOST_CONNECTIONS:
            tag = next(iter(self._waiting))
            ended += self.send(tag, *self._waiting.pop(tag))
        return ended

    def _parse(self, connection: _HttpConnection, content: bytes | None, moment: float) -> list[Ended]:
        if connection.tag is None:  # Idle: the server has hung up.
            self._idle.remove(connection)
            connection.close()
            return []
        try:
            if content is None:
                raise Unavailable("the connection is broken")
            reply = connection.parse(content)
        except Unavailable:
            return self._break(connection, moment)
        if reply is None:
            return []
        del self._busy[reply.tag]
        if connection.next_call():
            self._idle.append(connection)
        else:
            connection.close()
        return [Ended(reply, moment)]

    def _break(self, connection: _HttpConnection, moment: float | None = None) -> list[Ended]:
        """The end of the call of a connection that is broken."""
        tag = connection.tag
        assert tag is not None
        del self._busy[tag]
        connection.close()
        return [Ended(Reply(tag, Code.UNAVAILABLE), time.monotonic() if moment is None else moment)]

    def abandon(self, tag: int) -> None:
        """Hang up on a call, as clients do at their deadline."""
        self._waiting.pop(tag, None)
        if connection := self._busy.pop(tag, None):
            connection.close()

    def close(self) -> None:
        for connection in (*self._busy.values(), *self._idle):
            connection.close()
        self._busy.clear()
        self._idle.clear()
        self._waiting.clear()


def _received(
    connections: Iterable[_HttpConnection],
) -> Iterator[tuple[_HttpConnection, bytes | None, float]]:
    """What has arrived on each and when; None where the connection is broken."""
    for connection in connections:
        if connection.fileno() < 0:
            continue  # Closed meanwhile.
        try:
            content = connection.read()
        except BlockingIOError:
            continue
        except OSError:
            yield connection, None, time.monotonic()
        else:
            yield connection, content, time.monotonic()
