"""Soaking: a candidate is watched for some time on every server, beside the stable version.

In: the two on each server, requests to ask them with, and where there are some, the servers' metrics, which
tell what real traffic sees. Out: what was seen, or an error as soon as the candidate does worse.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spikeless.errors import FailedPrecondition, InvalidArgument
from spikeless.formats.states import State
from spikeless.rollout import server_metrics
from spikeless.rollout.probes import Comparison, ComparisonSettings, Measured, Remote, measure
from spikeless.rollout.server_metrics import Traffic
from spikeless.warmup.records import Record

_PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class SoakSettings:
    """How long to watch, and what for.

    seconds: how long; 0 does not watch at all.
    interval: seconds between two looks.
    requests: how many both versions are sent at each look.
    metrics: address of the servers' metrics, with ``{host}`` for the server's host; empty for none.
    max_error_rate: share of real requests to the candidate that may fail beyond the share of the stable one.
    """

    seconds: float = 0.0
    interval: float = 1.0
    requests: int = 10
    metrics: str = ""
    max_error_rate: float = 0.001

    def __post_init__(self) -> None:
        if self.metrics and not self.metrics.startswith(("http://", "https://")):
            raise InvalidArgument(
                f"--metrics {self.metrics!r}: give an address such as "
                "http://{host}:8501/monitoring/prometheus/metrics"
            )


class Watched:
    """A candidate on one server, and the stable version beside it, if there is one."""

    def __init__(
        self,
        candidate: Remote,
        stable: Remote | None,
        requests: Sequence[Record],
        settings: SoakSettings,
        comparison: ComparisonSettings,
        interrupted: threading.Event,
    ) -> None:
        self.candidate = candidate
        self._stable = stable
        self._requests = requests
        self._settings = settings
        self._limits = comparison
        self._interrupted = interrupted
        self._each = replace(comparison, requests=settings.requests)
        self._seen = Comparison(Measured(), Measured())
        self._metrics = settings.metrics.replace("{host}", candidate.host)
        self._first = server_metrics.read(self._metrics) if self._metrics else {}
        self._traffic = Traffic()

    def look(self) -> None:
        """Look once.

        Raises:
            FailedPrecondition: the candidate is gone, or fails more often than the stable version.
        """
        if self.candidate.state() is not State.AVAILABLE:
            raise FailedPrecondition(f"{self.candidate} is not available any more")
        if self._stable is not None and self._requests:
            self._seen.add(self._measure(self._stable))
            self._refuse(self._seen.error_problem())
        if self._metrics:
            self._look_at_metrics(self._stable)

    def _measure(self, stable: Remote) -> Comparison:
        return measure(self.candidate, stable, self._requests, self._each, self._interrupted)

    def _look_at_metrics(self, stable: Remote | None) -> None:
        now = server_metrics.read(self._metrics)

        def since(remote: Remote | None) -> Traffic:
            if remote is None:
                return Traffic()
            return now.get(remote.name, Traffic()).since(self._first.get(remote.name, Traffic()))

        own, other = since(self.candidate), since(stable)
        self._traffic = own
        if own.error_rate > other.error_rate + self._settings.max_error_rate:
            self._refuse(
                f"its metrics say that {own.errors:g} of {own.requests:g} requests failed, "
                f"{other.errors:g} of {other.requests:g} with the stable version"
            )

    def finish(self) -> dict[str, Any]:
        """What was seen in all.

        Raises:
            FailedPrecondition: the candidate is slower than the limits allow.
        """
        if self._seen.candidate.requests:
            self._refuse(self._seen.latency_problem(self._limits))
        return {
            **self._seen.summary(),
            "traffic": {"requests": self._traffic.requests, "errors": self._traffic.errors},
        }

    def _refuse(self, problem: str) -> None:
        if problem:
            raise FailedPrecondition(f"{self.candidate} does worse than the stable version: {problem}")


def soak(
    watched: Sequence[Watched],
    settings: SoakSettings,
    progress: Callable[[str], None],
    interrupted: threading.Event,
) -> list[Any]:
    """Watch for as long as the settings say, or until ``interrupted``; return what was seen on each server.

    Raises:
        FailedPrecondition: a candidate does worse than the stable version.
        SpikelessError: a server does not answer.
    """
    ends = time.monotonic() + settings.seconds
    told = time.monotonic()
    while (left := ends - time.monotonic()) > 0:
        for one in watched:
            one.look()
        if time.monotonic() - told > _PROGRESS_SECONDS:
            told = time.monotonic()
            progress(f"soaking, {left:.0f} s to go")
        if interrupted.wait(min(settings.interval, max(left, 0.0))):
            break
    return [one.finish() for one in watched]
