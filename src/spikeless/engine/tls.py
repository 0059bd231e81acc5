"""TLS of the gRPC ports: an ``SSLConfig`` in, credentials of a gRPC server out.

The message is TensorFlow Serving's (``ssl_config.proto``): the server's key and
certificate, and authorities of which clients need a certificate, all PEM.
"""

from __future__ import annotations

import os
import ssl
from typing import Any

import grpc

from spikeless.errors import InvalidArgument
from spikeless.formats.protos import message_class, read_text_proto

_SSLConfig = message_class(
    "SSLConfig", server_key=(1, str), server_cert=(2, str), custom_ca=(3, str), client_verify=(4, bool)
)


def credentials(file: str | os.PathLike[str]) -> grpc.ServerCredentials:
    """What ``--ssl_config_file`` asks for.

    Raises:
        NotFound: the file cannot be read.
        InvalidArgument: it holds no SSLConfig, no key with its certificate, or clients
            are to be verified by no authority.
    """
    config = read_text_proto(file, _SSLConfig())
    _check(config, os.fspath(file))
    return grpc.ssl_server_credentials(
        [(config.server_key.encode(), config.server_cert.encode())],
        root_certificates=config.custom_ca.encode() or None,
        require_client_auth=config.client_verify,
    )


def _check(config: Any, file: str) -> None:
    """Find what is wrong now: gRPC would only say that it cannot listen."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # OpenSSL wants files; this one is in memory only, and of this process alone.
    pair = os.memfd_create("pair")
    try:
        with open(pair, "w", closefd=False) as file_of_both:
            file_of_both.write(f"{config.server_key}\n{config.server_cert}\n")
        context.load_cert_chain(f"/proc/self/fd/{pair}", password=lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        raise InvalidArgument(
            f"{file}: server_key and server_cert are no PEM key without a passphrase and the certificate "
            f"that belongs to it: {error}"
        ) from None
    finally:
        os.close(pair)
    if config.client_verify and not config.custom_ca:
        raise InvalidArgument(f"{file}: client_verify needs the authorities of clients in custom_ca")
    try:
        if config.custom_ca:
            context.load_verify_locations(cadata=config.custom_ca)
    except (ssl.SSLError, ValueError) as error:
        raise InvalidArgument(f"{file}: custom_ca holds no PEM certificates: {error}") from None
