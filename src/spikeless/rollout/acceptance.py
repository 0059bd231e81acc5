"""Acceptance: a loaded version is asked, compared and watched before it gets traffic.

In: the plan, the version's probes, and the servers. Out: records in the journal, or an
error as soon as the version does wrong on any server.
"""

from __future__ import annotations

from dataclasses import dataclass

from spikeless.repository.journal import Checked, Journal, Requests, Soaked, Step
from spikeless.rollout import probes
from spikeless.rollout.fleet import Fleet
from spikeless.rollout.plans import Plan
from spikeless.rollout.probes import ComparisonSettings, Pair, Probes, Remote
from spikeless.rollout.soak import SoakSettings, Watched, soak


@dataclass(frozen=True)
class Acceptance:
    """How the version of a plan is tried on all servers."""

    #: The model whose stable version it is compared with.
    name: str
    fleet: Fleet
    journal: Journal
    probes: Probes
    comparison: ComparisonSettings
    soak: SoakSettings

    def check(self, change: str, plan: Plan, step: Step) -> None:
        """Ask the version on every server; compare and watch it where the step says so.

        Raises:
            FailedPrecondition: it failed, or does worse than the stable version.
            Cancelled: the change was interrupted.
            SpikelessError: a server does not answer.
        """
        if not self.probes.requests:
            self.fleet.progress(
                f"version {plan.version} carries neither warmup records nor golden requests: "
                "all that is known of it is that it loads"
            )
        checked = [self._check_on(target, change, plan, step) for target in self.fleet.clients]
        if step.compare and self.soak.seconds:
            self._soak(change, checked)

    def _check_on(self, target: str, change: str, plan: Plan, step: Step) -> tuple[Remote, Pair | None]:
        client = self.fleet.clients[target]
        candidate = Remote(client, step.ask, plan.version)
        self.fleet.report(target, f"asking {step.ask} version {plan.version}")
        probes.check(candidate, self.probes)
        pair = comparison = None
        if step.compare and plan.stable is not None:
            stable = Remote(client, self.name, plan.stable)
            pair = Pair.of(candidate, stable, self.probes.requests, self.fleet.interrupted)
            if pair.requests:
                self.fleet.report(target, f"comparing it with version {plan.stable}")
                comparison = pair.compare(self.comparison)
        self.fleet.check_interrupted()
        self.journal.append(
            Checked(
                change,
                target,
                step.ask,
                len(self.probes.requests),
                candidate=None if comparison is None else comparison.candidate.summary(),
                stable=None if comparison is None else comparison.stable.summary(),
            )
        )
        return candidate, pair

    def _soak(self, change: str, checked: list[tuple[Remote, Pair | None]]) -> None:
        watched = [Watched(candidate, pair, self.soak, self.comparison) for candidate, pair in checked]
        self.fleet.progress(f"soaking for {self.soak.seconds:g} s")
        soak(watched, self.soak, self.fleet.progress, self.fleet.interrupted)
        self.fleet.check_interrupted()
        for target, one in zip(self.fleet.clients, watched, strict=True):
            seen, traffic = one.seen, Requests(one.traffic.requests, one.traffic.errors)
            self.journal.append(
                Soaked(change, target, seen.candidate.summary(), seen.stable.summary(), traffic)
            )
