"""What `connection` and `instant_server` share: gRPC over HTTP/2."""

from __future__ import annotations

import struct

import h2.config
import h2.connection
import h2.settings

#: The compressed flag and the length in front of each gRPC message.
PREFIX = struct.Struct(">BI")


def configuration(client_side: bool) -> h2.config.H2Configuration:
    """HTTP/2 without checks of headers: both ends are ours, and checking takes time."""
    return h2.config.H2Configuration(
        client_side=client_side,
        header_encoding=None,
        validate_inbound_headers=False,
        normalize_inbound_headers=False,
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
    )


def server_side() -> h2.connection.H2Connection:
    """A server's end; a client may have any number of calls open.

    A generator that got no processor for a moment sends all that is due at once.
    """
    connection = h2.connection.H2Connection(configuration(client_side=False))
    most = {h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: (1 << 31) - 1}
    connection.local_settings = h2.settings.Settings(client=False, initial_values=most)
    return connection
