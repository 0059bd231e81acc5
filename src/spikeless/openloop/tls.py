"""TLS between what a connection sends and its socket, without waiting.

In: an ``ssl.SSLContext``. Out: a `TlsSession`, which turns plain bytes into records and
back. It touches no socket, so gevent's sockets have no part in it.
"""

from __future__ import annotations

import ssl

from spikeless.errors import Unavailable

_READ_BYTES = 1 << 18


class TlsSession:
    """The client's end of one connection.

    `protocol` is what the server must agree to by ALPN. What is sent before the
    handshake is over is held back until then.
    """

    def __init__(self, context: ssl.SSLContext, host: str, protocol: str) -> None:
        context.set_alpn_protocols([protocol])
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._protocol = protocol
        self._is_established = False
        self._held = b""

    def encrypt(self, plain: bytes) -> bytes:
        """What is to be sent for it, and for the handshake.

        Raises:
            Unavailable: the server is not trusted, or does not speak the protocol.
        """
        self._held += plain
        self._shake_hands()
        if self._is_established and self._held:
            self._tls.write(self._held)
            self._held = b""
        return self._outgoing.read()

    def decrypt(self, received: bytes) -> bytes:
        """The plain bytes that these complete; raises as `encrypt` does."""
        self._incoming.write(received)
        self._shake_hands()
        parts = []
        try:
            while self._is_established and (part := self._tls.read(_READ_BYTES)):
                parts.append(part)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            raise Unavailable(f"the server ended TLS: {error}") from None
        return b"".join(parts)

    def _shake_hands(self) -> None:
        if self._is_established:
            return
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLError as error:
            raise Unavailable(f"no TLS with the server: {error}") from None
        if self._tls.selected_alpn_protocol() != self._protocol:
            raise Unavailable(f"the server does not agree to {self._protocol} by ALPN")
        self._is_established = True
