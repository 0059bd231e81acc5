"""Connections that have some time for something, the same for all of them."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spikeless.engine.transport.peer import Peer


class Timeouts:
    """Whose time runs, and until when; one thread at a time uses it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        # The oldest first.
        self._ends: OrderedDict[Peer, float] = OrderedDict()
        #: When the first of them has no time left; infinite without any.
        self.next = math.inf

    def start(self, client: Peer, now: float) -> None:
        """Its time begins, if it has not begun already."""
        self._ends.setdefault(client, now + self._seconds)
        self._find_next()

    def stop(self, client: Peer) -> None:
        """It has done what it had time for, or is gone."""
        if self._ends.pop(client, None) is not None:
            self._find_next()

    def _find_next(self) -> None:
        self.next = next(iter(self._ends.values()), math.inf)

    def take_expired(self, now: float) -> list[Peer]:
        """Those that have no time left; they are forgotten."""
        expired: list[Peer] = []
        while self.next <= now:
            expired.append(self._ends.popitem(last=False)[0])
            self._find_next()
        return expired
