"""Promotion: which version of a model its callers get, changed so that no caller notices.

In: a repository (`spikeless.repository`), its ``models.config``, and the servers that serve it. Out: the
same with another version behind a label, or everything as it was and an error.

Each state of a plan (`plans`) is written to ``models.config`` before servers are told, so that a
server which restarts in between serves what was reached by then. The whole plan is in the journal before its
first state is written. A promotion that was killed is therefore resumed by the same command, and undone by a
rollback.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spikeless.disk.locks import model_lock
from spikeless.errors import Cancelled, FailedPrecondition, Internal, NotFound, SpikelessError
from spikeless.formats.states import State
from spikeless.repository import models_config, publishing
from spikeless.repository.checks import check_files
from spikeless.repository.journal import Journal
from spikeless.repository.models_config import STABLE, ModelsConfig, model_in, new_block
from spikeless.rollout import plans, probes
from spikeless.rollout.fleet import Fleet, FleetSettings, Progress
from spikeless.rollout.plans import CANARY_SUFFIX, Blocks, Plan, Step
from spikeless.rollout.probes import ComparisonSettings, Probes, Remote
from spikeless.rollout.soak import SoakSettings, Watched, soak


@dataclass(frozen=True)
class PromotionSettings:
    """How a version is promoted.

    label: the label that moves.
    canary: stop when the version is served as ``<name>-canary``; nothing else changes.
    keep_previous: leave the version that was stable loaded, so that a rollback takes no time.
    takes_unlabelled: let a version be loaded that is higher than the stable one, although it takes the
        requests that name no label.
    serving_root: where the servers see the repository; by default where other models in ``models.config``
        are, or where it is here.
    comparison, soak: how the candidate is compared with the stable version, and how long it is watched.
    reason: goes into the journal.
    """

    label: str = STABLE
    canary: bool = False
    keep_previous: bool = True
    takes_unlabelled: bool = False
    serving_root: str | None = None
    comparison: ComparisonSettings = field(default_factory=ComparisonSettings)
    soak: SoakSettings = field(default_factory=SoakSettings)
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a command changed. `previous` is the version that the label pointed at before, if at any."""

    name: str
    label: str
    version: int
    previous: int | None
    result: str

    def __str__(self) -> str:
        if self.result == plans.CANARY:
            return f"{self.name}: version {self.version} is served as {self.name}{CANARY_SUFFIX}"
        if self.result == plans.ENDED:
            return f"{self.name}: {self.name}{CANARY_SUFFIX} is not served any more"
        if self.result == plans.UNDONE:
            return f"{self.name}: everything is as it was before the promotion of version {self.version}"
        was = "" if self.previous in (None, self.version) else f" (it was {self.previous})"
        return f"{self.name}: {self.label} is version {self.version}{was}"


class PromotionError(SpikelessError):
    """A promotion or rollback that failed; the message says how things stand now."""

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
) -> Outcome:
    """Give callers another version of a model, after it has been checked on the servers.

    Args:
        interrupted: when it is set, the promotion ends and everything is put back.

    Raises:
        NotFound: there is no such version on disk.
        InvalidArgument, FailedPrecondition: it cannot be promoted; nothing was changed.
        PromotionError: a step failed; everything was put back, or the message says what could not be.
    """
    settings = settings or PromotionSettings()
    known = publishing.versions(models, name)
    if version not in known:
        numbers = ", ".join(map(str, known)) or "none"
        raise NotFound(f"{Path(models, name)} has no version {version}; there is: {numbers}")
    check_files(known[version])
    asked = probes.of_version(known[version])
    interrupted = interrupted or threading.Event()
    with _Change.begin(models, name, fleet, settings, progress, interrupted, wait=True) as change:
        before = change.unfinished_states[0] if change.was(plans.PROMOTE) else change.latest
        change.check_servers()
        plan = plans.promotion(
            change.model(before),
            version,
            settings.label,
            canary=settings.canary,
            keep_previous=settings.keep_previous,
            takes_unlabelled=settings.takes_unlabelled,
        )
        return change.make(plan, asked)


def rollback(
    models: str | os.PathLike[str],
    name: str,
    fleet: FleetSettings,
    *,
    version: int | None = None,
    label: str = STABLE,
    canary: bool = False,
    reason: str = "",
    progress: Progress = lambda line: None,
    interrupted: threading.Event | None = None,
) -> Outcome:
    """Give callers the version from before the last promotion, or undo a promotion that was cut short.

    Repeated, it changes nothing more. All servers are told, whichever of them fail.

    Args:
        version: the version to go back to; by default the one that the label pointed at before.
        canary: take ``<name>-canary`` out of service instead; the label stays.

    Raises:
        NotFound: there is no version to go back to.
        FailedPrecondition: a promotion is running.
        PromotionError: a server could not be brought back; ``models.config`` has the earlier version.
    """
    settings = PromotionSettings(label=label, reason=reason)
    interrupted = interrupted or threading.Event()
    with _Change.begin(models, name, fleet, settings, progress, interrupted, wait=False) as change:
        if canary:
            return change.make(plans.end_canary(change.model(change.latest)))
        if change.unfinished is not None and change.was(plans.PROMOTE) and version is None:
            return change.make(plans.undo(change.unfinished))
        before = change.unfinished_states[0] if change.unfinished is not None else change.latest
        model = change.model(before)
        if label not in model.labels:
            raise NotFound(f"{name} has no label {label} in {Path(models, models_config.FILE_NAME)}")
        target = change.version_before(model.labels[label]) if version is None else version
        if target not in change.versions:
            raise NotFound(f"version {target} is not in {Path(models, name)} any more")
        return change.make(plans.rollback(model, target, label))


class _Change:
    """A change of one model that nobody else is changing."""

    def __init__(
        self,
        models: Path,
        name: str,
        fleet: Fleet,
        settings: PromotionSettings,
        progress: Progress,
        interrupted: threading.Event,
    ) -> None:
        self.models = models
        self.name = name
        self.versions = publishing.versions(models, name)
        self._journal = Journal(models / name / publishing.STATE_DIRECTORY)
        self._fleet = fleet
        self._settings = settings
        self._progress = progress
        self._interrupted = interrupted
        self._identity = secrets.token_hex(8)
        config = models_config.read(models)
        self._check_canary_name(config)
        #: What models.config says now.
        self.latest: Blocks = {name: config.block(name) for name in (name, name + CANARY_SUFFIX)}
        #: The record of a change that was cut short, when models.config is where that left it.
        self.unfinished: Mapping[str, Any] | None = None
        self.unfinished_states: list[Blocks] = []
        self._find_unfinished()

    @classmethod
    @contextmanager
    def begin(
        cls,
        models: str | os.PathLike[str],
        name: str,
        fleet: FleetSettings,
        settings: PromotionSettings,
        progress: Progress,
        interrupted: threading.Event,
        wait: bool,
    ) -> Iterator[_Change]:
        """Hold the model's lock, and connections to the servers, for as long as this lasts."""
        models = Path(models)
        if not publishing.versions(models, name):
            raise NotFound(f"{models / name} has no versions: publish one first")
        state = models / name / publishing.STATE_DIRECTORY
        lock = model_lock(state, name, wait=wait, progress=progress, interrupted=interrupted)
        with lock, Fleet(models, fleet, progress, interrupted) as servers:
            yield cls(models, name, servers, settings, progress, interrupted)

    # --- how things stand ---------------------------------------------------------------------------

    def _find_unfinished(self) -> None:
        record = self._journal.unfinished()
        if record is None:
            return
        what = f"a {record['action']} to version {record['version']} was cut short"
        states = [step["blocks"] for step in record["steps"]]
        if self.latest in states:
            self._progress(f"{what}: going on from there")
            self.unfinished, self.unfinished_states = record, states
        else:
            self._progress(f"{what}, but models.config was edited since: that counts")

    def was(self, action: str) -> bool:
        """Whether a change of that kind was cut short."""
        return self.unfinished is not None and self.unfinished["action"] == action

    def _check_canary_name(self, config: ModelsConfig) -> None:
        canary = self.name + CANARY_SUFFIX
        own, other = config.model(self.name), config.model(canary)
        paths = {model.base_path for model in (own, other) if model is not None}
        if (self.models / canary).exists() or len(paths) > 1:
            raise FailedPrecondition(
                f"{canary} is another model, but candidates of {self.name} need its name"
            )

    def check_servers(self) -> None:
        """Every server answers, and serves no model of this repository that a reload would unload."""
        self._fleet.statuses(self.name)
        listed = models_config.read(self.models).names
        known = {path.name for path in self.models.iterdir() if path.is_dir() and path.name[0] != "."}
        for name in sorted(known - set(listed)):
            for target, statuses in self._fleet.statuses(name).items():
                if any(status.state is State.AVAILABLE for status in statuses):
                    entry = ModelsConfig().with_block(name, new_block(name, self._base_path(name))).text
                    raise FailedPrecondition(
                        f"{target} serves {name}, but {self.models / models_config.FILE_NAME} does not list "
                        f"it, and a reload would unload it: start servers with --model_config_file, or add\n"
                        f"{entry}"
                    )

    def model(self, before: Blocks) -> plans.Model:
        """The model as it was when models.config said ``before``."""
        return plans.Model(self.name, before, self._served(before), self._base_path(self.name))

    def _served(self, before: Blocks) -> frozenset[int]:
        block = before[self.name]
        if block is None:
            return frozenset()
        policy = model_in(block).model_version_policy
        if policy.HasField("specific"):
            return frozenset(policy.specific.versions)
        # The policy is to serve the latest: what that is, servers know.
        return frozenset(
            status.version
            for statuses in self._fleet.statuses(self.name).values()
            for status in statuses
            if status.state is State.AVAILABLE
        )

    def _base_path(self, name: str) -> str:
        root = self._settings.serving_root
        if root is None:
            for model in models_config.read(self.models).message.model_config_list.config:
                if Path(model.base_path).name == model.name:
                    root = str(Path(model.base_path).parent)
                    break
        return f"{root or self.models.resolve()}/{name}"

    def version_before(self, now: int) -> int:
        """The version to roll back to when the label points at ``now``."""
        known = plans.version_before(self._journal.records(), self._settings.label, now)
        if known is not None:
            return known
        lower = [number for number in self.versions if number < now]
        if not lower:
            raise NotFound(f"{self.name} has no version before {now}")
        return max(lower)

    # --- carrying out -------------------------------------------------------------------------------

    def make(self, plan: Plan, asked: Probes | None = None) -> Outcome:
        """Carry a plan out, from where it was cut short if it was; put everything back when it fails."""
        outcome = Outcome(self.name, plan.label, plan.version, plan.previous, plan.result)
        if self.unfinished is None and not plan.changes:
            # That servers do what the file says is made sure of all the same.
            self._fleet.bring(plan.states[-1])
            return Outcome(self.name, plan.label, plan.version, plan.previous, plans.UNCHANGED)
        start = 1
        if self.unfinished_states == plan.states and self.was(plan.action):
            start = max(1, plan.states.index(self.latest))
        self._journal.append(
            "begin",
            id=self._identity,
            action=plan.action,
            version=plan.version,
            label=plan.label,
            previous=plan.previous,
            reason=self._settings.reason,
            servers=list(self._fleet.clients),
            steps=[asdict(step) for step in plan.steps],
        )
        try:
            for step in plan.steps[start:]:
                self._check_interrupted()
                self._progress(step.title)
                self._take(plan, step, asked or Probes())
            self._journal.append("end", id=self._identity, result=plan.result)
        except Exception as error:
            cause = error if isinstance(error, SpikelessError) else Internal(repr(error))
            standing = self._put_back(plan, cause)
            raise PromotionError(cause, standing) from error
        return outcome

    def _take(self, plan: Plan, step: Step, asked: Probes) -> None:
        if plan.action == plans.ROLLBACK and step is plan.steps[-1]:
            self._force(step)
            return
        models_config.edit(self.models, step.blocks)
        self._fleet.bring(step.blocks, staggered=step.loads)
        if step.ask:
            self._check(plan, step, asked)

    def _force(self, step: Step) -> None:
        """Bring back as many servers as there are, even where the file cannot be written."""
        _all_of(
            lambda: models_config.edit(self.models, step.blocks),
            lambda: self._fleet.bring(step.blocks, keep_going=True),
        )

    def _check(self, plan: Plan, step: Step, asked: Probes) -> None:
        """Ask the version on every server, compare it with the stable one, and watch it."""
        if not asked.requests:
            self._progress(
                f"version {plan.version} carries neither warmup records nor golden requests: "
                "all that is known of it is that it loads"
            )
        settings = self._settings
        watched = []
        for target, client in self._fleet.clients.items():
            candidate = Remote(client, step.ask, plan.version)
            self._fleet.say(target, f"asking {step.ask} version {plan.version}")
            probes.check(candidate, asked)
            results: dict[str, Any] = {"requests": len(asked.requests)}
            if step.compare:
                stable = None if plan.stable is None else Remote(client, self.name, plan.stable)
                requests = [] if stable is None else probes.suited(stable, asked.requests)
                if stable is not None and requests:
                    self._fleet.say(target, f"comparing it with version {plan.stable}")
                    comparison = probes.compare(
                        candidate, stable, requests, settings.comparison, self._interrupted
                    )
                    results |= comparison.summary()
                if settings.soak.seconds:
                    watched.append(
                        Watched(
                            candidate,
                            stable,
                            requests,
                            settings.soak,
                            settings.comparison,
                            self._interrupted,
                        )
                    )
            self._check_interrupted()
            self._journal.append("check", id=self._identity, server=target, servable=step.ask, **results)
        if watched:
            self._progress(f"soaking for {settings.soak.seconds:g} s")
            seen = soak(watched, settings.soak, self._progress, self._interrupted)
            self._check_interrupted()
            for target, results in zip(self._fleet.clients, seen, strict=True):
                self._journal.append("soak", id=self._identity, server=target, **results)

    def _check_interrupted(self) -> None:
        if self._interrupted.is_set():
            raise Cancelled("interrupted")

    def _put_back(self, plan: Plan, cause: SpikelessError) -> str:
        """Undo what was done, and say how things stand."""
        if plan.action == plans.ROLLBACK and plan.current(models_config.read(self.models)) == plan.states[-1]:
            # Better some servers on the earlier version than none.
            return (
                "models.config says what it should; repeat the rollback, or restart the servers that failed"
            )
        self._progress("failed: putting everything back as it was")
        self._interrupted.clear()
        try:
            _all_of(
                lambda: models_config.edit(self.models, plan.states[0]),
                lambda: self._fleet.bring(plan.states[0], keep_going=True),
            )
            self._journal.append("end", id=self._identity, result=plans.PUT_BACK, error=str(cause))
        except SpikelessError as error:
            return (
                f"not everything could be put back: {error}\n"
                f"when that is mended, `spikeless rollback {self.name}` or the same command finishes the job"
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
