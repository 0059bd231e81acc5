"""Follow a store: pull and serve what appears in it, and say how things are.

In: a store, a repository, and how often to look. Out: versions on this disk, and
metrics:

    spikeless_pull_version{model_name}
        the newest version on this disk
    spikeless_pull_freshness_seconds{model_name}
        how long ago that was trained
    spikeless_pull_versions_behind{model_name}
        how many newer ones the store has
    spikeless_pull_promotions_pending{model_name}
        labels that point elsewhere here than in the store
    spikeless_pull_bytes_total{model_name, source}
        bytes of pulled versions: from the ``store``, or ``linked`` to files of others
    spikeless_pull_failures_total{model_name}
        pulls that failed; each is tried again at the next look
    spikeless_pull_last_look_timestamp_seconds
        when the store last answered

A look asks for the ETag of one small object for each model, and of one for the fleet's
``models.config``. Only what has changed is read.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge

from spikeless.errors import Cancelled, NotFound, SpikelessError
from spikeless.repository import layout
from spikeless.repository.models_config import ModelsConfig
from spikeless.rollout.promotion import PASSING, PromotionError
from spikeless.store import promotions
from spikeless.store.applying import apply, pending
from spikeless.store.catalog import Catalog, models_in
from spikeless.store.objects import Store
from spikeless.store.pull import Pulled, PullSettings, pull_model

#: For errors that are of no single model.
_NO_MODEL = ""


@dataclass(frozen=True)
class FollowSettings:
    """How a store is followed."""

    #: Seconds between two looks at it.
    interval: float = 30.0
    #: A new version is pulled after a random part of this, so that the servers of a
    #: fleet do not all fetch it at once. Seconds.
    spread: float = 0.0
    pull: PullSettings = field(default_factory=PullSettings)


class StoreFollower:
    """Follows one model of a store, or all; `run` it until it is interrupted."""

    def __init__(
        self,
        store: str,
        models: Path,
        name: str | None,
        settings: FollowSettings,
        *,
        pulled: Callable[[Pulled], None] = lambda result: None,
        progress: Callable[[str], None] = lambda line: None,
        interrupted: threading.Event | None = None,
    ) -> None:
        self._url = store
        self._models = models
        self._name = name
        self._settings = settings
        self._pulled = pulled
        self._progress = progress
        self._interrupted = interrupted or threading.Event()
        self._store: Store | None = None
        self._fleet = ModelsConfig()
        #: What the store's ``models.config`` was when it was read.
        self._fleet_token = ""
        #: Model -> what its index and ``models.config`` were when nothing was left to
        #: do.
        self._tokens: dict[str, str] = {}
        #: Model -> the last error, so that one that stays is told once.
        self._errors: dict[str, str] = {}
        self._trained: dict[str, float] = {}
        self.registry = CollectorRegistry()
        label = ["model_name"]
        self._version = Gauge(
            "spikeless_pull_version", "The newest version on this disk.", label, registry=self.registry
        )
        self._freshness = Gauge(
            "spikeless_pull_freshness_seconds",
            "How long ago the newest version on this disk was trained.",
            label,
            registry=self.registry,
        )
        self._behind = Gauge(
            "spikeless_pull_versions_behind", "Newer versions in the store.", label, registry=self.registry
        )
        self._pending = Gauge(
            "spikeless_pull_promotions_pending",
            "Labels that point elsewhere here than in the store.",
            label,
            registry=self.registry,
        )
        self._bytes = Counter(
            "spikeless_pull_bytes", "Bytes of pulled versions.", [*label, "source"], registry=self.registry
        )
        self._failures = Counter(
            "spikeless_pull_failures", "Pulls that failed.", label, registry=self.registry
        )
        self._looked = Gauge(
            "spikeless_pull_last_look_timestamp_seconds",
            "When the store last answered.",
            registry=self.registry,
        )

    def run(self) -> None:
        """Look, pull what is new, wait; until interrupted."""
        while not self._interrupted.is_set():
            self.look()
            self._interrupted.wait(self._settings.interval)

    def look(self) -> None:
        """Look once. Errors are told and counted; the next look tries again."""
        try:
            if self._store is None:
                self._store = Store(self._url, self._settings.pull.store, self._interrupted)
            names = [self._name] if self._name is not None else models_in(self._store)
            token = promotions.token(self._store)
            if token != self._fleet_token:
                self._fleet, self._fleet_token = promotions.read(self._store), token
        except SpikelessError as error:
            self._failed(_NO_MODEL, error)
            return
        self._errors.pop(_NO_MODEL, None)
        for name in names:
            try:
                self._follow(Catalog(self._store, name))
                self._errors.pop(name, None)
            except Cancelled:
                return
            except SpikelessError as error:
                self._failed(name, error)

    def _failed(self, name: str, error: SpikelessError) -> None:
        self._failures.labels(name).inc()
        if self._errors.get(name) != str(error):
            self._progress(f"{name or 'store'}: {error}")
        self._errors[name] = str(error)

    def _follow(self, catalog: Catalog) -> None:
        name = catalog.model
        self._failures.labels(name)
        try:
            token = catalog.store.token(catalog.index_path)
        except NotFound:
            token = ""
        self._looked.set_to_current_time()
        if not token:
            raise NotFound(f"{catalog.store.shown} has no version of {name} yet")
        token = f"{token} {self._fleet_token}"
        if token == self._tokens.get(name):
            return
        index = catalog.index()
        self._measure(name, [entry.version for entry in index.versions])
        here = layout.versions(self._models, name)
        new = index.versions and index.versions[-1].version not in here
        if self._settings.spread and (new or pending(self._models, name, self._fleet)):
            self._interrupted.wait(random.uniform(0, self._settings.spread))
        settings = self._settings.pull
        for result in pull_model(catalog, index, self._models, self._fleet, settings, self._progress):
            self._bytes.labels(name, "store").inc(result.fetched)
            self._bytes.labels(name, "linked").inc(result.linked)
            self._trained[name] = result.trained
            self._pulled(result)
        self._freshness.labels(name).set_function(lambda: time.time() - self._trained[name])
        self._measure(name, [entry.version for entry in index.versions])
        try:
            apply(
                self._models,
                name,
                self._fleet,
                store=catalog.store.shown,
                servers=settings.servers,
                serving_root=settings.serving_root,
                progress=self._progress,
                interrupted=self._interrupted,
            )
        except PromotionError as error:
            if error.code not in PASSING:
                # Refused here: not tried again until the store says something else.
                self._tokens[name] = token
            raise
        self._measure(name, [entry.version for entry in index.versions])
        self._tokens[name] = token

    def _measure(self, name: str, versions: list[int]) -> None:
        self._pending.labels(name).set(len(pending(self._models, name, self._fleet)))
        newest = max(layout.versions(self._models, name), default=-1)
        self._version.labels(name).set(max(newest, 0))
        self._behind.labels(name).set(sum(version > newest for version in versions))
