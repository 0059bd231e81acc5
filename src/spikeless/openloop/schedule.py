"""The open-loop schedule: when requests leave, decided before the run.

In: rate, duration, kind of arrivals and seed. Out: the intended start of every request.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spikeless.errors import InvalidArgument

ARRIVALS = ("poisson", "constant", "bursts")
#: Not drawn by a `Schedule`, but as they were recorded.
RECORDED = "recorded"
#: Of each second, so much is a burst, with so many times the mean rate.
BURST_SHARE = 0.1
BURST_FACTOR = 5.0
#: A run of more requests is refused as a mistake in the settings.
MAX_REQUESTS = 50_000_000


@dataclass(frozen=True)
class Schedule:
    """An open-loop schedule."""

    #: Requests per second.
    rate: float
    #: How long requests leave.
    seconds: float
    #: ``poisson`` (independent users), ``constant`` (evenly spaced) or ``bursts``
    #: (Poisson, with `BURST_FACTOR` times the mean rate in the first `BURST_SHARE` of
    #: each second and evenly less in the rest).
    arrivals: str = "poisson"
    #: Of the random arrivals; the same seed gives the same schedule.
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
        if self.arrivals == "poisson":
            count = random.poisson(self.rate * self.seconds)
            return np.sort(random.uniform(0.0, self.seconds, count))
        # Operational time, in which the rate is constant: expected requests / rate.
        edges = np.arange(np.ceil(self.seconds) + 1)
        times = np.sort(np.concatenate([edges, edges[:-1] + BURST_SHARE]))
        expected = np.sort(np.concatenate([edges, edges[:-1] + BURST_SHARE * BURST_FACTOR]))
        end = float(np.interp(self.seconds, times, expected))
        count = random.poisson(self.rate * end)
        offsets: NDArray[np.float64] = np.interp(np.sort(random.uniform(0.0, end, count)), expected, times)
        return offsets
