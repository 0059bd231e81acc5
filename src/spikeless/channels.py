"""How a model server is reached: its address, and TLS where it has it.

In: ``host:port``, or ``grpcs://host:port`` for a server with TLS, whose files variables
of the environment name. Out: gRPC channels, or a context for sockets of one's own.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Sequence
from pathlib import Path

import grpc

from spikeless.errors import InvalidArgument

ChannelOptions = Sequence[tuple[str, int | str]]
#: Messages of any size. Reconnect soon, to find a server that was restarted at once;
#: never through a proxy.
CHANNEL_OPTIONS: ChannelOptions = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
]
#: What a target begins with where the server has TLS (``--ssl_config_file``).
TLS = "grpcs://"
#: A file in PEM: the authorities of servers, by default gRPC's own, or in a benchmark
#: the system's.
CA_VARIABLE = "SPIKELESS_TLS_CA"
#: Files in PEM, to show to a server that asks for them.
CERTIFICATE_VARIABLE = "SPIKELESS_TLS_CERT"
KEY_VARIABLE = "SPIKELESS_TLS_KEY"


def channel(target: str, options: ChannelOptions = CHANNEL_OPTIONS) -> grpc.Channel:
    """A channel to ``host:port``, or with TLS to ``grpcs://host:port``.

    Raises:
        InvalidArgument: a file that a variable names cannot be read, or is alone.
    """
    if target.startswith(TLS):
        return grpc.secure_channel(target.removeprefix(TLS), credentials(), options=options)
    return grpc.insecure_channel(target, options=options)


def credentials() -> grpc.ChannelCredentials:
    """The credentials that the variables name; raises as `channel` does."""
    authorities, certificate, key = (None if file is None else Path(file).read_bytes() for file in _files())
    return grpc.ssl_channel_credentials(authorities, key, certificate)


def endpoint(target: str) -> tuple[str, ssl.SSLContext | None]:
    """The ``host:port`` of a target, and of one with TLS the context of its sockets.

    Raises:
        InvalidArgument: as of `channel`, or a file is no PEM of its kind.
    """
    if not target.startswith(TLS):
        return target, None
    authorities, certificate, key = _files()
    try:
        context = ssl.create_default_context(cafile=authorities)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        files = ", ".join(file for file in (authorities, certificate, key) if file)
        raise InvalidArgument(f"{files}: not the PEM files that TLS needs: {error}") from None
    return target.removeprefix(TLS), context


def _files() -> tuple[str | None, str | None, str | None]:
    """The files of authorities, certificate and key; each can be read."""
    authorities, certificate, key = map(_file, (CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE))
    if (certificate is None) != (key is None):
        raise InvalidArgument(
            f"{CERTIFICATE_VARIABLE} and {KEY_VARIABLE} belong together: set both or neither"
        )
    return authorities, certificate, key


def _file(variable: str) -> str | None:
    file = os.environ.get(variable)
    if not file:
        return None
    try:
        Path(file).read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{variable}: cannot read {file}: {error.strerror}") from None
    return file
