"""How much a client may ask of a connection without getting on with its calls."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Frames that carry nothing, at once and for each second.
_MOST, _PER_SECOND = 10_000, 1_000


class Allowance:
    """Work of a client that brings no call forward: it gets more by time, and by calls.

    Pings, settings, resets and empty frames are such work. A client that cancels many
    calls of many that are answered never runs out of it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left = float(_MOST)
        self._since = clock()

    def spend(self, count: int = 1) -> bool:
        """Whether the client may."""
        self._left -= count
        if self._left < 0:
            now = self._clock()
            self._left = min(self._left + (now - self._since) * _PER_SECOND, _MOST)
            self._since = now
        return self._left >= 0

    def earn(self, count: int) -> None:
        """A call was brought forward."""
        self._left = min(self._left + count, _MOST)
