"""Promotion through a store: which versions a fleet serves, for every puller to find.

In: a store, a model, and the version that callers are to get. Out: a change of the
fleet's ``models.config`` in the store (`spikeless.store.changes`), for all machines at
once. `spikeless.store.waves` goes through them one part after the other.
"""

from __future__ import annotations

import datetime
import threading
from dataclasses import dataclass, field
from typing import Literal

from spikeless.errors import FailedPrecondition, InvalidArgument, NotFound
from spikeless.repository import models_config
from spikeless.repository.models_config import STABLE, ModelsConfig, new_block, with_versions
from spikeless.rollout import plans
from spikeless.rollout.promotion import Outcome
from spikeless.store.catalog import Catalog, of_version
from spikeless.store.changes import ROUNDS, Change, Changes, Waves, after, labels, pinned
from spikeless.store.objects import Store
from spikeless.store.push import SERVING_ROOT

__all__ = ["Promoted", "labels", "moved", "pinned", "promote", "read", "rollback", "token"]


@dataclass(frozen=True)
class Promoted:
    """What is promoted in a store."""

    #: For machines that no wave has reached.
    config: ModelsConfig = field(default_factory=ModelsConfig)
    #: The number of the last change; 0 where it is not known.
    change: int = 0
    #: The promotions that go on in waves.
    waves: tuple[Waves, ...] = ()

    def of(self, node: str) -> ModelsConfig:
        """The ``models.config`` of one machine."""
        config = self.config
        for each in self.waves:
            if each.wave_of(node):
                config = config.with_block(each.model, each.block)
        return config

    def wave_of(self, node: str, model: str) -> int:
        """The wave of a promotion of a model that a machine is in; 0 for none."""
        return next((each.wave_of(node) for each in self.waves if each.model == model), 0)


def promote(
    store: str,
    name: str,
    version: int,
    *,
    label: str = STABLE,
    reason: str = "",
    dry_run: bool = False,
    interrupted: threading.Event | None = None,
) -> Outcome:
    """Let a whole fleet give callers another version, which is in the store.

    Every machine that follows the store pulls and promotes it.

    Args:
        store: the URL of the store.
        interrupted: set it to end early.
        dry_run: change nothing; the outcome has the steps.

    Raises:
        NotFound: the store has no such version.
        FailedPrecondition: requests that name no label would reach another version than
            the stable one, or a promotion of the model goes on in waves; nothing was
            changed.
        Unavailable: the store fails, or others change it all the time.
    """
    move = _Move(Store(store, None, interrupted), name, label, reason, dry_run)
    return move.make("promote", version)


def rollback(
    store: str,
    name: str,
    *,
    version: int | None = None,
    label: str = STABLE,
    reason: str = "",
    dry_run: bool = False,
    interrupted: threading.Event | None = None,
) -> Outcome:
    """Let a whole fleet give callers the version from before the last promotion.

    A promotion that goes on in waves ends: its machines return. Repeated, it changes
    nothing more; ``version`` goes further back. Other arguments are those of `promote`.

    Raises:
        NotFound: the label is nowhere, or there is no version to go back to.
        InvalidArgument: the version is a later one.
        FailedPrecondition, Unavailable: as for `promote`.
    """
    move = _Move(Store(store, None, interrupted), name, label, reason, dry_run)
    return move.make("rollback", version)


def token(store: Store) -> str:
    """What changes when the fleet's ``models.config`` does; empty without one."""
    try:
        return store.token(models_config.FILE_NAME)
    except NotFound:
        return ""


def read(store: Store) -> Promoted:
    """What is promoted; nothing where nothing ever was.

    Raises:
        DataLoss: it cannot be used. Unavailable: the store does not answer.
    """
    try:
        config, change = Changes(store).published()
    except NotFound:
        return Promoted()
    return Promoted(config) if change is None else Promoted(config, change.number, change.waves)


def moved(config: ModelsConfig, name: str, label: str, version: int) -> ModelsConfig:
    """A fleet's ``models.config`` with a label of a model at another version.

    Raises:
        FailedPrecondition: requests that name no label would reach another version than
            the stable one.
    """
    wanted = labels(config, name) | {label: version}
    plans.check_none_above(name, wanted, wanted.get(STABLE, max(wanted.values())))
    block = config.block(name) or new_block(name, f"{SERVING_ROOT}/{name}")
    return config.with_block(name, with_versions(block, set(wanted.values()), wanted))


def in_waves(waves: Waves) -> FailedPrecondition:
    """The error where a model is in waves: by whom, since when, and what to do."""
    began = datetime.datetime.fromtimestamp(waves.time, datetime.timezone.utc)
    return FailedPrecondition(
        f"{waves.label} of {waves.model} goes to version {waves.version} in waves, begun by {waves.user} on "
        f"{waves.host} at {began:%Y-%m-%d %H:%M} UTC, wave {len(waves.nodes)} so far: wait for it, "
        f"resume it by the same command, or end it with `spikeless rollback {waves.model} --store`"
    )


class _Move:
    """The next change of a label of a model, on all machines."""

    def __init__(self, store: Store, name: str, label: str, reason: str, dry_run: bool) -> None:
        self._store = store
        self._changes = Changes(store)
        self._catalog = Catalog(store, name)
        self._name = name
        self._label = label
        self._reason = reason
        self._dry_run = dry_run

    def make(self, action: Literal["promote", "rollback"], version: int | None) -> Outcome:
        """Move the label, and record it."""
        for _ in range(ROUNDS):
            last = self._changes.last()
            config = self._changes.config_of(last)
            waves = last.waves_of(self._name) if last is not None else None
            if waves is not None and (action == "promote" or waves.label != self._label):
                raise in_waves(waves)
            previous = labels(config, self._name).get(self._label) if waves is None else waves.version
            if version is not None:
                target = version
            else:
                target = self._before(last, previous) if waves is None else waves.previous
            if action == "rollback":
                if previous is None:
                    raise NotFound(f"{self._store.shown} has no label {self._label} of {self._name}")
                if target > previous or (waves is not None and target == previous):
                    raise InvalidArgument(
                        f"{self._label} of {self._name} is version {previous}; to go on to {target}, "
                        "promote it"
                    )
            of_version(self._catalog.index(), target, self._store.shown)
            if self._dry_run:
                step = f"moving {self._label} to version {target} in {self._store.shown}"
                steps = () if target == previous else (step,)
                return Outcome(self._name, self._label, target, previous, plans.DRY_RUN, steps=steps)
            if target == previous:
                self._changes.publish()
                return Outcome(self._name, self._label, target, previous, plans.UNCHANGED)
            change = after(
                last,
                action=action,
                model=self._name,
                label=self._label,
                version=target,
                previous=previous,
                reason=self._reason,
                config=moved(config, self._name, self._label, target).text,
                waves=() if last is None else tuple(each for each in last.waves if each != waves),
            )
            if self._changes.add(change):
                result = plans.PROMOTED if action == "promote" else plans.ROLLED_BACK
                return Outcome(self._name, self._label, target, previous, result)
        raise self._changes.busy()

    def _before(self, last: Change | None, now: int | None) -> int:
        """The version to roll back to: after a rollback, the one that is there."""
        for change in self._changes.backwards(last):
            moves = change.action != "wave" and (change.model, change.label) == (self._name, self._label)
            if moves and change.version == now:
                found = change.version if change.action == "rollback" else change.previous
                if found is not None:
                    return found
                break
        raise NotFound(
            f"{self._store.shown} knows no earlier {self._label} of {self._name}: name it with --to"
        )
