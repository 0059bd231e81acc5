"""Every request of a run, in arrays that are allocated before the first one leaves.

In: the intended starts, then what happens to each request. Out: one column for each
fact. Latency counts from the intended start, because a request that waits behind a
stall is late for its user, wherever it waits (coordinated omission: G. Tene, wrk2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikeless.errors import Code

#: Column -> dtype. Times are seconds; `intended` counts from the start of the run,
#: `lag` (send) and `latency` (answer) from the intended start. `code` is the gRPC
#: status, `version` what served it (0: unknown), `request` the number of the record
#: that was replayed.
COLUMNS: dict[str, Any] = {
    "intended": np.float64,
    "lag": np.float64,
    "latency": np.float64,
    "code": np.uint8,
    "version": np.int64,
    "request": np.uint32,
}


class RequestColumns:
    """Preallocated columns for the requests of one schedule.

    `offsets` are the intended starts in seconds, `numbers` those of the records that
    are replayed.
    """

    def __init__(self, offsets: NDArray[np.float64], numbers: NDArray[Any]) -> None:
        size = len(offsets)
        self.intended = offsets
        self.lag = np.full(size, np.nan)
        self.latency = np.full(size, np.nan)
        self.code = np.full(size, Code.UNKNOWN, np.uint8)
        self.version = np.zeros(size, np.int64)
        self.request = numbers.astype(np.uint32)

    def sent(self, index: int, offset: float) -> None:
        """Request `index` left at `offset`, in seconds after the start of the run."""
        self.lag[index] = offset - self.intended[index]

    def answered(self, index: int, offset: float, code: int, version: int = 0) -> None:
        """Request `index` was answered, or given up, at `offset`."""
        self.latency[index] = offset - self.intended[index]
        self.code[index] = code
        self.version[index] = version

    def ended(self) -> dict[str, NDArray[Any]]:
        """The columns of the requests that ended; fewer when a run is stopped early."""
        ended = ~np.isnan(self.latency)
        return {name: getattr(self, name)[ended].astype(dtype, copy=False) for name, dtype in COLUMNS.items()}
