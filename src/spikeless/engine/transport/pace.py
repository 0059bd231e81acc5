"""Which calls are quick: measured, by method and by the beginning of their message.

In every request of the engine's services the first field names the model, its version
and signature, or the first of them.
"""

from __future__ import annotations

import math

#: Calls as quick as this are worth waiting for.
_QUICK_SECONDS = 1e-3
#: One that takes longer, though others were quick, sends those after it to the pool: if
#: it computed for a part of that, or waited for very long. One that only waited for the
#: processor, or for Python's lock, would wait in the pool even longer.
_SLOW_SECONDS, _COMPUTING_SECONDS, _STUCK_SECONDS = 2e-3, 1e-3, 50e-3
#: Of larger messages nothing is known.
_MOST_BYTES = 64 << 10
_FIRST_FIELD = 0x0A
_MOST_KINDS = 1024
_LEAST_SKIPPED, _MOST_SKIPPED, _FORGIVEN_AFTER = 32, 1 << 14, 1000


class Pace:
    """How quick calls of one kind are."""

    def __init__(self) -> None:
        # Of the calls of late: others of them may have waited for each other. Calls in
        # the pool always do when there are many, so that these do not raise it.
        self._fastest = math.inf
        self._skipped = _LEAST_SKIPPED
        self._to_skip = 0
        self._good = 0

    def is_quick(self) -> bool:
        """Whether the next call is likely to take no time to speak of."""
        if self._to_skip:
            self._to_skip -= 1
            return False
        return self._fastest < _QUICK_SECONDS

    def ran(self, seconds: float, may_be_inline: bool, computing: float | None) -> None:
        """A call has ended.

        Args:
            seconds: how long it took.
            may_be_inline: what its method said.
            computing: seconds for which the loop used the processor meanwhile; None
                where the pool answered.
        """
        if not may_be_inline:
            self._fastest = math.inf
        elif computing is None:
            self._fastest = min(seconds, self._fastest)
        else:
            self._fastest = min(seconds, self._fastest * 1.1)
            if seconds > _STUCK_SECONDS or (seconds > _SLOW_SECONDS and computing > _COMPUTING_SECONDS):
                self._good = 0
                self._skipped = self._to_skip = min(2 * self._skipped, _MOST_SKIPPED)
            else:
                self._good += 1
                if self._good > _FORGIVEN_AFTER:
                    self._skipped = _LEAST_SKIPPED


class Paces:
    """The paces of all kinds of calls that were seen of late."""

    def __init__(self) -> None:
        self._paces: dict[tuple[str, bytes], Pace] = {}

    def of(self, path: str, content: bytes) -> Pace | None:
        """That of calls like this one; None for those that are all different."""
        if not 2 <= len(content) <= _MOST_BYTES or content[0] != _FIRST_FIELD or content[1] > 0x7F:
            return None
        key = path, content[: 2 + content[1]]
        pace = self._paces.get(key)
        if pace is None:
            if len(self._paces) >= _MOST_KINDS:
                self._paces.clear()
            pace = self._paces[key] = Pace()
        return pace
