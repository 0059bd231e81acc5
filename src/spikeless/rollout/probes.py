"""Probes: a version that a server has loaded is asked before its traffic asks it.

In: the warmup records and golden requests that a version carries. Out: nothing when it
answers well, an error that names the request and the numbers when it does not, and how
it compares with another version.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from spikeless.channels import TLS
from spikeless.client import Client, model_spec
from spikeless.errors import FailedPrecondition, SpikelessError
from spikeless.formats.kinds import Kind
from spikeless.formats.states import State
from spikeless.repository import golden
from spikeless.repository.golden import Golden
from spikeless.repository.journal import Latencies
from spikeless.warmup.records import Record, read, warmup_file
from spikeless.warmup.replay import answer

#: Requests that are kept of a warmup file.
MAX_REQUESTS = 100


class Remote:
    """One version on one server (an `spikeless.warmup.replay.Inference`)."""

    def __init__(self, client: Client, name: str, version: int) -> None:
        self._client = client
        self.name = name
        self.version = version

    def __str__(self) -> str:
        return f"{self.name} version {self.version} on {self._client.target}"

    @property
    def host(self) -> str:
        """The server's host, without the port."""
        return self._client.target.removeprefix(TLS).rpartition(":")[0]

    def state(self) -> State:
        """The version's state."""
        return self._client.statuses(self.name, self.version)[0].state

    def answer(self, kind: Kind, request: Any) -> Any:
        """What the version answers, whichever model and version the request names."""
        own = kind.request()
        own.CopyFrom(request)
        for spec in kind.request_specs(own):
            spec.CopyFrom(model_spec(self.name, self.version, signature=spec.signature_name))
        return self._client.call(getattr(self._client.prediction, kind.name), own)


@dataclass(frozen=True)
class Probes:
    """What a version carries to be asked with."""

    warmup: tuple[Record, ...] = ()
    golden: Golden = field(default_factory=Golden)

    @property
    def requests(self) -> tuple[Record, ...]:
        return self.warmup + self.golden.records


def of_version(version: Path) -> Probes:
    """The warmup records and golden requests of a version's directory.

    Raises:
        DataLoss, InvalidArgument: a file is damaged.
    """
    records = []
    if warmup_file(version).exists():
        for record in read(warmup_file(version)):
            if record.kind:
                records.append(record)
            if len(records) == MAX_REQUESTS:
                break
    return Probes(tuple(records), golden.of_version(version))


def check(remote: Remote, probes: Probes) -> None:
    """Ask a version everything once.

    Raises:
        FailedPrecondition: it failed, its answer is not finite, or it is not the
            expected one.
    """
    for record in probes.warmup:
        try:
            response = answer(remote, record)
        except SpikelessError as error:
            raise FailedPrecondition(f"{remote} fails on warmup record {record.number}: {error}") from None
        if output := golden.not_finite(response):
            raise FailedPrecondition(
                f"{remote} answers warmup record {record.number} with a value in {output} that is not finite"
            )
    try:
        golden.check(remote, probes.golden)
    except SpikelessError as error:
        raise FailedPrecondition(f"{remote} gives a wrong answer: {error}") from None


@dataclass(frozen=True)
class ComparisonSettings:
    """How a candidate is compared with the stable version."""

    #: Requests that each of the two is sent, in turn.
    requests: int = 200
    #: Seconds that this may take at most.
    seconds: float = 10.0
    #: The candidate's p99 may be at most this multiple of the stable one's ...
    max_p99_ratio: float = 1.5
    #: ... or this many seconds above it, whichever is more.
    slack: float = 0.005
    #: Rounds, in one of which the latencies must hold: a pause of the machine hits
    #: either version.
    rounds: int = 3


@dataclass
class Measured:
    """What one version did."""

    requests: int = 0
    #: Requests that failed.
    errors: int = 0
    first_error: str = ""
    #: Seconds that each of the other requests took.
    latencies: list[float] = field(default_factory=list)

    def add(self, other: Measured) -> None:
        self.requests += other.requests
        self.errors += other.errors
        self.first_error = self.first_error or other.first_error
        self.latencies += other.latencies

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0

    def percentile(self, share: float) -> float:
        """The latency that ``share`` of all do not exceed (nearest rank), or NaN."""
        ordered = sorted(self.latencies)
        return ordered[math.ceil(share * len(ordered)) - 1] if ordered else math.nan

    def summary(self) -> Latencies:
        """For the journal."""
        p50, p99 = (
            round(1000 * self.percentile(share), 3) if self.latencies else None for share in (0.5, 0.99)
        )
        return Latencies(self.requests, self.errors, p50, p99)

    def __str__(self) -> str:
        return (
            f"{self.errors} errors in {self.requests} requests, p50 {1000 * self.percentile(0.5):.1f} ms, "
            f"p99 {1000 * self.percentile(0.99):.1f} ms"
        )


@dataclass(frozen=True)
class Comparison:
    """What both versions did with the same requests."""

    candidate: Measured
    stable: Measured

    def add(self, other: Comparison) -> None:
        """Count what ``other`` saw as well."""
        self.candidate.add(other.candidate)
        self.stable.add(other.stable)

    def error_problem(self) -> str:
        """Why the candidate's errors are too many; empty when they are not."""
        if self.candidate.error_rate > self.stable.error_rate:
            return (
                f"{self.candidate.errors} of {self.candidate.requests} requests failed, "
                f"{self.stable.errors} of {self.stable.requests} with the stable version: "
                f"{self.candidate.first_error}"
            )
        return ""

    def latency_problem(self, settings: ComparisonSettings) -> str:
        """Why the candidate is too slow; empty when it is not."""
        own, other = self.candidate.percentile(0.99), self.stable.percentile(0.99)
        limit = max(other * settings.max_p99_ratio, other + settings.slack)
        if own > limit:
            return (
                f"p99 is {1000 * own:.1f} ms, with the stable version {1000 * other:.1f} ms; the limit is "
                f"{1000 * limit:.1f} ms (--max-p99-ratio {settings.max_p99_ratio:g})"
            )
        return ""


@dataclass(frozen=True)
class Pair:
    """A candidate and the stable version on one server."""

    candidate: Remote
    stable: Remote
    #: What both are asked; the stable one answers all of it.
    requests: Sequence[Record]
    #: Ends the comparison early.
    interrupted: threading.Event

    @classmethod
    def of(
        cls, candidate: Remote, stable: Remote, requests: Sequence[Record], interrupted: threading.Event
    ) -> Pair:
        """A pair with those requests that the stable version answers."""
        suited = []
        for record in requests:
            with suppress(SpikelessError):
                answer(stable, record)
                suited.append(record)
        return cls(candidate, stable, suited, interrupted)

    def measure(self, settings: ComparisonSettings) -> Comparison:
        """Send the same requests to both versions in turn."""
        comparison = Comparison(Measured(), Measured())
        until = time.monotonic() + settings.seconds
        for record in islice(cycle(self.requests), settings.requests):
            _ask(self.stable, record, comparison.stable)
            _ask(self.candidate, record, comparison.candidate)
            if time.monotonic() > until or self.interrupted.is_set():
                break
        return comparison

    def compare(self, settings: ComparisonSettings) -> Comparison:
        """Compare errors and p99 of both versions.

        Raises:
            FailedPrecondition: the candidate has more errors, or is slower than the
                settings allow.
        """
        problem = ""
        for _ in range(settings.rounds):
            comparison = self.measure(settings)
            if problem := comparison.error_problem():
                break
            problem = comparison.latency_problem(settings)
            if not problem:
                return comparison
        raise FailedPrecondition(f"{self.candidate} does worse than {self.stable}: {problem}")


def _ask(remote: Remote, record: Record, measured: Measured) -> None:
    measured.requests += 1
    started = time.monotonic()
    try:
        answer(remote, record)
    except SpikelessError as error:
        measured.errors += 1
        measured.first_error = measured.first_error or str(error)
    else:
        measured.latencies.append(time.monotonic() - started)
