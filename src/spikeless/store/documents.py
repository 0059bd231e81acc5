"""JSON documents of a store, each with the number of its format in it."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from spikeless.errors import DataLoss, FailedPrecondition

_T = TypeVar("_T")


class _Format(msgspec.Struct):
    format: int


class Reader(Generic[_T]):
    """Reads documents of one kind.

    It is made where the kind is, when the module is imported: msgspec looks at a kind's
    fields when it first meets it, and a thread that decodes one meanwhile ends the
    process (SIGSEGV).

    Args:
        latest: the newest format that is read.
        remedy: what to do about a document that cannot be used.
    """

    _format = msgspec.json.Decoder(_Format)

    def __init__(self, kind: type[_T], latest: int, remedy: str = "") -> None:
        self._decoder = msgspec.json.Decoder(kind)
        self._latest = latest
        self._remedy = remedy

    def read(self, data: bytes, where: str) -> _T:
        """What a document says.

        Its format is looked at first, as a newer one may have more fields.

        Args:
            where: the document's address, for messages.

        Raises:
            DataLoss: it cannot be used.
            FailedPrecondition: a newer Spikeless wrote it.
        """
        try:
            found = self._format.decode(data).format
            if found > self._latest:
                raise FailedPrecondition(
                    f"{where} has format {found}, and this Spikeless reads up to {self._latest}: "
                    "update Spikeless"
                )
            return self._decoder.decode(data)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            remedy = f"; {self._remedy}" if self._remedy else ""
            raise DataLoss(f"{where} cannot be used: {error}{remedy}") from None
