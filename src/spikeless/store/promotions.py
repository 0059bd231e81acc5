"""Promotion through a store: which versions a fleet serves, for every puller to find.

In: a store, a model, and the version that callers are to get. Out: the fleet's
``models.config`` in the store, and a record of the change:

    <store>/models.config        what pullers poll: versions and labels of the models
    <store>/.promotions/<n>.json one record for each change, with the whole of it

A record is written where none is, so of two changes at once the second begins again
from what the first made of it. The last record counts, and ``models.config`` is its
copy: a change that was cut short between the two is completed by the next one.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Literal

import msgspec

from spikeless.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SpikelessError,
    Unavailable,
)
from spikeless.formats.versions import MAX_VERSION
from spikeless.repository import journal, models_config
from spikeless.repository.models_config import STABLE, ModelsConfig, new_block, with_versions
from spikeless.rollout import plans
from spikeless.rollout.promotion import Outcome
from spikeless.store.catalog import Catalog, of_version
from spikeless.store.objects import Store
from spikeless.store.push import SERVING_ROOT

_FOLDER = ".promotions"
_SUFFIX = ".json"
_FORMAT = 1
_MAX_CONFIG_BYTES = 1 << 20
#: A record holds the configuration, escaped.
_MAX_RECORD_BYTES = 4 << 20
#: Times that a change begins again before others are said to be in the way.
_ROUNDS = 20

_Version = Annotated[int, msgspec.Meta(ge=0, le=MAX_VERSION)]
_Text = Annotated[str, msgspec.Meta(max_length=1024)]


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One change of what a fleet serves."""

    format: int
    #: From 1, without gaps.
    number: int
    action: Literal["promote", "rollback"]
    model: _Text
    label: _Text
    version: _Version
    #: The version that the label pointed at before.
    previous: _Version | None
    reason: _Text
    #: Who made it, where, and when, in seconds since 1970.
    user: _Text
    host: _Text
    time: float
    #: The text of ``models.config`` after it.
    config: str


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
            the stable one; nothing was changed.
        Unavailable: the store fails, or others change it all the time.
    """
    changes = _Changes(Store(store, None, interrupted), name, label, reason, dry_run)
    return changes.change("promote", version)


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

    Repeated, it changes nothing more; ``version`` goes further back. Other arguments
    are those of `promote`.

    Raises:
        NotFound: the label is nowhere, or there is no version to go back to.
        InvalidArgument: the version is a later one.
        FailedPrecondition, Unavailable: as for `promote`.
    """
    changes = _Changes(Store(store, None, interrupted), name, label, reason, dry_run)
    return changes.change("rollback", version)


def token(store: Store) -> str:
    """What changes when the fleet's ``models.config`` does; empty without one."""
    try:
        return store.token(models_config.FILE_NAME)
    except NotFound:
        return ""


def read(store: Store) -> ModelsConfig:
    """The fleet's ``models.config``; an empty one where nothing was promoted.

    Every model in it has versions, and labels that point at them.

    Raises:
        DataLoss: it cannot be used. Unavailable: the store does not answer.
    """
    try:
        data = store.read(models_config.FILE_NAME, _MAX_CONFIG_BYTES)
    except NotFound:
        return ModelsConfig()
    return _parse(data, store.show(models_config.FILE_NAME))


def pinned(config: ModelsConfig, name: str) -> list[int]:
    """The versions of a model that a fleet serves."""
    model = config.model(name)
    return [] if model is None else sorted(model.model_version_policy.specific.versions)


def labels(config: ModelsConfig, name: str) -> dict[str, int]:
    """The labels of a model, and the versions at which they point."""
    model = config.model(name)
    return {} if model is None else dict(model.version_labels)


def _parse(data: bytes, where: str) -> ModelsConfig:
    try:
        config = models_config.parse(data.decode())
        for name in config.names:
            versions = pinned(config, name)
            if not versions or not set(labels(config, name).values()) <= set(versions):
                raise InvalidArgument(f"{name} has no versions, or labels of others")
    except (SpikelessError, ValueError, RecursionError) as error:
        raise DataLoss(f"{where} cannot be used: {error}; promote a version again") from None
    return config


class _Changes:
    """The changes of a fleet, and the next one of a label of a model."""

    def __init__(self, store: Store, name: str, label: str, reason: str, dry_run: bool) -> None:
        self._store = store
        self._catalog = Catalog(store, name)
        self._name = name
        self._label = label
        self._reason = reason
        self._dry_run = dry_run

    def change(self, action: Literal["promote", "rollback"], version: int | None) -> Outcome:
        """Move the label, and record it."""
        for _ in range(_ROUNDS):
            last = self._last()
            config = ModelsConfig() if last is None else self._config_of(last)
            known = labels(config, self._name)
            previous = known.get(self._label)
            target = self._before(last, previous) if version is None else version
            if action == "rollback":
                if previous is None:
                    raise NotFound(f"{self._store.shown} has no label {self._label} of {self._name}")
                if target > previous:
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
                self._publish()
                return Outcome(self._name, self._label, target, previous, plans.UNCHANGED)
            change = Change(
                format=_FORMAT,
                number=1 if last is None else last.number + 1,
                action=action,
                model=self._name,
                label=self._label,
                version=target,
                previous=previous,
                reason=self._reason,
                user=journal.operator(),
                host=socket.gethostname(),
                time=time.time(),
                config=self._with_label(config, known | {self._label: target}).text,
            )
            if self._add(change):
                self._publish()
                result = plans.PROMOTED if action == "promote" else plans.ROLLED_BACK
                return Outcome(self._name, self._label, target, previous, result)
        raise Unavailable(f"others promote in {self._store.shown} all the time; repeat the command")

    def _with_label(self, config: ModelsConfig, moved: dict[str, int]) -> ModelsConfig:
        plans.check_none_above(self._name, moved, moved.get(STABLE, max(moved.values())))
        block = config.block(self._name) or new_block(self._name, f"{SERVING_ROOT}/{self._name}")
        return config.with_block(self._name, with_versions(block, set(moved.values()), moved))

    def _before(self, last: Change | None, now: int | None) -> int:
        """The version to roll back to: after a rollback, the one that is there."""
        for change in self._backwards(last):
            if change.model == self._name and change.label == self._label and change.version == now:
                found = change.version if change.action == "rollback" else change.previous
                if found is not None:
                    return found
                break
        raise NotFound(
            f"{self._store.shown} knows no earlier {self._label} of {self._name}: name it with --to"
        )

    def _backwards(self, last: Change | None) -> Iterator[Change]:
        change = last
        while change is not None:
            yield change
            change = self._find(change.number - 1)

    def _last(self) -> Change | None:
        """The last change; a store may list late, so it is looked for by name, too."""
        numbers = [1]
        for name in self._store.names(_FOLDER):
            with suppress(ValueError):
                numbers.append(int(name.removesuffix(_SUFFIX)))
        last = None
        number = max(numbers)
        while (found := self._find(number)) is not None:
            last, number = found, number + 1
        return last

    def _find(self, number: int) -> Change | None:
        if number < 1:
            return None
        path = f"{_FOLDER}/{number}{_SUFFIX}"
        where = self._store.show(path)
        try:
            data = self._store.read(path, _MAX_RECORD_BYTES)
        except NotFound:
            return None
        try:
            change = msgspec.json.decode(data, type=Change)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise DataLoss(f"{where} cannot be used: {error}") from None
        if change.format > _FORMAT:
            raise FailedPrecondition(f"{where} has format {change.format}: update Spikeless")
        if change.number != number:
            raise DataLoss(f"{where} cannot be used: it is number {change.number}")
        return change

    def _config_of(self, change: Change) -> ModelsConfig:
        return _parse(change.config.encode(), self._store.show(f"{_FOLDER}/{change.number}{_SUFFIX}"))

    def _add(self, change: Change) -> bool:
        """Record a change; False where another came first."""
        with suppress(AlreadyExists):
            self._store.create(f"{_FOLDER}/{change.number}{_SUFFIX}", msgspec.json.encode(change) + b"\n")
        # Stores without an exclusive write let the last of two win: see who did.
        return self._find(change.number) == change

    def _publish(self) -> None:
        """Write ``models.config`` until it is the copy of the last record.

        Whoever changes something at the same time does the same, and the one who writes
        last has seen both records.
        """
        for _ in range(_ROUNDS):
            last = self._last()
            if last is None or self._published() == last.config.encode():
                return
            self._store.write(models_config.FILE_NAME, last.config.encode())
        raise Unavailable(f"others promote in {self._store.shown} all the time; repeat the command")

    def _published(self) -> bytes:
        try:
            return self._store.read(models_config.FILE_NAME, _MAX_CONFIG_BYTES)
        except (NotFound, DataLoss):
            return b""
