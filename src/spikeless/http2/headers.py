"""Header blocks (HPACK, RFC 7541). They repeat, so each is coded once.

A block that leaves the table of its coder as it was always means the same until another
one changes the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import hpack

HeaderList = tuple[tuple[bytes, bytes], ...]
#: Bytes that a block may have at most; a larger one ends the connection.
MAX_BLOCK_BYTES = 64 << 10
#: Blocks of one connection that are remembered.
_REMEMBERED = 64

#: The table's size unless its reader says otherwise.
_TABLE_BYTES = 4096

_K = TypeVar("_K")
_T = TypeVar("_T")


class HeaderReader(Generic[_T]):
    """Decodes the blocks of one connection, in their order.

    `make` is what is made of the headers of a block, once.
    """

    def __init__(self, make: Callable[[HeaderList], _T]) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=MAX_BLOCK_BYTES)
        self._make = make
        self._known: dict[bytes, _T] = {}

    def read(self, block: bytes) -> _T:
        """What a block says.

        Raises:
            ValueError: it is none, or too long.
        """
        known = self._known.get(block)
        if known is not None:
            return known
        before = _state(self._decoder)
        try:
            pairs = self._decoder.decode(block, raw=True)
        except (hpack.HPACKError, ValueError, IndexError) as error:
            raise ValueError(f"no header block: {error}") from None
        headers = self._make(tuple((bytes(name), bytes(value)) for name, value in pairs))
        _remember(self._known, block, headers, _is_same(before, _state(self._decoder)))
        return headers


class HeaderEncoder:
    """Encodes the blocks of one connection, in their order."""

    def __init__(self) -> None:
        self._encoder = hpack.Encoder()
        self._known: dict[HeaderList, bytes] = {}

    def limit_table(self, size: int) -> None:
        """The reader's table has so many bytes; the next block says what is used."""
        self._encoder.header_table_size = min(size, _TABLE_BYTES)
        self._known.clear()

    def write(self, headers: HeaderList) -> bytes:
        """The block of these headers."""
        known = self._known.get(headers)
        if known is not None:
            return known
        resizes = bool(self._encoder.table_size_changes)
        before = _state(self._encoder)
        block: bytes = self._encoder.encode(headers)
        _remember(self._known, headers, block, not resizes and _is_same(before, _state(self._encoder)))
        return block


_State = tuple[int, int, object]


def _state(coder: hpack.Encoder | hpack.Decoder) -> _State:
    """Of its table, which grows at its front only."""
    entries = coder.header_table.dynamic_entries
    return coder.header_table.maxsize, len(entries), entries[0] if entries else None


def _is_same(before: _State, after: _State) -> bool:
    return before[:2] == after[:2] and before[2] is after[2]


def _remember(known: dict[_K, _T], block: _K, meaning: _T, is_same: bool) -> None:
    if not is_same or len(known) >= _REMEMBERED:
        known.clear()
    if is_same:
        known[block] = meaning
