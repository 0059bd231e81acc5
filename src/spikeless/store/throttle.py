"""A limit of bytes a second, which several threads keep together."""

from __future__ import annotations

import threading
import time


class Throttle:
    """Spreads bytes over time."""

    def __init__(self, rate: int | None, interrupted: threading.Event) -> None:
        self._rate = rate
        self._interrupted = interrupted
        self._lock = threading.Lock()
        self._free = 0.0

    def take(self, size: int) -> None:
        """Wait until ``size`` more bytes may go."""
        if self._rate is None:
            return
        with self._lock:
            start = max(self._free, time.monotonic())
            self._free = start + size / self._rate
        self._interrupted.wait(max(0.0, start - time.monotonic()))
