"""What `connection` and `instant_server` share: gRPC over HTTP/2."""

from __future__ import annotations

import struct

import h2.config

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
