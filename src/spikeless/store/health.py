"""The health of the machines that a promotion in waves has reached.

In: the promotion, the machines' reports, and limits. Out: how each machine does: well,
not yet, silent, or badly. A machine is watched for as long as it says that it has the
version, by its own clock; how long it is silent is measured here, by this one.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping
from dataclasses import dataclass

from spikeless.errors import Code, SpikelessError
from spikeless.store.changes import Waves
from spikeless.store.reports import NodeModel, NodeReport

#: Reports that may be missing until a machine counts as silent.
_MISSING = 3


@dataclass(frozen=True)
class HealthLimits:
    """What is asked of each machine."""

    #: Seconds for which it is watched with the version.
    soak: float = 0.0
    #: Share of its requests that may fail beyond the share with the version before.
    max_error_rate: float = 0.001
    #: Its p99, in seconds; None: whatever it is.
    max_p99: float | None = None
    #: Seconds until it serves the version.
    load_timeout: float = 600.0
    #: Seconds for which it may be silent, or three reports if that is longer.
    patience: float = 15.0


class Health(enum.Enum):
    """How a machine does."""

    WELL = "well"
    #: Its puller was stopped: it follows the store no more.
    LEFT = "left"
    WAITING = "waiting"
    SILENT = "silent"
    BAD = "bad"


@dataclass(frozen=True)
class Standing:
    """One machine in a promotion."""

    node: str
    wave: int
    health: Health
    #: What it says, or what is wrong with it.
    text: str
    #: The version that callers of the label get there; None where that is not known.
    serves: int | None = None
    model: NodeModel | None = None
    #: Seconds since its last report, and the change in the store that it knew then.
    age: float | None = None
    change: int | None = None


class Silence:
    """For how long machines have been silent, by this machine's clock."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._heard: dict[str, tuple[int, float]] = {}

    def seconds(self, report: NodeReport) -> float:
        """How long ago a machine wrote its last report.

        Its clock counts only for the first report that is seen of it.
        """
        number, heard = self._heard.get(report.node, (-1, 0.0))
        now = time.monotonic()
        if number < 0:
            heard = now - max(0.0, time.time() - report.time)
        elif number != report.number:
            heard = now
        self._heard[report.node] = (report.number, heard)
        return now - heard

    def limit(self, report: NodeReport) -> float:
        return max(self._patience, _MISSING * report.every)

    def is_silent(self, report: NodeReport) -> bool:
        return self.seconds(report) > self.limit(report)


class Watch:
    """Watches the machines that a promotion has reached, from its present wave on."""

    def __init__(self, limits: HealthLimits, silence: Silence) -> None:
        self._limits = limits
        self._silence = silence
        self._began = time.monotonic()
        #: Machine -> when it was last seen to serve the version.
        self._served: dict[str, float] = {}

    def begin_wave(self) -> None:
        """The machines of another wave have their time from now on."""
        self._began = time.monotonic()

    def standings(self, waves: Waves, reports: Mapping[str, NodeReport | SpikelessError]) -> list[Standing]:
        """How each machine does, in the order of waves."""
        return [
            self._standing(waves, node, number, reports[node])
            for number, nodes in enumerate(waves.nodes, 1)
            for node in nodes
        ]

    def _standing(self, waves: Waves, node: str, wave: int, report: NodeReport | SpikelessError) -> Standing:
        if not isinstance(report, NodeReport):
            left = report.code is Code.NOT_FOUND
            return Standing(node, wave, Health.LEFT if left else Health.SILENT, str(report))
        model = report.model(waves.model)
        serves = None if model is None else model.labels.get(waves.label)
        health, text = self._judge(waves, report, model, serves)
        age = self._silence.seconds(report)
        return Standing(node, wave, health, text, serves, model, age, report.change)

    def _judge(
        self, waves: Waves, report: NodeReport, model: NodeModel | None, serves: int | None
    ) -> tuple[Health, str]:
        limits, now = self._limits, time.monotonic()
        late = now - self._began > limits.load_timeout
        silent = self._silence.seconds(report)
        # Loading takes its time; that it ends is what the load timeout is for.
        if self._silence.is_silent(report) and (late or not report.busy):
            return Health.SILENT, f"its last report is {silent:.0f} s old"
        if model is None:
            return (Health.BAD if late else Health.WAITING), f"it does not follow {waves.model}"
        if model.refused and report.change >= waves.change:
            return Health.BAD, f"it refused version {waves.version}: {model.error}"
        if serves != waves.version:
            lost = now - self._served.get(report.node, now) > self._silence.limit(report)
            why = model.error or model.states.get(waves.version) or "it is not there yet"
            if lost or late:
                since = "any more" if lost else f"after {limits.load_timeout:g} s"
                return Health.BAD, f"it does not serve version {waves.version} {since}: {why}"
            return Health.WAITING, why
        self._served[report.node] = now
        if problem := self._too_many_errors(model):
            return Health.BAD, problem
        if model.watched < limits.soak:
            if now - self._began > limits.load_timeout + limits.soak + self._silence.limit(report):
                return Health.BAD, f"it keeps starting again, watched for {model.watched:.0f} s"
            return Health.WAITING, f"watched for {model.watched:.0f} s of {limits.soak:.0f} s"
        if limits.max_p99 is not None and model.since is None:
            return (Health.BAD if late else Health.WAITING), f"it has no metrics: {model.error}"
        if problem := self._too_slow(model):
            return Health.BAD, problem
        return Health.WELL, ""

    def _too_many_errors(self, model: NodeModel) -> str:
        if model.since is None:
            return ""
        usual = 0.0 if model.before is None else model.before.error_rate
        if model.since.error_rate <= usual + self._limits.max_error_rate:
            return ""
        before = "" if model.before is None else f", {100 * usual:.2f} % before"
        return (
            f"{model.since.errors:.0f} of {model.since.requests:.0f} requests failed{before} "
            f"(--max-error-rate {100 * self._limits.max_error_rate:g}%)"
        )

    def _too_slow(self, model: NodeModel) -> str:
        limit, p99 = self._limits.max_p99, None if model.since is None else model.since.p99_ms
        if limit is None or p99 is None or p99 <= 1000 * limit:
            return ""
        return f"p99 is up to {p99:.1f} ms (--max-p99 {1000 * limit:g}ms)"


def table(standings: list[Standing]) -> str:
    """Which machine said what, for people."""
    rows = [("node", "wave", "serves", "change", "reported", "requests", "failed", "p99", "")]
    for one in standings:
        since = one.model.since if one.model is not None else None
        requests = failed = p99 = "-"
        if since is not None:
            requests, failed = f"{since.requests:.0f}", f"{since.errors:.0f}"
            p99 = "-" if since.p99_ms is None else f"{since.p99_ms:.1f} ms"
        serves = "-" if one.serves is None else str(one.serves)
        text = f"{one.health.value}: {one.text}" if one.text else one.health.value
        age = "never" if one.age is None else f"{one.age:.0f} s ago"
        change = "-" if one.change is None else str(one.change)
        rows.append((one.node, str(one.wave or "-"), serves, change, age, requests, failed, p99, text))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line.rstrip()}" for line in lines)
