"""How a store is read and written; this needs none of the libraries for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StoreSettings:
    """How a store is read and written."""

    #: Objects on their way at the same time; each takes some 32 MiB of memory.
    workers: int = 8
    #: Bytes per second in both directions together; None for what the link has.
    bandwidth: int | None = None
    #: Seconds that one object may take.
    timeout: float = 60.0
    #: How often an object is tried before the whole is given up.
    attempts: int = 5
