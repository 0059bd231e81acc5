"""JSON documents of a store, each with the number of its format in it."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from spikeless.errors import DataLoss, FailedPrecondition

_T = TypeVar("_T")


class _Format(msgspec.Struct):
    format: int


def decoded(data: bytes, where: str, kind: type[_T], latest: int, remedy: str = "") -> _T:
    """What a document says.

    Its format is looked at first, as a newer one may have more fields.

    Args:
        where: the document's address, for messages.
        latest: the newest format that is read.
        remedy: what to do about a document that cannot be used.

    Raises:
        DataLoss: it cannot be used.
        FailedPrecondition: a newer Spikeless wrote it.
    """
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found > latest:
            raise FailedPrecondition(
                f"{where} has format {found}, and this Spikeless reads up to {latest}: update Spikeless"
            )
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise DataLoss(f"{where} cannot be used: {error}" + (f"; {remedy}" if remedy else "")) from None
