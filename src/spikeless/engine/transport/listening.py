"""Sockets that listen, for addresses as ``grpc`` writes them."""

from __future__ import annotations

import os
import socket
import stat

_BACKLOG = 4096


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
