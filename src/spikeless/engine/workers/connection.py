"""Calls between two processes: JSON lines over a socket, in both directions.

    {"id": 7, "method": "load", "params": {...}}
    {"id": 7, "result": ...}    or    {"id": 7, "error": [code, message]}

In: handlers by method. Out: a future for each call. A line has a size limit.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import socket
import struct
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import Any

from spikeless.client import RemoteError
from spikeless.errors import Code, ResourceExhausted, SpikelessError, Unavailable

_log = logging.getLogger(__name__)
#: Bytes of a line at most.
MAX_LINE = 64 << 20
#: Seconds after which a process that reads nothing is given up.
_SEND_SECONDS = 30
Handlers = Mapping[str, Callable[..., Any]]


class Disconnected(Unavailable):
    """The other process has gone."""


class PeerConnection:
    """One end of a socket: start, call, close."""

    def __init__(
        self,
        end: socket.socket,
        handlers: Handlers,
        in_order: Collection[str] = (),
        closed: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
        end: of a stream of bytes.
        handlers: what a method does with its parameters; the result is answered.
        in_order: methods that are handled one after another, and must be quick. All
            others have a thread for each call.
        closed: called at the end of the stream.
        """
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_SECONDS, 0))
        self._end = end
        self._handlers = handlers
        self._in_order = in_order
        self._closed = closed
        self._ids = itertools.count()
        self._pending: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        #: Whether it has ended.
        self.is_closed = False
        self._thread = threading.Thread(target=self._read, name="connection", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def call(self, method: str, **params: Any) -> Future[Any]:
        """Have the other process do something.

        Returns:
            A future, which raises the `SpikelessError` that was answered, or
            `Disconnected`.
        """
        future: Future[Any] = Future()
        number = next(self._ids)
        with self._lock:
            if self.is_closed:
                future.set_exception(Disconnected("the other process has gone"))
                return future
            self._pending[number] = future
        try:
            self._send({"id": number, "method": method, "params": params})
        except SpikelessError as error:
            self._resolve(number, error=error)
        return future

    def close(self) -> None:
        """End the stream; all calls that wait fail."""
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self.is_closed = True
            pending, self._pending = self._pending, {}
        for future in pending.values():
            future.set_exception(Disconnected("the other process has gone"))

    def _send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        if len(line) > MAX_LINE:
            raise ResourceExhausted(
                f"a message of {len(line)} bytes between workers: {MAX_LINE} are possible"
            )
        try:
            with self._sending:
                self._end.sendall(line)
        except OSError:
            # A part of the line may have gone: nothing may follow it.
            self.close()

    def _read(self) -> None:
        try:
            with self._end.makefile("rb") as lines:
                while (line := lines.readline(MAX_LINE + 1)).endswith(b"\n"):
                    self._receive(json.loads(line))
        except OSError:
            pass
        except Exception:
            _log.exception("between workers")
        self.close()
        self._end.close()
        self._closed()

    def _receive(self, message: dict[str, Any]) -> None:
        method = message.get("method")
        if method is None:
            error = message.get("error")
            remote = None if error is None else RemoteError(Code(error[0]), error[1])
            self._resolve(message["id"], message.get("result"), remote)
        elif method in self._in_order:
            self._answer(message)
        else:
            threading.Thread(target=self._answer, args=(message,), name=method, daemon=True).start()

    def _answer(self, message: dict[str, Any]) -> None:
        number = message["id"]
        try:
            answer = {"id": number, "result": self._handlers[message["method"]](**message["params"])}
        except SpikelessError as error:
            answer = {"id": number, "error": [error.code.value, str(error)]}
        except Exception as error:
            _log.exception("%s", message["method"])
            answer = {"id": number, "error": [Code.INTERNAL.value, f"{type(error).__name__}: {error}"]}
        try:
            self._send(answer)
        except SpikelessError as error:
            self._send({"id": number, "error": [error.code.value, str(error)]})

    def _resolve(self, number: int, result: Any = None, error: SpikelessError | None = None) -> None:
        with self._lock:
            future = self._pending.pop(number, None)
        if future is None:
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
