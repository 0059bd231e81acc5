"""What the open loop sends through: calls go in, their ends come out.

`GrpcLink` is one HTTP/2 connection that is made again when it breaks;
`spikeless.openloop.http1` has the link of HTTP/1.1. A link never waits but in
`Link.exchange`, and takes the time of an arrival before it parses what arrived.
"""

from __future__ import annotations

import contextlib
import ssl
import time
from typing import Any, NamedTuple, Protocol

from gevent.monkey import get_original

from spikeless.errors import Code, Unavailable
from spikeless.openloop.connection import Connection, Reply

#: select(2), also where gevent has patched it.
select: Any = get_original("select", "select")
_RECONNECT_SECONDS = 0.02


class Ended(NamedTuple):
    """A call that ended."""

    reply: Reply
    #: When, on the clock of ``time.monotonic``.
    moment: float


class Link(Protocol):
    """A way to a server, made with ``host:port`` and a call's deadline in seconds.

    With `tls` the server has TLS: whom to trust, and what to show.
    Methods return the calls that ended meanwhile.
    """

    #: What Locust's statistics call it.
    kind: str
    #: How long after its deadline a call is given up, in seconds.
    grace: float

    def __init__(self, target: str, timeout: float, tls: ssl.SSLContext | None = None) -> None: ...

    def send(self, tag: int, path: str, message: bytes) -> list[Ended]:
        """Start a call, which ends with the same `tag`."""

    def exchange(self, wait: float) -> list[Ended]:
        """Send and receive for `wait` seconds, or until something has happened."""

    def abandon(self, tag: int) -> None:
        """Forget a call that is given up."""

    def close(self) -> None:
        """Hang up; calls in flight are forgotten."""


class GrpcLink:
    """Unary calls of gRPC over one connection."""

    kind = "gRPC"
    #: The server ends a call at its deadline; it is given up when it does not.
    grace = 1.0

    def __init__(self, target: str, timeout: float, tls: ssl.SSLContext | None = None) -> None:
        self._connection = Connection(target, tls)
        self._timeout = timeout
        self._next_connect = 0.0

    def send(self, tag: int, path: str, message: bytes) -> list[Ended]:
        connection = self._connection
        if not connection.is_open and time.monotonic() >= self._next_connect:
            self._next_connect = time.monotonic() + _RECONNECT_SECONDS
            with contextlib.suppress(Unavailable):
                connection.open(self._timeout)
        if not connection.is_open:
            return [Ended(Reply(tag, Code.UNAVAILABLE), time.monotonic())]
        connection.send(tag, path, message)
        return self._flush()

    def exchange(self, wait: float) -> list[Ended]:
        connection = self._connection
        if not connection.is_open:
            select([], [], [], wait)
            return []
        readable, writable, _ = select([connection], [connection] if connection.wants_write else [], [], wait)
        ended = []
        if readable:
            try:
                content = connection.read()
                arrival = time.monotonic()
                if not content:
                    raise Unavailable("the server closed the connection")
                ended = [Ended(reply, arrival) for reply in connection.parse(content)]
                if connection.ended:
                    raise Unavailable("the server ends the connection")
            except (OSError, Unavailable):
                return ended + self._disconnect()
        if readable or writable:
            ended += self._flush()
        return ended

    def abandon(self, tag: int) -> None:
        """The server's answer is ignored, should it come."""

    def close(self) -> None:
        self._connection.close()

    def _flush(self) -> list[Ended]:
        try:
            self._connection.flush()
        except (OSError, Unavailable):
            return self._disconnect()
        return []

    def _disconnect(self) -> list[Ended]:
        now = time.monotonic()
        return [Ended(reply, now) for reply in self._connection.close()]
