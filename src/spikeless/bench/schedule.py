"""The open-loop schedule: when requests leave, decided before the run.

In: rate, duration, kind of arrivals and seed. Out: the intended start of every request.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spikeless.errors import InvalidArgument

ARRIVALS = ("poisson", "constant")
#: A run of more requests is refused as a mistake in the settings.
MAX_REQUESTS = 50_000_000


@dataclass(frozen=True)
class Schedule:
    """An open-loop schedule."""

    #: Requests per second.
    rate: float
    #: How long requests leave.
    seconds: float
    #: ``poisson`` (independent users) or ``constant`` (evenly spaced).
    arrivals: str = "poisson"
    #: Of the Poisson arrivals; the same seed gives the same schedule.
    seed: int = 1

    def __post_init__(self) -> None:
        if self.arrivals not in ARRIVALS:
            raise InvalidArgument(f"unknown arrivals {self.arrivals!r}: choose one of {', '.join(ARRIVALS)}")
        if not (self.rate > 0 and self.seconds > 0):
            raise InvalidArgument(
                f"rate and seconds must be positive, not {self.rate:g}/s for {self.seconds:g} s"
            )
        if not self.rate * self.seconds <= MAX_REQUESTS:
            raise InvalidArgument(
                f"{self.rate:g}/s for {self.seconds:g} s is more than {MAX_REQUESTS} requests: lower one"
            )

    def offsets(self) -> NDArray[np.float64]:
        """The intended starts, ascending, of shape ``[requests]``.

        They are in seconds after the start of the run. A Poisson process on an interval
        has a Poisson-distributed number of arrivals, each uniform on the interval.
        """
        if self.arrivals == "constant":
            return np.arange(round(self.rate * self.seconds), dtype=np.float64) / self.rate
        random = np.random.default_rng(self.seed)
        count = random.poisson(self.rate * self.seconds)
        return np.sort(random.uniform(0.0, self.seconds, count))
