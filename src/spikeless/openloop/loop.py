"""The open loop: send each request at its time, and record what happens to it.

In: a schedule's offsets, the requests, an address. Out: filled `RequestColumns`.

It runs in a plain thread and waits in ``select``, whose timeout is exact to
microseconds. The timers of gevent and asyncio round to a millisecond, which can exceed
the latency to measure.
"""

from __future__ import annotations

import ssl
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spikeless.errors import Code
from spikeless.openloop.columns import RequestColumns
from spikeless.openloop.connection import Reply
from spikeless.openloop.link import Ended, GrpcLink, Link

#: How long the loop waits at most before it checks whether to stop.
_LONGEST_WAIT = 0.05


class Request(Protocol):
    """What the loop needs of a request."""

    @property
    def name(self) -> str:
        """Its name in statistics."""

    @property
    def path(self) -> str:
        """The path that it is sent to: of gRPC ``/package.Service/Method``."""

    @property
    def message(self) -> bytes:
        """The serialized request; over HTTP, the body."""

    def served_version(self, response: bytes) -> int:
        """What answered, as the serialized response says; 0 where it says nothing."""


@dataclass(frozen=True)
class Call:
    """A `Request` of any gRPC service, or a POST to any HTTP server."""

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
        link: `GrpcLink`, or `spikeless.openloop.http1.HttpLink` for POST over HTTP/1.1.
        tls: for a gRPC server with TLS: whom to trust, and what to show.
    """

    def __init__(
        self,
        offsets: NDArray[np.float64],
        requests: Sequence[Request],
        target: str,
        timeout: float,
        numbers: NDArray[Any] | None = None,
        link: type[Link] = GrpcLink,
        tls: ssl.SSLContext | None = None,
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
        self._link = link(target, timeout, tls)
        self._in_flight: dict[int, None] = {}  # In the order of sending.
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
            self._record(self._link.exchange(wait))
        for index in list(self._in_flight):
            self._end(Reply(index, Code.CANCELLED), time.monotonic())
        self._link.close()

    def _send(self, index: int) -> None:
        request = self.requests[self.columns.request[index]]
        self._in_flight[index] = None
        ended = self._link.send(index, request.path, request.message)
        self.columns.sent(index, time.monotonic() - self._start)
        self._record(ended)

    def _record(self, ended: Iterable[Ended]) -> None:
        for reply, moment in ended:
            self._end(reply, moment)

    def _expire(self, now: float) -> None:
        """Give up on requests that did not end at their deadline."""
        while self._in_flight:
            oldest = next(iter(self._in_flight))
            sent = self._offsets[oldest] + self.columns.lag[oldest]
            if now < sent + self._timeout + self._link.grace:
                return
            self._link.abandon(oldest)
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
