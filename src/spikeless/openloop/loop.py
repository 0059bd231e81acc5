"""The open loop: send each request at its time, and record what happens to it.

In: a schedule's offsets, the requests, an address. Out: filled `RequestColumns`.

It runs in a plain thread and waits in ``select``, whose timeout is exact to
microseconds. The timers of gevent and asyncio round to a millisecond, which can exceed
the latency to measure.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from gevent.monkey import get_original
from numpy.typing import NDArray

from spikeless.errors import Code, Unavailable
from spikeless.openloop.columns import RequestColumns
from spikeless.openloop.connection import Connection, Reply

_select = get_original("select", "select")

#: How long the loop waits at most before it checks whether to stop.
_LONGEST_WAIT = 0.05
_RECONNECT_SECONDS = 0.1
#: The server ends a call at its deadline. If it does not, the call is given up this
#: much later.
_DEADLINE_GRACE = 1.0


class Request(Protocol):
    """What the loop needs of a request."""

    @property
    def name(self) -> str:
        """Its name in statistics."""

    @property
    def path(self) -> str:
        """The path of its gRPC method, ``/package.Service/Method``."""

    @property
    def message(self) -> bytes:
        """The serialized request."""

    def served_version(self, response: bytes) -> int:
        """What answered, as the serialized response says; 0 where it says nothing."""


@dataclass(frozen=True)
class Call:
    """A `Request` of any gRPC service."""

    path: str
    message: bytes

    @property
    def name(self) -> str:
        """The method's name."""
        return self.path.rpartition("/")[2]

    def served_version(self, response: bytes) -> int:
        return 0


class OpenLoop:
    """One worker's share of the load.

    Args:
        offsets: the intended starts in seconds, of shape ``[requests]``.
        requests: what is replayed.
        target: ``host:port``.
        timeout: the deadline of each request, in seconds.
        numbers: the request of each start, of shape ``[requests]``; in turn by default.
    """

    def __init__(
        self,
        offsets: NDArray[np.float64],
        requests: Sequence[Request],
        target: str,
        timeout: float,
        numbers: NDArray[Any] | None = None,
    ) -> None:
        if numbers is None:
            numbers = np.arange(len(offsets)) % len(requests)
        self.columns = RequestColumns(offsets, numbers)
        #: The indices of ended requests, for whoever follows the run.
        self.finished: deque[int] = deque()
        self.sent = 0
        self._offsets = offsets.tolist()
        self.requests = requests
        self._timeout = timeout
        self._connection = Connection(target)
        self._in_flight: dict[int, None] = {}  # In the order of sending.
        self._next_connect = 0.0
        self._stopping = False

    def stop(self) -> None:
        """End the run soon; requests in flight are recorded as CANCELLED."""
        self._stopping = True

    def run(self, start: float) -> None:
        """Drive the load; `start` is the ``time.monotonic`` of offset zero."""
        self._start = start
        count = len(self._offsets)
        while not self._stopping:
            now = time.monotonic() - start
            while self.sent < count and self._offsets[self.sent] <= now:
                self._send(self.sent)
                self.sent += 1
            self._expire(now)
            if self.sent == count and not self._in_flight:
                break
            wait = min(self._offsets[self.sent] - now, _LONGEST_WAIT) if self.sent < count else _LONGEST_WAIT
            self._exchange(wait)
        for index in list(self._in_flight):
            self._end(Reply(index, Code.CANCELLED), time.monotonic())
        self._connection.close()

    def _send(self, index: int) -> None:
        connection = self._connection
        if not connection.is_open and time.monotonic() >= self._next_connect:
            self._next_connect = time.monotonic() + _RECONNECT_SECONDS
            with contextlib.suppress(Unavailable):
                connection.open(self._timeout)
        self._in_flight[index] = None
        if connection.is_open:
            request = self.requests[self.columns.request[index]]
            connection.send(index, request.path, request.message)
            self._flush()
        self.columns.sent(index, time.monotonic() - self._start)
        if not connection.is_open and index in self._in_flight:
            self._end(Reply(index, Code.UNAVAILABLE), time.monotonic())

    def _exchange(self, wait: float) -> None:
        """Wait for `wait` seconds, or until answers arrive or the socket takes more."""
        connection = self._connection
        if not connection.is_open:
            _select([], [], [], wait)
            return
        readable, writable, _ = _select(
            [connection], [connection] if connection.wants_write else [], [], wait
        )
        if readable:
            try:
                content = connection.read()
                arrival = time.monotonic()
                if not content:
                    raise Unavailable("the server closed the connection")
                for reply in connection.parse(content):
                    self._end(reply, arrival)
                if connection.ended:
                    raise Unavailable("the server ends the connection")
            except (OSError, Unavailable):
                self._disconnect()
                return
        if readable or writable:
            self._flush()

    def _flush(self) -> None:
        try:
            self._connection.flush()
        except OSError:
            self._disconnect()

    def _disconnect(self) -> None:
        now = time.monotonic()
        for reply in self._connection.close():
            self._end(reply, now)

    def _expire(self, now: float) -> None:
        """Give up on requests that the server did not end at their deadline."""
        while self._in_flight:
            oldest = next(iter(self._in_flight))
            sent = self._offsets[oldest] + self.columns.lag[oldest]
            if now < sent + self._timeout + _DEADLINE_GRACE:
                return
            self._end(Reply(oldest, Code.DEADLINE_EXCEEDED), now + self._start)

    def _end(self, reply: Reply, moment: float) -> None:
        index = reply.tag
        if index not in self._in_flight:
            return  # Given up before.
        del self._in_flight[index]
        version = 0
        if reply.code == Code.OK:
            version = self.requests[self.columns.request[index]].served_version(reply.message)
        self.columns.answered(index, moment - self._start, reply.code, version)
        self.finished.append(index)
