"""The HTTP server of the REST API: sockets, limits, timeouts and shutdown.

In: a WSGI application. Out: a listening port. It is waitress: one thread reads and
writes all connections, so that slow and half-open ones cost a socket but no worker, and
a bounded number of workers answer complete requests.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask

from spikeless.engine.flags import ServerFlags
from spikeless.engine.handlers import MAX_REQUEST_BYTES
from spikeless.errors import Internal, Unavailable
from spikeless.formats import rest_json

_log = logging.getLogger(__name__)
#: Answers up to this many bytes are copied behind their head and sent with it.
_SMALL = 1 << 16
#: What accepting a connection fails with while the process or the machine is full.
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
#: Seconds after which the loop looks around although nothing has happened.
_LOOP_SECONDS = 1.0
_Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@dataclass(frozen=True)
class RestLimits:
    """What clients may take up."""

    #: Bytes that the body of a request may have at most.
    max_request_bytes: int = MAX_REQUEST_BYTES
    #: Connections that may be open at once; more wait to be accepted.
    max_connections: int = 1024
    #: Seconds after which a connection on which nothing happens is closed.
    idle_timeout: int = 120
    #: Seconds that a request may take to arrive, from its first byte to its last.
    receive_timeout: float = 60.0


_LIMITS = RestLimits()


class _RequestParser(HTTPRequestParser):
    """Answers 400 where waitress hangs up: half an IPv6 address in a request line."""

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
            # The application does the same, also where waitress takes it for a path.
            urlsplit(self.request_uri)
        except ValueError as error:
            raise ParsingError(str(error)) from None


class _Task(WSGITask):
    """Sends the head of an answer together with its body, in one packet if it is small.

    To HEAD the body is only its length.
    """

    wrote_header = False

    def write(self, data: bytes) -> None:
        if self.request.command == "HEAD":
            data = b""
        if self.wrote_header or not data or len(data) > _SMALL or not self.has_body:
            super().write(data)
            return
        head = self.build_response_header()
        self.wrote_header = True
        self.channel.write_soon(head + data)
        self.content_bytes_written = len(data)


class _ErrorTask(ErrorTask):
    """Gives a JSON body to errors that do not reach the application."""

    def execute(self) -> None:
        error = self.request.error
        body = rest_json.error_body(f"{error.reason}: {error.body}")
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(rest_json.HEADER)
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Channel(HTTPChannel):
    """A connection that is closed when a request takes too long to arrive.

    Its loop leaves a connection alone while a worker sends on it.
    """

    parser_class = _RequestParser
    task_class = _Task
    error_task_class = _ErrorTask
    _began: float | None = None
    _sending = False

    def write_soon(self, data: Any) -> int:
        self._sending = True
        try:
            return int(super().write_soon(data))
        finally:
            self._sending = False

    def writable(self) -> bool:
        # Not while a worker sends: the loop would spin. The worker wakes it afterwards.
        return not self._sending and bool(super().writable())

    def readable(self) -> bool:
        if self.request is None:
            self._began = None
            if self.server.draining:
                return False
        elif self._began is None:
            self._began = time.monotonic()
        elif time.monotonic() - self._began > self.server.receive_timeout:
            self.will_close = True
        return bool(super().readable())

    def busy(self) -> bool:
        """Whether a request is being answered, or an answer is not yet all sent."""
        return bool(self.requests or self.total_outbufs_len)


class _Listener(TcpWSGIServer):
    """The listening socket; its connections wake the loop by a socket of Python's.

    Waitress's own pipe is known by numbers, which another descriptor may have taken
    when a worker writes to it late. A closed socket object only raises OSError.
    """

    channel_class = _Channel
    draining = False
    #: Until when no connection is accepted, since there is no descriptor for it.
    _pause_end = 0.0
    _full = False

    def __init__(
        self,
        application: _Application,
        map: dict[int, Any],
        adj: Adjustments,
        shared: socket.socket | None = None,
    ) -> None:
        """``shared`` is a bound socket, whose port other processes listen on."""
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        # Its threads are started when there is a socket.
        super().__init__(
            application,
            map=map,
            _sock=shared,
            dispatcher=ThreadedTaskDispatcher(),
            adj=adj,
            bind_socket=shared is None,
        )
        self.task_dispatcher.set_thread_count(adj.threads)
        self.trigger.close()

    def pull_trigger(self) -> None:
        # Full: it is about to look around. Closed: it has ended.
        with contextlib.suppress(OSError):
            self._waker.send(b"x")

    def wait(self, poller: select.poll) -> list[tuple[int, int]]:
        """The events of a poller's descriptors, once there are any or it is woken."""
        poller.register(self._woken, select.POLLIN)
        events = poller.poll(_LOOP_SECONDS * 1000)
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(1 << 12):
                pass
        return events

    def readable(self) -> bool:
        return bool(super().readable()) and time.monotonic() >= self._pause_end

    def accept(self) -> Any:
        """A connection; None where there is none, or no descriptor for one.

        It stays in the queue then, and with it the event that it is there: looking
        again at once would take a processor.
        """
        try:
            accepted = super().accept()
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            self._pause_end = time.monotonic() + _LOOP_SECONDS
            if not self._full:
                self._full = True
                _log.warning(
                    "REST connections wait: %s; raise the limit of open files (ulimit -n)", error.strerror
                )
            return None
        self._full = False
        return accepted

    def handle_close(self) -> None:
        self.close()

    def close(self) -> None:
        wasyncore.dispatcher.close(self)

    def close_waker(self) -> None:
        self._waker.close()
        self._woken.close()


def _shared_socket(settings: Adjustments) -> socket.socket:
    family, kind, protocol, address = settings.listen[0]
    shared = socket.socket(family, kind, protocol)
    try:
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shared.bind(address)
    except OSError:
        shared.close()
        raise
    return shared


class RestServer:
    """Runs an application: start (returns the bound port), stop with a grace.

    One thread opens, reads, writes and closes all connections, also while it stops.
    """

    def __init__(
        self,
        application: _Application,
        flags: ServerFlags,
        limits: RestLimits = _LIMITS,
        failed: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """``failed`` is told when it has ended without being stopped."""
        self._application = application
        self._flags = flags
        self._limits = limits
        self._failed = failed
        self._dispatchers: dict[int, Any] = {}
        self._listener: Any = None
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="rest", daemon=True)

    def start(self) -> int:
        """Listen.

        Raises:
            Unavailable: the port is taken.
        """
        flags, limits = self._flags, self._limits
        # Not every full queue is worth a line: metrics show the load.
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        try:
            settings = Adjustments(
                host=flags.host,
                port=flags.rest_api_port,
                threads=flags.rest_api_num_threads,
                ident=None,
                clear_untrusted_proxy_headers=False,
                log_socket_errors=False,
                recv_bytes=1 << 16,
                # Reading on is how a client that goes away is noticed.
                channel_request_lookahead=1,
                max_request_body_size=limits.max_request_bytes,
                connection_limit=limits.max_connections,
                channel_timeout=limits.idle_timeout,
                cleanup_interval=min(30, limits.idle_timeout),
                # Answers are buffered, so that no worker waits for a slow reader.
                outbuf_high_watermark=1 << 62,
            )
            shared = _shared_socket(settings) if flags.workers > 1 else None
            self._listener = _Listener(self._application, self._dispatchers, settings, shared)
        except (OSError, ValueError) as error:
            wasyncore.close_all(self._dispatchers)
            address = f"{flags.host}:{flags.rest_api_port}"
            reason = error.strerror if isinstance(error, OSError) else error
            raise Unavailable(f"cannot listen on {address}: {reason}") from None
        self._listener.receive_timeout = limits.receive_timeout
        self._thread.start()
        return int(self._listener.effective_port)

    def stop(self, grace: float) -> None:
        """Take no new requests; let those in progress end within ``grace`` seconds."""
        if self._listener is None:
            return
        deadline = time.monotonic() + grace
        self._listener.draining = True
        self._listener.pull_trigger()
        self._thread.join(grace)
        self._ending = True
        self._listener.pull_trigger()
        # Whatever the loop is stuck in, it does not keep the server from stopping.
        self._thread.join(_LOOP_SECONDS + 1.0)
        self._listener.task_dispatcher.shutdown(timeout=max(0.0, deadline - time.monotonic()))

    # The loop -------------------------------------------------------------------------

    def _run(self) -> None:
        listener = self._listener
        try:
            while not (self._ending or (listener.draining and self._drained())):
                self._poll()
        except Exception as error:  # of its own: one of a connection only closes that
            _log.exception("the REST API ends")
            self._failed(error)
        finally:
            for dispatcher in list(self._dispatchers.values()):
                with contextlib.suppress(Exception):
                    dispatcher.handle_close()
            listener.close_waker()

    def _drained(self) -> bool:
        """Close the listening socket; True when no request is in progress."""
        self._listener.close()
        return not any(channel.busy() for channel in self._listener.active_channels.values())

    def _poll(self) -> None:
        """Wait for events and have them handled.

        Not by waitress's own function, which asks for urgent data, too: a byte of it
        stays an event for good, and each look at it is a line in the log.
        """
        if not (self._listener.accepting or self._listener.draining):
            raise Internal("the listening socket was closed")
        poller = select.poll()
        for descriptor, dispatcher in list(self._dispatchers.items()):
            events = select.POLLIN if dispatcher.readable() else 0
            if not dispatcher.accepting and dispatcher.writable():
                events |= select.POLLOUT
            if events:
                poller.register(descriptor, events)
        for descriptor, events in self._listener.wait(poller):
            if dispatcher := self._dispatchers.get(descriptor):
                wasyncore.readwrite(dispatcher, events)
