"""The changes that a promotion in waves is made of.

In: a store, a label of a model, and the version that it goes to. Out: changes in the
store (`spikeless.store.changes`): a wave more, all machines, or none.
"""

from __future__ import annotations

import socket
import time

import msgspec

from spikeless.errors import FailedPrecondition
from spikeless.repository import journal
from spikeless.store.catalog import Catalog, of_version
from spikeless.store.changes import Change, Changes, Waves, after, labels
from spikeless.store.objects import Store
from spikeless.store.promotions import moved


class WavesEnded(Exception):
    """The waves go on no more, since this change."""

    def __init__(self, change: Change | None) -> None:
        super().__init__()
        self.change = change


class WaveChanges:
    """The changes that move a label to a version in waves, or back."""

    def __init__(self, store: Store, name: str, label: str, version: int, reason: str) -> None:
        self.store = store
        self.name = name
        self.label = label
        self.version = version
        self._reason = reason
        self.changes = Changes(store)

    def here(self, last: Change | None) -> int:
        """The version that the label points at for all, which is gone back to.

        Raises:
            NotFound: the store has no version to promote.
            FailedPrecondition: the label is nowhere, or may not move there.
        """
        of_version(Catalog(self.store, self.name).index(), self.version, self.store.shown)
        config = self.changes.config_of(last)
        previous = labels(config, self.name).get(self.label)
        if previous is None:
            raise FailedPrecondition(
                f"{self.label} of {self.name} is nowhere in {self.store.shown}, so there is no version to go "
                "back to: promote the first one without --waves"
            )
        moved(config, self.name, self.label, self.version)
        return previous

    def new(self, last: Change, sizes: tuple[str, ...], first: tuple[str, ...]) -> Waves:
        """The promotion before its first wave."""
        config = self.changes.config_of(last)
        block = moved(config, self.name, self.label, self.version).block(self.name)
        assert block is not None
        return Waves(
            self.name,
            self.label,
            self.version,
            labels(config, self.name)[self.label],
            block,
            sizes,
            first,
            (),
            0,
            journal.operator(),
            socket.gethostname(),
            time.time(),
        )

    def current(self) -> tuple[Change, Waves]:
        """The last change, and the waves as it has them.

        Raises:
            WavesEnded: they go on no more.
        """
        last = self.changes.last()
        waves = None if last is None else last.waves_of(self.name)
        if last is None or waves is None or (waves.label, waves.version) != (self.label, self.version):
            raise WavesEnded(
                next((one for one in self.changes.backwards(last) if one.model == self.name), None)
            )
        return last, waves

    def advance(self, last: Change, waves: Waves) -> bool:
        """Record another wave; False where another change came first."""
        waves = msgspec.structs.replace(waves, change=last.number + 1)
        return self._add(last, "wave", self.version, waves.previous, self._reason, waves=waves)

    def complete(self, last: Change, waves: Waves) -> bool:
        """Record that all machines have the version."""
        config = moved(self.changes.config_of(last), self.name, self.label, self.version)
        return self._add(last, "promote", self.version, waves.previous, self._reason, config=config.text)

    def give_back(self, last: Change, waves: Waves, reason: str) -> bool:
        """Record that no machine has the version."""
        return self._add(last, "rollback", waves.previous, self.version, reason)

    def _add(
        self,
        last: Change,
        action: str,
        version: int,
        previous: int,
        reason: str,
        *,
        waves: Waves | None = None,
        config: str | None = None,
    ) -> bool:
        others = tuple(each for each in last.waves if each.model != self.name)
        return self.changes.add(
            after(
                last,
                action=action,
                model=self.name,
                label=self.label,
                version=version,
                previous=previous,
                reason=reason,
                config=last.config if config is None else config,
                waves=others if waves is None else (*others, waves),
            )
        )
