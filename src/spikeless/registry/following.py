"""Follow an alias of the registry.

In: the URI of an alias. Out: each version that it comes to name is published, and
promoted where that is asked for, once. Everything that has to be known for this is in
the repository: what was published is in the version's own file, what was promoted last
in ``<models>/<name>/.spikeless/followed.json``. So a follower that is killed anywhere
resumes where it was.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from spikeless.disk import atomic
from spikeless.errors import InvalidArgument, SpikelessError
from spikeless.registry.publishing import ERROR, PROMOTED, PUBLISHED, REFUSALS, STATE, publish
from spikeless.registry.tracking import Registry, Release
from spikeless.repository import layout
from spikeless.repository.gates import GATES, Gate
from spikeless.repository.journal import Journal
from spikeless.repository.origin import Origin
from spikeless.rollout.fleet import FleetSettings
from spikeless.rollout.promotion import PASSING, PromotionError, PromotionSettings, promote
from spikeless.warmup import SampleFile

FILE_NAME = "followed.json"


@dataclass(frozen=True)
class Promotion:
    """How versions are promoted, and on which servers."""

    fleet: FleetSettings
    settings: PromotionSettings = field(default_factory=PromotionSettings)


@dataclass(frozen=True)
class Followed:
    """A version that the alias names now."""

    source: str
    run: str
    name: str
    version: int
    path: Path
    #: ``published`` or ``promoted``.
    state: str

    def __str__(self) -> str:
        return f"{self.source} is version {self.version} of {self.name}: {self.state}"


class AliasFollower:
    """Publishes what an alias names, each version once.

    Args:
        uri: what moves, ``models:/NAME@ALIAS`` or ``models:/NAME/latest``.
        promotion: promote the version as well; None leaves that to others.
        interrupted: when it is set, a promotion ends and everything is put back.

    The other arguments are those of `spikeless.registry.publish`.
    """

    def __init__(
        self,
        registry: Registry,
        uri: str,
        models: str | os.PathLike[str],
        name: str = "",
        *,
        gates: Sequence[Gate] = GATES,
        serving_root: str | None = None,
        samples: tuple[SampleFile, ...] = (),
        promotion: Promotion | None = None,
        progress: Callable[[str], None] = lambda title: None,
        interrupted: threading.Event | None = None,
    ) -> None:
        self._registry = registry
        self._uri = uri
        self._models = Path(models)
        self._name = name
        self._gates = gates
        self._serving_root = serving_root
        self._samples = samples
        self._promotion = promotion
        self._progress = progress
        self._interrupted = interrupted
        #: What nothing more can be done for.
        self._settled: Origin | None = None

    def poll(self) -> Followed | None:
        """Ask the registry once; returns what was done, None where nothing was to do.

        What is refused for good is not tried again while the alias stays where it is.

        Raises:
            SpikelessError: as `spikeless.registry.publish` and `spikeless.promote` do.
        """
        release = self._registry.resolve(self._uri)
        if release.version is None:
            raise InvalidArgument(f"{self._uri} never moves: follow models:/NAME@ALIAS")
        if release.origin == self._settled:
            return None
        try:
            followed = self._publish(release)
            if self._promotion is not None:
                followed = self._promote(release, followed, self._promotion)
        except REFUSALS:
            self._settled = release.origin
            raise
        except PromotionError as error:
            if error.code not in PASSING:
                self._settled = release.origin
            raise
        self._settled = release.origin
        return followed

    def _publish(self, release: Release) -> Followed:
        candidate = publish(
            self._registry,
            release,
            self._models,
            self._name,
            gates=self._gates,
            serving_root=self._serving_root,
            samples=self._samples,
            progress=self._progress,
        )
        source, run = release.origin.source, release.origin.run
        return Followed(source, run, candidate.name, candidate.version, candidate.target, PUBLISHED)

    def _promote(self, release: Release, followed: Followed, promotion: Promotion) -> Followed:
        if not self._was_promoted(release, followed):
            reason = f"{self._uri} is version {followed.version}"
            settings = replace(promotion.settings, reason=reason)
            try:
                promote(
                    self._models,
                    followed.name,
                    followed.version,
                    promotion.fleet,
                    settings,
                    self._progress,
                    self._interrupted,
                )
            except SpikelessError as error:
                self._registry.tag(release, {ERROR: f"not promoted: {error}"[:1000]})
                raise
            self._note_promoted(release, followed)
        self._registry.tag(release, {STATE: PROMOTED, ERROR: None})
        return replace(followed, state=PROMOTED)

    def _was_promoted(self, release: Release, followed: Followed) -> bool:
        """Whether the last promotion for this alias was that of this version.

        A rollback after it stands until the alias moves.
        """
        unfinished = Journal(self._models, followed.name).unfinished()
        return unfinished is None and self._promoted(followed.name).get(self._uri) == _mark(release)

    def _promoted(self, name: str) -> dict[str, str]:
        """URI -> what was promoted for it last."""
        try:
            found = json.loads(self._file(name).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _note_promoted(self, release: Release, followed: Followed) -> None:
        promoted = {**self._promoted(followed.name), self._uri: _mark(release)}
        file = self._file(followed.name)
        with atomic.reported_errors(f"write {file}"):
            atomic.write_atomically(file, json.dumps(promoted).encode())

    def _file(self, name: str) -> Path:
        return layout.state_directory(self._models, name) / FILE_NAME


def _mark(release: Release) -> str:
    return f"{release.origin.source} of {release.origin.created}"
