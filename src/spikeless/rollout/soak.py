"""Soaking: a candidate is watched on every server, beside the stable version.

In: the two on each server, requests for both, and the servers' metrics where there are
any: they show what real traffic sees. Out: what was seen, or an error as soon as the
candidate does worse.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from spikeless.errors import FailedPrecondition, InvalidArgument
from spikeless.formats.states import State
from spikeless.rollout import server_metrics
from spikeless.rollout.probes import Comparison, ComparisonSettings, Measured, Pair, Remote
from spikeless.rollout.server_metrics import Traffic

_PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class SoakSettings:
    """How long to watch, and what for."""

    #: Seconds; 0 does not watch at all.
    seconds: float = 0.0
    #: Seconds between two polls.
    interval: float = 1.0
    #: Requests that both versions are sent at each poll.
    requests: int = 10
    #: Address of the servers' metrics, with ``{host}`` for the server's host; empty for
    #: none.
    metrics: str = ""
    #: Share of real requests to the candidate that may fail beyond the share of the
    #: stable version.
    max_error_rate: float = 0.001

    def __post_init__(self) -> None:
        if self.metrics and not self.metrics.startswith(("http://", "https://")):
            raise InvalidArgument(
                f"--metrics {self.metrics!r}: give an address such as "
                "http://{host}:8501/monitoring/prometheus/metrics"
            )


class Watched:
    """A candidate on one server, and the stable version where there is one."""

    def __init__(
        self, candidate: Remote, pair: Pair | None, settings: SoakSettings, comparison: ComparisonSettings
    ) -> None:
        self.candidate = candidate
        #: What both versions did with the requests that they were sent.
        self.seen = Comparison(Measured(), Measured())
        #: Requests of real callers to the candidate.
        self.traffic = Traffic()
        self._pair = pair
        self._settings = settings
        self._limits = comparison
        self._each = replace(comparison, requests=settings.requests)
        self._metrics = settings.metrics.replace("{host}", candidate.host)
        self._first = server_metrics.read(self._metrics) if self._metrics else {}

    def poll(self) -> None:
        """Ask once, and read the metrics once.

        Raises:
            FailedPrecondition: the candidate is gone, or fails more often than the
                stable version.
        """
        if self.candidate.state() is not State.AVAILABLE:
            raise FailedPrecondition(f"{self.candidate} is not available any more")
        if self._pair is not None and self._pair.requests:
            self.seen.add(self._pair.measure(self._each))
            self._refuse(self.seen.error_problem())
        if self._metrics:
            self._read_metrics()

    def _read_metrics(self) -> None:
        now = server_metrics.read(self._metrics)

        def since(name: str) -> Traffic:
            return now.get(name, Traffic()).since(self._first.get(name, Traffic()))

        self.traffic = own = since(self.candidate.name)
        other = Traffic() if self._pair is None else since(self._pair.stable.name)
        if own.error_rate > other.error_rate + self._settings.max_error_rate:
            self._refuse(
                f"its metrics say that {own.errors:g} of {own.requests:g} requests failed, "
                f"{other.errors:g} of {other.requests:g} with the stable version"
            )

    def check_latency(self) -> None:
        """Check all latencies that were seen.

        Raises:
            FailedPrecondition: the candidate is slower than the limits allow.
        """
        if self.seen.candidate.requests:
            self._refuse(self.seen.latency_problem(self._limits))

    def _refuse(self, problem: str) -> None:
        if problem:
            raise FailedPrecondition(f"{self.candidate} does worse than the stable version: {problem}")


def soak(
    watched: Sequence[Watched],
    settings: SoakSettings,
    progress: Callable[[str], None],
    interrupted: threading.Event,
) -> None:
    """Watch for as long as the settings say, or until ``interrupted``.

    Raises:
        FailedPrecondition: a candidate does worse than the stable version.
        SpikelessError: a server does not answer.
    """
    ends = time.monotonic() + settings.seconds
    reported = time.monotonic()
    while (left := ends - time.monotonic()) > 0:
        for one in watched:
            one.poll()
        if time.monotonic() - reported > _PROGRESS_SECONDS:
            reported = time.monotonic()
            progress(f"soaking, {left:.0f} s to go")
        if interrupted.wait(min(settings.interval, max(left, 0.0))):
            return  # Too few latencies to judge.
    for one in watched:
        one.check_latency()
