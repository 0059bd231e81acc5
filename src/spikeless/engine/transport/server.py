"""A server of ``grpc``'s own interface that answers small calls where it reads them.

One thread, the loop, reads all connections. A call is handed to a pool of threads,
which takes several changes of threads, unless its method says that the loop may wait
for it and calls like it have proved to be quick. Should one take long after all,
another thread takes the loop over, so that nobody waits for it but its caller.

TLS and options that are not in `SUPPORTED_OPTIONS` are left to grpcio's server.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import os
import random
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from typing import Any

import grpc

from spikeless.engine.transport.calls import Context, MethodDetails, Refused, take_message
from spikeless.engine.transport.listening import Listeners
from spikeless.engine.transport.pace import Paces
from spikeless.engine.transport.peer import Peer
from spikeless.engine.transport.streams import Stream
from spikeless.engine.transport.timeouts import Timeouts

_log = logging.getLogger(__name__)

_MESSAGE_BYTES = "grpc.max_receive_message_length"
_AGE, _AGE_GRACE = "grpc.max_connection_age_ms", "grpc.max_connection_age_grace_ms"
_HANDSHAKE = "grpc.server_handshake_timeout_ms"
_REUSE_PORT = "grpc.so_reuseport"
#: Options of ``grpc.server`` that this one has, too; what it sends has no limit.
SUPPORTED_OPTIONS = frozenset(
    {_MESSAGE_BYTES, "grpc.max_send_message_length", _AGE, _AGE_GRACE, _HANDSHAKE, _REUSE_PORT}
)
#: How long a client has to send its preface and settings: as grpc's own server says.
_HANDSHAKE_MS = 120_000

#: How long the loop may wait for a call before another thread takes over.
_TAKE_OVER_SECONDS = 0.01
#: How long a client has to say that it opens no more streams.
_DRAIN_SECONDS = 1.0
_DRAIN_POLL_SECONDS = 0.02
#: How long a client has to read that it broke the protocol.
_LINGER_SECONDS = 5.0


class FastServer(grpc.Server):
    """See the module.

    Args:
        pool: runs what the loop does not wait for.
        places: calls that it runs at once; more are refused.
        options: as of ``grpc.server``, those of `SUPPORTED_OPTIONS`.
        failed: called when the loop has ended because of an error.
    """

    def __init__(
        self, pool: Executor, places: int, options: Mapping[str, Any], failed: Callable[[Exception], None]
    ) -> None:
        self._pool = pool
        self._places = places
        self._failed = failed
        self._limit = int(options.get(_MESSAGE_BYTES, 4 << 20))
        self._limit = self._limit if self._limit >= 0 else (1 << 32) - 1
        self._age = int(options.get(_AGE, 0)) / 1000 or math.inf
        self._age_grace = int(options.get(_AGE_GRACE, 0)) / 1000 or math.inf
        self._generic: list[grpc.GenericRpcHandler[Any, Any]] = []
        self._methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._listeners = Listeners(bool(options.get(_REUSE_PORT, 1)))
        self._clients: dict[int, Peer] = {}
        self._handshakes = Timeouts(max(int(options.get(_HANDSHAKE, _HANDSHAKE_MS)), 1) / 1000)
        self._lingering = Timeouts(_LINGER_SECONDS)
        self._poll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll.register(self._wake, select.EPOLLIN)
        self._running = 0
        self._lock = threading.Lock()
        self._paces = Paces()
        self._ready: deque[tuple[Peer, Stream]] = deque()
        # (when, a number that makes each different, client, context or None).
        self._timers: list[tuple[float, int, Peer, Context | None]] = []
        self._numbers = itertools.count()
        # The thread that is the loop, and what it is waiting for.
        self._leader: object = None
        self._inline: Context | None = None
        self._busy = threading.Event()
        self._stop_at: float | None = None
        self._is_draining = False
        self._stopped = threading.Event()

    # --- of grpc.Server ---------------------------------------------------------------

    def add_generic_rpc_handlers(
        self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler[Any, Any]]
    ) -> None:
        self._generic += generic_rpc_handlers

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        for method, handler in method_handlers.items():
            self._methods[f"/{service_name}/{method}"] = handler

    def add_insecure_port(self, address: str) -> int:
        return self._listeners.add(address)

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        raise NotImplementedError

    def start(self) -> None:
        self._listeners.start(self._poll)
        self._leader = token = object()
        threading.Thread(target=self._lead, args=[token], name="grpc-loop", daemon=True).start()
        threading.Thread(target=self._stand_by, name="grpc-standby", daemon=True).start()

    def stop(self, grace: float | None = None) -> threading.Event:
        """Close the ports, let calls end within ``grace`` seconds, then connections."""
        if self._leader is None:
            self._listeners.close()
            self._stopped.set()
        with self._lock:
            stop_at = time.monotonic() + (grace or 0.0)
            self._stop_at = stop_at if self._stop_at is None else min(self._stop_at, stop_at)
        os.eventfd_write(self._wake, 1)
        return self._stopped

    def wait_for_termination(self, timeout: float | None = None) -> bool:
        return not self._stopped.wait(timeout)

    # --- the loop ---------------------------------------------------------------------

    def _lead(self, token: object) -> None:
        """Be the loop, until another thread is, or the server has stopped."""
        try:
            while self._leader is token:
                if not self._turn(token):
                    return
                if self._stop_at is not None and self._stop(self._stop_at):
                    self._end()
                    return
        except Exception as error:
            _log.exception("the loop of gRPC connections")
            self._end()
            self._failed(error)

    def _turn(self, token: object) -> bool:
        """Wait for news and deal with them; False when another thread goes on."""
        while self._ready:
            if not self._advance(token, *self._ready.popleft()):
                return False
        for number, event in self._poll.poll(self._patience()):
            client = self._clients.get(number)
            if client is not None:
                if event & select.EPOLLOUT:
                    client.flush()
                if event & ~select.EPOLLOUT:
                    for stream in client.read():
                        self._ready.append((client, stream))
                    self._time(client)
                if client.is_over:
                    self._close(client)
            elif number in self._listeners:
                self._accept(number)
            elif number == self._wake:
                os.eventfd_read(self._wake)
            while self._ready:
                if not self._advance(token, *self._ready.popleft()):
                    return False
        self._expire(time.monotonic())
        return True

    def _patience(self) -> float:
        """Seconds to wait for news at most; -1 is for ever."""
        if self._is_draining or self._stop_at is not None:
            return _DRAIN_POLL_SECONDS
        timer = self._timers[0][0] if self._timers else math.inf
        when = min(timer, self._handshakes.next, self._lingering.next)
        return max(when - time.monotonic(), 0.0) if when < math.inf else -1

    def _accept(self, number: int) -> None:
        accepted = self._listeners.accept(number, len(self._clients))
        if accepted is None:
            return
        connection, address = accepted
        client = Peer(connection, address, self._poll)
        self._clients[connection.fileno()] = client
        self._handshakes.start(client, client.begun)
        if self._age < math.inf:
            self._at(client.begun + self._age * random.uniform(0.9, 1.1), client)

    def _close(self, client: Peer) -> None:
        if self._clients.pop(client.number, None) is not None:
            self._handshakes.stop(client)
            self._lingering.stop(client)
            client.close()

    def _time(self, client: Peer) -> None:
        """Begin and end the times that a client has for something."""
        if client.has_begun or client.is_refused:
            self._handshakes.stop(client)
        if client.is_refused:
            self._lingering.start(client, time.monotonic())

    def _at(self, when: float, client: Peer, context: Context | None = None) -> None:
        """Remember a deadline, or the age of a connection."""
        if context is not None:
            context.has_timer = True
        heapq.heappush(self._timers, (when, next(self._numbers), client, context))
        if len(self._timers) > 8192 and not len(self._timers) % 1024:
            self._timers = [
                timer
                for timer in self._timers
                if not (timer[2].is_over if timer[3] is None else timer[3].stream.closed)
            ]
            heapq.heapify(self._timers)

    def _expire(self, now: float) -> None:
        for timeouts in (self._handshakes, self._lingering):
            if timeouts.next <= now:
                for client in timeouts.take_expired(now):
                    self._close(client)
        while self._timers and self._timers[0][0] <= now:
            _, _, client, context = heapq.heappop(self._timers)
            if context is not None:
                client.fail(context, grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
            elif not client.is_over and not client.may_drain(now):
                self._at(client.connected_by, client)
            elif not client.is_over and client.drained_at is None:
                client.drain(now)
                self._is_draining = True
                self._at(now + min(self._age_grace, 1e9), client)
            elif not client.is_over:
                self._close(client)
        if self._is_draining:
            self._is_draining = False
            for client in [*self._clients.values()]:
                if client.drained_at is not None:
                    if client.has_drained(now, _DRAIN_SECONDS):
                        self._close(client)
                    else:
                        self._is_draining = True

    def _stop(self, stop_at: float) -> bool:
        """Go on stopping; whether all connections are closed."""
        now = time.monotonic()
        self._listeners.close(self._poll)
        for client in [*self._clients.values()]:
            if client.drained_at is None and client.may_drain(now):
                client.drain(now)
            if now >= stop_at or client.has_drained(now, _DRAIN_SECONDS):
                self._close(client)
        return not self._clients

    def _end(self) -> None:
        self._leader = None
        self._busy.set()
        for client in [*self._clients.values()]:
            self._close(client)
        self._listeners.close()
        self._stopped.set()

    def _stand_by(self) -> None:
        """Watch the loop, and become it when it waits for a call that takes long."""
        while not self._stopped.is_set():
            self._busy.wait()
            waited_for = self._inline
            if self._stopped.wait(_TAKE_OVER_SECONDS):
                return
            with self._lock:
                if waited_for is None:
                    self._busy.clear()
                    if self._inline is not None:  # begun before it could see that
                        self._busy.set()
                    continue
                if self._inline is not waited_for:
                    continue
                self._inline, token = None, object()
                self._leader = token
            threading.Thread(target=self._stand_by, name="grpc-standby", daemon=True).start()
            if waited_for.deadline is not None:
                self._at(waited_for.deadline, waited_for.client, waited_for)
            self._lead(token)
            return

    # --- calls ------------------------------------------------------------------------

    def _method(self, path: str) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = self._methods.get(path)
        if handler is None:
            details = MethodDetails(path)
            handler = next(filter(None, (generic.service(details) for generic in self._generic)), None)
            if handler is not None:
                self._methods[path] = handler
        return handler

    def _advance(self, token: object, client: Peer, stream: Stream) -> bool:
        """Go on with a call that has news; False when another thread is the loop."""
        context = client.calls.get(stream.number)
        if stream.closed:
            if context is not None:
                client.forget(context)
            return True
        try:
            if context is None:
                if stream.is_known:
                    return True  # what comes after its answer
                stream.is_known = True
                if stream.headers.refusal is not None:
                    raise Refused(*stream.headers.refusal)
                context = client.begin(stream)
                context.method = self._method(stream.headers.path)
            if context.method is None:
                raise Refused(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
            if context.method.request_streaming:
                self._feed(context)
            elif not context.is_running:
                content = take_message(stream, self._limit)
                if content is not None:
                    return self._call(token, context, content)
                if stream.ended:
                    path = stream.headers.path.encode("latin-1")
                    text = f'"{path!r}" requires exactly one request message.'
                    raise Refused(grpc.StatusCode.UNIMPLEMENTED, text)
            else:
                stream.drop_received()
        except Refused as refused:
            client.fail(context or client.begin(stream, has_deadline=False), refused.code, refused.details)
            return True
        self._watch(context)
        return True

    def _watch(self, context: Context) -> None:
        if context.deadline is not None and not context.has_timer and not context.stream.closed:
            self._at(context.deadline, context.client, context)

    def _feed(self, context: Context) -> None:
        """Hand the messages of a stream on, and before the first the call itself."""
        if not context.is_running:
            self._submit(context, None, None)
        assert context.requests is not None
        while (content := take_message(context.stream, self._limit)) is not None:
            if context.requests.qsize() >= self._places:
                raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "more messages than are read")
            context.requests.put(content)
        if context.stream.ended:
            context.requests.put(None)

    def _call(self, token: object, context: Context, content: bytes) -> bool:
        context.is_running = True
        pace = self._paces.of(context.stream.headers.path, content)
        if pace is None or not pace.is_quick():
            self._submit(context, content, pace)
            self._watch(context)
            return True
        context.is_inline = True
        self._inline = context
        if not self._busy.is_set():
            self._busy.set()
        started, computed = time.perf_counter(), time.thread_time()
        context.run(content)
        computing = time.thread_time() - computed
        pace.ran(time.perf_counter() - started, context.may_be_inline, computing)
        with self._lock:
            if self._leader is not token:
                return False
            self._inline = None
        if not context.stream.closed:
            self._watch(context)  # it waits for the client's window
        return True

    def _submit(self, context: Context, content: bytes | None, pace: Any) -> None:
        """Have a thread of the pool answer, if one is free."""
        with self._lock:
            if self._running >= self._places:
                raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!")
            self._running += 1
        context.is_running = True
        if content is None:
            context.open_requests()
        self._pool.submit(self._work, context, content, pace)

    def _work(self, context: Context, content: bytes | None, pace: Any) -> None:
        started = time.perf_counter()
        try:
            context.run(content)
        finally:
            if pace is not None:
                pace.ran(time.perf_counter() - started, context.may_be_inline, None)
            with self._lock:
                self._running -= 1
