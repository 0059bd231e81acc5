"""Sockets that listen, for addresses as ``grpc`` writes them, and what they accept."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import select
import socket
import stat
import time
from typing import Any

_log = logging.getLogger(__name__)
_BACKLOG = 4096
#: Descriptors that are left to models, REST and files.
_OTHER_DESCRIPTORS = 256
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_RETRY_SECONDS = 0.02


class Listeners:
    """The sockets of one server that listen, and how many connections they accept."""

    def __init__(self, reuse_port: bool) -> None:
        self._reuse_port = reuse_port
        self._sockets: dict[int, socket.socket] = {}
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(limit - _OTHER_DESCRIPTORS, limit // 2)
        # A descriptor to give up when there are none: a connection that is not accepted
        # would otherwise wait, and wake the loop for ever.
        self._spare = socket.socket(socket.AF_UNIX)
        self._refuses = False

    def __contains__(self, number: int) -> bool:
        return number in self._sockets

    def add(self, address: str) -> int:
        """Listen on an address: its port; raises as `listen`."""
        listeners, port = listen(address, self._reuse_port)
        self._sockets.update((listener.fileno(), listener) for listener in listeners)
        return port

    def start(self, poll: select.epoll) -> None:
        """Have ``poll`` tell of connections."""
        for number in self._sockets:
            poll.register(number, select.EPOLLIN)

    def close(self, poll: select.epoll | None = None) -> None:
        """Listen no more; ``poll`` is that of `start`, if it was called."""
        for number, listener in self._sockets.items():
            if poll is not None:
                poll.unregister(number)
            listener.close()
        self._sockets.clear()
        self._spare.close()

    def accept(self, number: int, connected: int) -> tuple[socket.socket, Any] | None:
        """A new connection and its address; None when there is none to have.

        Args:
            number: the descriptor that has news.
            connected: connections that there are.
        """
        listener = self._sockets[number]
        try:
            connection, address = listener.accept()
        except OSError as error:
            if error.errno in _NO_DESCRIPTORS:
                self._refuse(listener, error)
            elif not isinstance(error, BlockingIOError):
                _log.warning("a connection is not accepted: %s", error)
            return None
        if connected >= self._most:
            connection.close()
            self._report_refusal(f"there are {connected}")
            return None
        self._refuses = False
        return connection, address

    def _refuse(self, listener: socket.socket, error: OSError) -> None:
        """Close a connection for which there is no descriptor."""
        self._report_refusal(str(error))
        self._spare.close()
        with contextlib.suppress(OSError):  # its client may have gone
            listener.accept()[0].close()
        try:
            self._spare = socket.socket(socket.AF_UNIX)
        except OSError:
            time.sleep(_RETRY_SECONDS)  # another thread took the descriptor

    def _report_refusal(self, reason: str) -> None:
        if not self._refuses:
            _log.error("gRPC connections are refused: %s; `ulimit -n` limits them", reason)
        self._refuses = True


def listen(address: str, reuse_port: bool) -> tuple[list[socket.socket], int]:
    """All sockets of ``host:port`` or ``unix:path``, and the port; 1 for a path.

    Raises:
        RuntimeError: it is no address, or not free.
    """
    try:
        if address.startswith("unix:"):
            return [_listen_unix(address.removeprefix("unix:"))], 1
        host, _, port = address.rpartition(":")
        return _listen_tcp(host.strip("[]"), int(port), reuse_port)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"Failed to bind to address {address}: {error}") from None


def _listen_unix(path: str) -> socket.socket:
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)  # of a server that was killed
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX)
    return _started(listener, path)


def _listen_tcp(host: str, port: int, reuse_port: bool) -> tuple[list[socket.socket], int]:
    listeners: list[socket.socket] = []
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
            _started(listener, (address[0], port, *address[2:]))
            port = listener.getsockname()[1]  # the same on all
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners, port


def _started(listener: socket.socket, address: object) -> socket.socket:
    listener.bind(address)  # type: ignore[arg-type]
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener
