"""Reporting: a machine that follows a store says in it how its servers are.

In: what the follower knows, the machine's servers, and their metrics. Out: a report in
the store (`spikeless.store.reports`), written when something has changed, and every few
seconds because requests have come.

Traffic is counted from when the labels of a model last moved on this machine, by what
the servers themselves say.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from spikeless.channels import TLS
from spikeless.client import Client
from spikeless.errors import Code, InvalidArgument, SpikelessError
from spikeless.formats.states import State
from spikeless.repository import layout
from spikeless.rollout import server_metrics
from spikeless.rollout.fleet import FleetSettings, states
from spikeless.rollout.server_metrics import Traffic
from spikeless.store.objects import Store
from spikeless.store.reports import (
    FORMAT,
    MAX_EVERY,
    MAX_MODELS,
    MAX_VERSIONS,
    NodeModel,
    NodeReport,
    NodeTraffic,
    Reports,
    clean,
)

_CALL_SECONDS = 3.0
#: For requests above all buckets.
_MAX_MS = 1e9


@dataclass(frozen=True)
class ReportSettings:
    """Whether and how a machine reports."""

    #: Seconds between two reports, at most; None: it does not report.
    every: float | None = None
    #: Address of the servers' metrics, with ``{host}`` for the server's host; empty for
    #: none.
    metrics: str = ""

    def __post_init__(self) -> None:
        if self.every is not None and not 0 < self.every <= MAX_EVERY:
            raise InvalidArgument(f"--report {self.every:g}s: say more than 0 s, and at most 1 h")


@dataclass(frozen=True)
class FollowedModel:
    """What a follower knows of one model."""

    name: str
    #: The labels that it should have here.
    labels: Mapping[str, int]
    #: Why it has, or serves, something else; empty where it does not.
    error: str = ""
    refused: bool = False


@dataclass(frozen=True)
class _Period:
    """The time since the labels of a model last moved here."""

    labels: Mapping[str, int]
    began: float
    #: Of the servers when it began; None while that cannot be read.
    traffic: Traffic | None
    before: NodeTraffic | None


class Reporter:
    """Reports on one machine."""

    def __init__(
        self,
        store: Store,
        node: str,
        models: Path,
        servers: FleetSettings | None,
        settings: ReportSettings,
    ) -> None:
        self._node = node
        self._reports = Reports(store)
        self._models = models
        self._settings = settings
        self._clients = [Client(target, _CALL_SECONDS) for target in (servers.targets if servers else ())]
        self._periods: dict[str, _Period] = {}
        # Higher than what an earlier process has written.
        self._number = time.time_ns() // 1_000_000
        self._last: tuple[object, ...] | None = None
        self._written = 0.0

    def report(self, change: int, followed: Sequence[FollowedModel], *, busy: bool = False) -> None:
        """Report, if something has changed or the last report is old.

        Raises:
            SpikelessError: the store does not take it.
        """
        assert self._settings.every is not None
        traffic, problem = self._traffic()
        models = tuple(self._model(one, traffic, problem) for one in followed[:MAX_MODELS])
        facts = (
            change,
            busy,
            *(msgspec.structs.replace(one, watched=0.0, since=None, before=None) for one in models),
        )
        if facts == self._last and time.monotonic() - self._written < self._settings.every:
            return
        self._number += 1
        self._reports.write(
            NodeReport(
                FORMAT,
                self._node,
                self._number,
                time.time(),
                self._settings.every,
                change,
                busy,
                len(self._clients),
                models,
            )
        )
        self._last, self._written = facts, time.monotonic()

    def _model(self, one: FollowedModel, traffic: Mapping[str, Traffic] | None, problem: str) -> NodeModel:
        known: dict[int, set[str]] = {}
        answers: dict[str, set[int | None]] = {label: set() for label in one.labels}
        for client in self._clients:
            try:
                for status in states(client, one.name):
                    if status.state is not State.END or status.error is not None:
                        error = "" if status.error is None else f": {status.error}"
                        known.setdefault(status.version, set()).add(f"{status.state.name}{error}")
                for label, found in answers.items():
                    found.add(_version_of(client, one.name, label))
            except SpikelessError as error:
                problem = str(error)
                answers = {}
        labels = {
            label: version
            for label, found in answers.items()
            if len(found) == 1 and (version := next(iter(found))) is not None
        }
        now = None if traffic is None else traffic.get(one.name, Traffic())
        period = self._period(one.name, labels, now)
        return NodeModel(
            one.name,
            tuple(sorted(layout.versions(self._models, one.name))[-MAX_VERSIONS:]),
            {version: clean(", ".join(sorted(known[version]))) for version in sorted(known)[-MAX_VERSIONS:]},
            dict(sorted(labels.items())[:MAX_VERSIONS]),
            clean(one.error or problem),
            one.refused,
            time.monotonic() - period.began,
            _added(now, period.traffic),
            period.before,
        )

    def _period(self, name: str, labels: Mapping[str, int], now: Traffic | None) -> _Period:
        """The present period, which is a new one where labels have moved."""
        old = self._periods.get(name)
        # A server that does not answer just now says nothing.
        if old is None or (labels and labels != old.labels):
            before = None if old is None else _added(now, old.traffic)
            self._periods[name] = _Period(labels, time.monotonic(), now, before)
        elif old.traffic is None and now is not None:
            self._periods[name] = replace(old, traffic=now)
        return self._periods[name]

    def _traffic(self) -> tuple[dict[str, Traffic] | None, str]:
        """The traffic of each model on all servers, and why it cannot be read."""
        if not self._settings.metrics or not self._clients:
            return None, ""
        hosts = {client.target.removeprefix(TLS).rpartition(":")[0] for client in self._clients}
        total: dict[str, Traffic] = {}
        try:
            for url in sorted({self._settings.metrics.replace("{host}", host) for host in hosts}):
                for name, traffic in server_metrics.read(url).items():
                    total[name] = _sum(total.get(name, Traffic()), traffic)
        except SpikelessError as error:
            return None, str(error)
        return total, ""


def _version_of(client: Client, name: str, label: str) -> int | None:
    try:
        return client.version_of(name, label)
    except SpikelessError as error:
        if error.code in (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION):
            return None
        raise


def _sum(one: Traffic, other: Traffic) -> Traffic:
    bounds = {**one.buckets, **other.buckets}
    return Traffic(
        one.requests + other.requests,
        one.errors + other.errors,
        {bound: one.buckets.get(bound, 0.0) + other.buckets.get(bound, 0.0) for bound in bounds},
    )


def _added(now: Traffic | None, before: Traffic | None) -> NodeTraffic | None:
    """What was added between the two; None where one of them is not known."""
    if now is None or before is None:
        return None
    traffic = now.since(before)
    p99 = traffic.percentile_ms(0.99)
    return NodeTraffic(traffic.requests, traffic.errors, None if p99 is None else min(p99, _MAX_MS))
