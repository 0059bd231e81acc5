"""Promotion: callers get another version of a model, and none notices.

In: a repository (`spikeless.repository`), its ``models.config``, and the servers that
serve it. Out: the same with another version behind a label, or everything as it was and
an error.

A change finds the situation (`situation`), makes a plan for it (`plans`) and executes
it (`execution`), which tries the version on every server (`acceptance`). The same
command resumes a promotion that was killed, and a rollback undoes it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from spikeless.disk.locks import model_lock
from spikeless.errors import Code, Internal, NotFound, SpikelessError
from spikeless.repository import layout, models_config
from spikeless.repository.checks import check_files
from spikeless.repository.models_config import STABLE
from spikeless.rollout import plans, probes, situation
from spikeless.rollout.acceptance import Acceptance
from spikeless.rollout.execution import Execution
from spikeless.rollout.fleet import Fleet, FleetSettings, Progress
from spikeless.rollout.plans import CANARY_SUFFIX, Plan
from spikeless.rollout.probes import ComparisonSettings, Probes
from spikeless.rollout.situation import Situation
from spikeless.rollout.soak import SoakSettings


@dataclass(frozen=True)
class PromotionSettings:
    """How a version is promoted."""

    #: The label that moves.
    label: str = STABLE
    #: Stop when the version is served as ``<name>-canary``; nothing else changes.
    canary: bool = False
    #: Leave the version that was stable loaded, so that a rollback takes no time.
    keep_previous: bool = True
    #: Let a version be loaded that is higher than the stable one, although it gets the
    #: requests that name no label.
    takes_unlabelled: bool = False
    #: Where servers see the repository; by default where other models in
    #: ``models.config`` are, or where it is here.
    serving_root: str | None = None
    #: How the candidate is compared with the stable version.
    comparison: ComparisonSettings = field(default_factory=ComparisonSettings)
    #: How long it is watched.
    soak: SoakSettings = field(default_factory=SoakSettings)
    #: Goes into the journal.
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a command changed."""

    name: str
    label: str
    version: int
    #: The version that the label pointed at before.
    previous: int | None
    result: str
    #: Whether it is the canary.
    canary: bool = False
    #: What would be done, one step after the other, in a dry run.
    steps: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.result == plans.DRY_RUN:
            return "\n".join([f"{self.name}: nothing was changed; without --dry-run:", *self.steps])
        if self.canary:
            already = " already" if self.result == plans.UNCHANGED else ""
            return f"{self.name}: version {self.version} is served as {self.name}{CANARY_SUFFIX}{already}"
        if self.result == plans.ENDED:
            return f"{self.name}: {self.name}{CANARY_SUFFIX} is not served any more"
        if self.result == plans.UNDONE:
            return f"{self.name}: everything is as it was before the promotion of version {self.version}"
        was = "" if self.previous in (None, self.version) else f" (it was {self.previous})"
        return f"{self.name}: {self.label} is version {self.version}{was}"


#: Errors of a promotion that may be gone the next time.
PASSING = (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.CANCELLED)


class PromotionError(SpikelessError):
    """A promotion or rollback that failed; the message says what was put back."""

    def __init__(self, cause: SpikelessError, standing: str) -> None:
        super().__init__(f"{cause}\n{standing}")
        self.code = cause.code


def promote(
    models: str | os.PathLike[str],
    name: str,
    version: int,
    fleet: FleetSettings,
    settings: PromotionSettings | None = None,
    progress: Progress = lambda line: None,
    interrupted: threading.Event | None = None,
    *,
    dry_run: bool = False,
) -> Outcome:
    """Give callers another version of a model, after checking it on the servers.

    Args:
        interrupted: when it is set, the promotion ends and everything is put back.
        dry_run: change nothing; the outcome has the steps.

    Raises:
        NotFound: there is no such version on disk.
        InvalidArgument, FailedPrecondition: it cannot be promoted; nothing was changed.
        PromotionError: a step failed; everything was put back, or the message says what
            could not be.
    """
    settings = settings or PromotionSettings()
    known = layout.versions(models, name)
    if version not in known:
        numbers = f"; there is: {', '.join(map(str, known)) or 'none'}"
        similar = "" if known else layout.similar_name(Path(models), name)
        raise NotFound(f"{Path(models, name)} has no version {version}{similar or numbers}")
    check_files(known[version])
    asked = probes.of_version(known[version])
    with _alone(models, name, fleet, settings.serving_root, progress, interrupted, wait=True) as found:
        found.check_servers()
        found.check_paths(version)
        found = found.listed(write=not dry_run)
        before = found.before(unfinished=found.was_cut_short(plans.PROMOTE))
        plan = plans.promotion(
            found.without_failed(before),
            version,
            settings.label,
            canary=settings.canary,
            keep_previous=settings.keep_previous,
            takes_unlabelled=settings.takes_unlabelled,
        )
        return _carry_out(plan, found, settings, asked, dry_run=dry_run)


def rollback(
    models: str | os.PathLike[str],
    name: str,
    fleet: FleetSettings,
    *,
    version: int | None = None,
    label: str = STABLE,
    canary: bool = False,
    reason: str = "",
    dry_run: bool = False,
    progress: Progress = lambda line: None,
    interrupted: threading.Event | None = None,
) -> Outcome:
    """Give callers the version from before the last promotion.

    A promotion that was cut short is undone. Repeated, a rollback changes nothing more.
    All servers are reloaded, even when some of them fail.

    Args:
        version: the version to go back to; by default the one that the label pointed at
            before.
        canary: take ``<name>-canary`` out of service instead; the label stays.
        dry_run: change nothing; the outcome has the steps.

    Raises:
        NotFound: there is no version to go back to.
        FailedPrecondition: a promotion is running.
        PromotionError: a server could not be rolled back; ``models.config`` has the
            earlier version.
    """
    settings = PromotionSettings(label=label, reason=reason)
    with _alone(models, name, fleet, None, progress, interrupted, wait=False) as found:
        if canary:
            plan = plans.end_canary(found.before(unfinished=False))
            return _carry_out(plan, found, settings, dry_run=dry_run)
        unfinished = found.unfinished
        if unfinished is not None and unfinished.action == plans.PROMOTE and version is None:
            return _carry_out(plans.undo(unfinished), found, settings, dry_run=dry_run)
        found.check_paths()
        model = found.before(unfinished=True)
        if label not in model.labels:
            raise NotFound(f"{name} has no label {label} in {Path(models, models_config.FILE_NAME)}")
        target = found.version_before(label, model.labels[label]) if version is None else version
        if target not in found.versions:
            raise NotFound(f"version {target} is not in {Path(models, name)} any more")
        plan = plans.rollback(model, target, label)
        return _carry_out(plan, found, settings, dry_run=dry_run)


@contextmanager
def _alone(
    models: str | os.PathLike[str],
    name: str,
    fleet: FleetSettings,
    serving_root: str | None,
    progress: Progress,
    interrupted: threading.Event | None,
    wait: bool,
) -> Iterator[Situation]:
    """Hold the model's lock and connections to the servers in the block."""
    models = Path(models)
    if not layout.versions(models, name):
        raise NotFound(
            f"{models / name} has no versions: publish one first{layout.similar_name(models, name)}"
        )
    state = layout.state_directory(models, name)
    lock = model_lock(state, name, wait=wait, progress=progress, interrupted=interrupted)
    with lock, Fleet(models, fleet, progress, interrupted) as servers:
        yield situation.find(models, name, servers, serving_root)


def _carry_out(
    plan: Plan,
    found: Situation,
    settings: PromotionSettings,
    asked: Probes | None = None,
    *,
    dry_run: bool,
) -> Outcome:
    """Carry a plan out; put everything back when it fails."""
    result = plan.result
    if dry_run:
        steps = tuple(step.title for step in plan.steps[1:])
        return Outcome(found.name, plan.label, plan.version, plan.previous, plans.DRY_RUN, steps=steps)
    if found.unfinished is None and not plan.changes:
        # Servers may still differ from what models.config says.
        found.fleet.apply(plan.states[-1])
        result = plans.UNCHANGED
    else:
        acceptance = Acceptance(
            found.name, found.fleet, found.journal, asked or Probes(), settings.comparison, settings.soak
        )
        execution = Execution(plan, found, acceptance)
        execution.begin(settings.reason)
        try:
            execution.run()
        except Exception as error:
            cause = error if isinstance(error, SpikelessError) else Internal(repr(error))
            raise PromotionError(cause, execution.put_back(cause)) from error
    canary = plan.result == plans.CANARY
    return Outcome(found.name, plan.label, plan.version, plan.previous, result, canary)
