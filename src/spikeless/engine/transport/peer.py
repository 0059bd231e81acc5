"""One connection of a client: its socket, its HTTP/2 state and its calls.

The loop reads; whichever thread answers a call writes.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from typing import Any

import grpc

from spikeless.engine.transport.calls import Context
from spikeless.engine.transport.http2 import Http2
from spikeless.engine.transport.streams import Stream
from spikeless.http2.frames import BrokenProtocol
from spikeless.http2.headers import HeaderList

_READ_BYTES, _LARGE_READ_BYTES = 16 << 10, 1 << 20
#: Parts that one call of the system takes.
_MOST_PARTS = 512
#: A client that does not read what it is sent is not read, either.
_MOST_WAITING = 1 << 12
#: Bytes that are read from a client that broke the protocol, and dropped. The system
#: resets a connection that is closed with bytes unread, and the client may then not
#: read what it did wrong.
_MOST_DROPPED = 64 << 20
#: A client without calls has connected for certain after so long.
_CONNECT_SECONDS = 1.0


class Peer:
    """Created with a socket that is connected, which it owns."""

    def __init__(self, connection: socket.socket, address: Any, poll: select.epoll) -> None:
        self._socket = connection
        self._poll = poll
        self._address = address
        self._lock = threading.Lock()
        self._http2 = Http2()
        self._interest = select.EPOLLIN
        self._read_bytes = _READ_BYTES
        #: The connection is closed, or is to be.
        self.is_over = False
        #: The client broke the protocol and is told so; what it sends is dropped.
        self.is_refused = False
        self._dropped = 0
        self.number = connection.fileno()
        self.begun = time.monotonic()
        self.connected_by = self.begun + _CONNECT_SECONDS
        #: When it was asked to open no more streams.
        self.drained_at: float | None = None
        #: Calls that are not answered, by the number of their stream.
        self.calls: dict[int, Context] = {}
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        poll.register(self.number, self._interest)
        self.flush()

    @property
    def peer(self) -> str:
        """The client's address, as ``grpc`` writes it."""
        if self._socket.family == socket.AF_UNIX:
            return "unix:"
        host, port = self._address[:2]
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"

    @property
    def has_begun(self) -> bool:
        """Whether the client has shown that it speaks HTTP/2."""
        return self._http2.has_begun

    # --- of the loop ------------------------------------------------------------------

    def read(self) -> list[Stream]:
        """What has arrived: the streams that have news; `is_over` at the end.

        Nothing is news from a client that broke the protocol (`is_refused`).
        """
        try:
            content = self._socket.recv(self._read_bytes)
        except BlockingIOError:
            return []
        except OSError:
            content = b""
        if not content:
            self.is_over = True
            return []
        if self.is_refused:
            self._dropped += len(content)
            self.is_over = self._dropped > _MOST_DROPPED
            return []
        # Much is read at once only where much comes.
        self._read_bytes = _LARGE_READ_BYTES if len(content) == self._read_bytes else _READ_BYTES
        with self._lock:
            try:
                streams = self._http2.receive(content)
            except BrokenProtocol as broken:
                streams = []
                self.is_refused = True
                self._http2.refuse(broken.code)
            if self._http2.output:
                self._flush()
        if self.is_refused:
            self._forget_all()
        return streams

    def begin(self, stream: Stream, has_deadline: bool = True) -> Context:
        """The context of a new call."""
        context = Context(self, stream, has_deadline)
        self.calls[stream.number] = context
        return context

    def may_drain(self, now: float) -> bool:
        """Whether the client would hear that it is asked for no new calls.

        gRPC's own (1.83 to 1.85 at least) misses what it reads just after it connected,
        before it listens: it goes on to try its calls there until their deadlines, as
        fast as it can, and takes some hundred MiB of memory each second. A call shows
        that it listens.
        """
        return self._http2.has_called or now >= self.connected_by

    def drain(self, now: float) -> None:
        """Ask for no new calls; those that are there, or on their way, are answered."""
        self.drained_at = now
        if self.is_refused:
            return
        with self._lock:
            self._http2.drain()
            self._flush()

    def has_drained(self, now: float, patience: float) -> bool:
        """Whether all calls are answered and no more will come."""
        with self._lock:
            if self.drained_at is not None and now - self.drained_at > patience:
                self._http2.draining = True
            return self._http2.draining and not self._http2.streams and not self._http2.output

    def close(self) -> None:
        """Close the socket; calls that are running have nobody to answer to."""
        with self._lock:
            self.is_over = True
            self._poll.unregister(self.number)
            self._socket.close()
            for stream in [*self._http2.streams.values()]:
                stream.closed = True
        self._forget_all()

    def _forget_all(self) -> None:
        for context in [*self.calls.values()]:
            self.forget(context)

    def forget(self, context: Context) -> None:
        """The call is over."""
        self.calls.pop(context.stream.number, None)
        context.ended()

    # --- of any thread ----------------------------------------------------------------

    def answer(self, context: Context, message: bytes) -> None:
        """The one response of a call, and its success."""
        with self._lock:
            self._http2.answer(context.stream, message)
            self._flush()
        self.forget(context)

    def send(self, context: Context, message: bytes) -> None:
        """A response of several."""
        with self._lock:
            self._http2.send(context.stream, message)
            self._flush()

    def finish(self, context: Context) -> None:
        """Success, after all responses."""
        with self._lock:
            self._http2.finish(context.stream)
            self._flush()
        self.forget(context)

    def fail(self, context: Context, code: grpc.StatusCode, details: str, trailing: HeaderList = ()) -> None:
        """Another status, without a response or after some."""
        number: int = code.value[0]
        with self._lock:
            self._http2.fail(context.stream, number, details, trailing)
            self._flush()
        self.forget(context)

    def flush(self) -> None:
        """Send what waits and the socket takes."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if self.is_over:
            return
        output = self._http2.output
        try:
            while output:
                if len(output) == 1:
                    sent = self._socket.send(output[0])
                else:
                    sent = self._socket.sendmsg(output[:_MOST_PARTS])
                done = 0
                while done < len(output) and sent >= len(output[done]):
                    sent -= len(output[done])
                    done += 1
                del output[:done]
                if sent:
                    output[0] = memoryview(output[0])[sent:]
        except BlockingIOError:
            pass
        except OSError:
            output.clear()  # the loop will find that it is over
        if self.is_refused and not output:
            with contextlib.suppress(OSError):  # the client may have gone
                self._socket.shutdown(socket.SHUT_WR)
        interest = select.EPOLLIN if len(output) < _MOST_WAITING else 0
        interest |= select.EPOLLOUT if output else 0
        if interest != self._interest:
            self._interest = interest
            self._poll.modify(self.number, interest)
