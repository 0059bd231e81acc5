"""The HTTP server of the REST API: sockets, limits, timeouts and shutdown.

In: a WSGI application. Out: a listening port. It is waitress: one thread reads and
writes all connections, so that slow and half-open ones cost a socket but no worker, and
a bounded number of workers answer complete requests.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import create_server
from waitress.task import ErrorTask, WSGITask

from spikeless.engine.flags import ServerFlags
from spikeless.engine.handlers import MAX_REQUEST_BYTES
from spikeless.errors import Unavailable
from spikeless.formats import rest_json

#: Answers up to this many bytes are copied behind their head and sent with it.
_SMALL = 1 << 16
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


class RestServer:
    """Runs an application: start (returns the bound port), stop with a grace."""

    def __init__(self, application: _Application, flags: ServerFlags, limits: RestLimits = _LIMITS) -> None:
        self._application = application
        self._flags = flags
        self._limits = limits
        self._connections: dict[int, Any] = {}
        self._server: Any = None
        self._closing = False
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
            server = create_server(
                self._application,
                map=self._connections,
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
        except OSError as error:
            wasyncore.close_all(self._connections)
            address = f"{flags.host}:{flags.rest_api_port}"
            raise Unavailable(f"cannot listen on {address}: {error.strerror}") from None
        server.channel_class = _Channel
        server.draining = False
        server.receive_timeout = limits.receive_timeout
        self._server = server
        self._thread.start()
        return int(server.effective_port)

    def _run(self) -> None:
        while not self._closing:
            wasyncore.poll2(_LOOP_SECONDS, self._connections)

    def stop(self, grace: float) -> None:
        """Take no new requests; let those in progress end within ``grace`` seconds."""
        if not self._thread.is_alive():
            return
        deadline = time.monotonic() + grace
        server = self._server
        self._wake(self._stop_listening)
        while time.monotonic() < deadline and any(
            channel.busy() for channel in list(server.active_channels.values())
        ):
            time.sleep(0.01)
        server.task_dispatcher.shutdown(timeout=max(0.0, deadline - time.monotonic()))
        self._closing = True
        self._wake()
        # Whatever the loop is stuck in, it does not keep the server from stopping.
        self._thread.join(_LOOP_SECONDS + 1.0)
        if not self._thread.is_alive() and not server.task_dispatcher.threads:
            # Not before: a worker that still runs would write to a pipe of that number.
            wasyncore.close_all(self._connections, ignore_all=True)
            return
        for channel in list(server.active_channels.values()):
            with contextlib.suppress(OSError):
                channel.socket.shutdown(socket.SHUT_RDWR)

    def _wake(self, thunk: Callable[[], None] | None = None) -> None:
        """Let the loop look around now, and call ``thunk``; else it does so soon."""
        with contextlib.suppress(OSError):
            self._server.trigger.pull_trigger(thunk)

    def _stop_listening(self) -> None:
        self._server.draining = True
        self._server.accepting = False
        self._server.del_channel()
        self._server.socket.close()
