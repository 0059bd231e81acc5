"""Execution: a plan is carried out step by step, or everything is put back.

In: a plan and the situation that it was made for. Out: ``models.config`` and all
servers in the plan's last state, or in its first one.

The whole plan is in the journal before its first state is written, and each state is in
``models.config`` before servers are reloaded: a server that restarts in between serves
what was reached by then.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from spikeless.errors import SpikelessError
from spikeless.repository import models_config
from spikeless.repository.journal import ChangeBegun, ChangeEnded, Step
from spikeless.rollout import plans
from spikeless.rollout.acceptance import Acceptance
from spikeless.rollout.plans import Plan
from spikeless.rollout.situation import Situation


@dataclass
class Execution:
    """One plan on its way."""

    plan: Plan
    found: Situation
    acceptance: Acceptance
    #: Identifies the change in the journal.
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    _reached: Step | None = field(default=None, init=False)

    def begin(self, reason: str) -> None:
        """Write the plan into the journal."""
        plan = self.plan
        self.found.journal.append(
            ChangeBegun(
                self.id,
                plan.action,
                plan.version,
                plan.label,
                plan.previous,
                reason,
                servers=tuple(self.found.fleet.clients),
                steps=plan.steps,
            )
        )

    def run(self) -> None:
        """Take all steps, from where the same plan was cut short if it was."""
        for step in self.plan.steps[self._start() :]:
            self.found.fleet.check_interrupted()
            self.found.fleet.progress(step.title)
            self._reached = step
            self._apply(step)
        self.found.journal.append(ChangeEnded(self.id, self.plan.result))

    def _start(self) -> int:
        unfinished, states = self.found.unfinished, self.plan.states
        if unfinished is None or unfinished.action != self.plan.action or unfinished.states != states:
            return 1
        return max(1, states.index(self.found.current))

    def _apply(self, step: Step) -> None:
        if self.plan.action == plans.ROLLBACK and step is self.plan.steps[-1]:
            self._force(step)
            return
        models_config.edit(self.found.models, step.blocks)
        self.found.fleet.apply(step.blocks, staggered=step.loads)
        if step.ask:
            self.acceptance.check(self.id, self.plan, step)

    def _force(self, step: Step) -> None:
        """Apply a step on every server, even where the file cannot be written."""
        _all_of(
            lambda: models_config.edit(self.found.models, step.blocks),
            lambda: self.found.fleet.apply(step.blocks, keep_going=True),
        )

    def put_back(self, cause: SpikelessError) -> str:
        """Undo what was done because of ``cause``, and describe the result."""
        plan, found = self.plan, self.found
        now = plan.current(models_config.read(found.models))
        # Better some servers on the earlier version than none.
        if plan.action == plans.ROLLBACK and now == plan.states[-1]:
            return (
                "models.config says what it should; repeat the rollback, or restart the servers that failed"
            )
        if plan.action == plans.ROLLBACK and self._reached is plan.steps[-1]:
            return (
                "servers that answer were rolled back all the same, until they restart: models.config says "
                "what it said before; when it can be written, repeat the rollback"
            )
        found.fleet.progress("failed: putting everything back as it was")
        found.fleet.interrupted.clear()
        try:
            self._force(plan.steps[0])
            found.journal.append(ChangeEnded(self.id, plans.PUT_BACK, error=str(cause)))
        except SpikelessError as error:
            return (
                f"not everything could be put back: {error}\n"
                f"when that is mended, `spikeless rollback {found.name}` or the same command finishes the job"
            )
        return "everything is as it was"


def _all_of(*actions: Callable[[], object]) -> None:
    """Do everything, and raise the first error only then."""
    first: SpikelessError | None = None
    for action in actions:
        try:
            action()
        except SpikelessError as error:
            first = first or error
    if first is not None:
        raise first
