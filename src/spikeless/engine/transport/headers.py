"""The headers of gRPC's calls and answers.

In: those of a client. Out: what a call needs of them, and header blocks for its answer,
which are the same bytes in every answer, apart from errors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import grpc

from spikeless.http2.headers import HeaderList

#: Bytes that a header may have at most; larger ones end the connection.
MAX_HEADER_BYTES = 16 << 10
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}

#: How messages may be packed.
ENCODINGS = (b"identity", b"deflate", b"gzip")


@dataclass(frozen=True)
class RequestHeaders:
    """The headers of one call, as they came."""

    pairs: HeaderList

    @functools.cached_property
    def fields(self) -> dict[bytes, bytes]:
        """By name; of equal names the last."""
        return dict(self.pairs)

    @functools.cached_property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum(len(name) + len(value) for name, value in self.pairs)

    @functools.cached_property
    def is_request(self) -> bool:
        """Whether they are those of a gRPC request at all."""
        fields = self.fields
        return fields.get(b":method") == b"POST" and fields.get(b"te") == b"trailers" and b":path" in fields

    @functools.cached_property
    def path(self) -> str:
        """The method, ``/package.Service/Method``."""
        return self.fields[b":path"].decode("latin-1")

    @functools.cached_property
    def timeout(self) -> float | None:
        """The deadline in seconds from now; None without one.

        Raises:
            ValueError: it is written in another way.
        """
        text = self.fields.get(b"grpc-timeout")
        if text is None:
            return None
        number, unit = text[:-1], text[-1:]
        if not number.isdigit() or len(number) > 8 or unit not in _UNITS:
            raise ValueError(text)
        return int(number) * _UNITS[unit]

    @functools.cached_property
    def refusal(self) -> tuple[grpc.StatusCode, str] | None:
        """Why they cannot be those of a call: its status; None where they can."""
        for _, value in self.pairs:
            if len(value) > MAX_HEADER_BYTES:
                return grpc.StatusCode.RESOURCE_EXHAUSTED, (
                    f"received metadata size exceeds hard limit (value length {len(value)} vs. "
                    f"{MAX_HEADER_BYTES})"
                )
        if self.fields.get(b"grpc-encoding", b"identity") not in ENCODINGS:
            return grpc.StatusCode.INTERNAL, "Error parsing 'grpc-encoding' metadata"
        try:
            timeout = self.timeout
        except ValueError:
            return grpc.StatusCode.INTERNAL, "Error parsing 'grpc-timeout' metadata"
        if timeout == 0:
            return grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"
        return None

    @functools.cached_property
    def metadata(self) -> HeaderList:
        """The caller's own headers."""
        return tuple(
            (name, value)
            for name, value in self.pairs
            if not name.startswith((b":", b"grpc-")) and name not in (b"te", b"content-type")
        )


def _literal(name: bytes, value: bytes, first: int = 0x00) -> bytes:
    """A header with its name; with ``first`` 0x40 it goes into the table, too."""
    return bytes([first]) + _string(name) + _string(value)


def _string(text: bytes) -> bytes:
    return _integer(len(text), 7) + text


def _integer(value: int, bits: int, first: int = 0) -> bytes:
    """RFC 7541, 5.1."""
    limit = (1 << bits) - 1
    if value < limit:
        return bytes([first | value])
    value -= limit
    encoded = bytearray([first | limit])
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


_STATUS_OK = b"\x88"  # ``:status: 200``, an entry of the static table
_CONTENT_TYPE = (b"content-type", b"application/grpc")
_ACCEPTED = (b"grpc-accept-encoding", b", ".join(ENCODINGS))
_SUCCESS = (b"grpc-status", b"0")
#: The table's size that clients have unless they say otherwise.
_TABLE_BYTES = 4096


class HeaderWriter:
    """Encodes the blocks of one connection, in their order.

    Three entries go into the client's table, each with its first use; an entry's index
    is counted from the newest.
    """

    def __init__(self) -> None:
        self._prefix = b""
        self._indexes = True
        self._has_head = self._has_success = False

    def limit_table(self, size: int) -> None:
        """The client's table is as large; nothing goes into a small one."""
        if size < _TABLE_BYTES and self._indexes:
            self._indexes = False
            self._prefix = _integer(0, 5, 0x20)

    def _take_prefix(self) -> bytes:
        prefix, self._prefix = self._prefix, b""
        return prefix

    def head(self) -> bytes:
        """What comes before the first message."""
        if not self._indexes:
            return self._take_prefix() + _STATUS_OK + _literal(*_CONTENT_TYPE) + _literal(*_ACCEPTED)
        if not self._has_head:
            self._has_head = True
            return _STATUS_OK + _literal(*_CONTENT_TYPE, 0x40) + _literal(*_ACCEPTED, 0x40)
        return b"\x88\xc0\xbf" if self._has_success else b"\x88\xbf\xbe"

    def success(self) -> bytes:
        """What comes after the last message of a call that succeeded."""
        if not self._indexes:
            return self._take_prefix() + _literal(*_SUCCESS)
        if not self._has_success:
            self._has_success = True
            return _literal(*_SUCCESS, 0x40)
        return b"\xbe"

    def failure(self, code: int, message: str, trailing: HeaderList, has_head: bool) -> bytes:
        """What ends any other call; the head is in it when there was none."""
        block = self._take_prefix()
        if not has_head:
            block += _STATUS_OK + _literal(*_CONTENT_TYPE)
        block += _literal(b"grpc-status", str(code).encode())
        block += _literal(b"grpc-message", percent_encoded(message))
        return block + b"".join(_literal(*pair) for pair in trailing)


def percent_encoded(text: str) -> bytes:
    """A ``grpc-message``: bytes that are no visible ASCII, and ``%``, as ``%XX``."""
    return b"".join(
        bytes([byte]) if 0x20 <= byte <= 0x7E and byte != 0x25 else b"%%%02X" % byte
        for byte in text.encode("utf-8", "replace")
    )
