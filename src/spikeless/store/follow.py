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
    spikeless_pull_wave{model_name}
        the wave that brought this machine what it serves, while a promotion goes on
    spikeless_pull_bytes_total{model_name, source}
        bytes of pulled versions: from the ``store``, or ``linked`` to files of others
    spikeless_pull_failures_total{model_name}
        pulls that failed; each is tried again at the next look
    spikeless_pull_last_look_timestamp_seconds
        when the store last answered

A look asks for the ETag of one small object for each model, and of one for the fleet's
``models.config``. Only what has changed is read. With reports, it says in the store how
things are here (`spikeless.store.reporting`).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge

from spikeless.errors import Cancelled, NotFound, SpikelessError
from spikeless.repository import layout
from spikeless.rollout.promotion import PASSING, PromotionError
from spikeless.store import promotions
from spikeless.store.addresses import require_address
from spikeless.store.applying import apply, pending
from spikeless.store.catalog import Catalog, models_in
from spikeless.store.objects import Store
from spikeless.store.promotions import Promoted
from spikeless.store.pull import Pulled, PullSettings, pull_model
from spikeless.store.reporting import FollowedModel, Reporter, ReportSettings
from spikeless.store.reports import Reports

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
    #: Whether and how this machine reports.
    report: ReportSettings = field(default_factory=ReportSettings)


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
        require_address(store)
        self._url = store
        self._models = models
        self._name = name
        self._settings = settings
        self._pulled = pulled
        self._progress = progress
        self._interrupted = interrupted or threading.Event()
        self._store: Store | None = None
        self._reporter: Reporter | None = None
        self._promoted = Promoted()
        #: What of it this machine should serve.
        self._fleet = self._promoted.config
        #: What the store's ``models.config`` was when it was read.
        self._fleet_token = ""
        #: Model -> what its index and ``models.config`` were when nothing was left to
        #: do.
        self._tokens: dict[str, str] = {}
        #: Model -> the last error, so that one that stays is told once.
        self._errors: dict[str, str] = {}
        self._report_error = ""
        #: Model -> why a server refused what is promoted.
        self._refused: dict[str, str] = {}
        self._names: list[str] = []
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
        self._wave = Gauge(
            "spikeless_pull_wave",
            "The wave that brought this machine what it serves, while a promotion goes on; 0 for none.",
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
        self._leave()

    def _leave(self) -> None:
        """Take back what this machine has said: it follows the store no more."""
        if self._reporter is None:
            return
        settings = self._settings.pull
        with suppress(SpikelessError):
            # Not the store that is interrupted.
            Reports(Store(self._url, settings.store)).remove(settings.node)

    def look(self) -> None:
        """Look once. Errors are told and counted; the next look tries again."""
        try:
            if self._store is None:
                self._store = Store(self._url, self._settings.pull.store, self._interrupted)
            self._names = [self._name] if self._name is not None else models_in(self._store)
            token = promotions.token(self._store)
            if token != self._fleet_token:
                self._promoted, self._fleet_token = promotions.read(self._store), token
                self._fleet = self._promoted.of(self._settings.pull.node)
        except SpikelessError as error:
            self._failed(_NO_MODEL, error)
            return
        self._errors.pop(_NO_MODEL, None)
        for name in self._names:
            try:
                self._follow(Catalog(self._store, name))
                self._errors.pop(name, None)
            except Cancelled:
                return
            except SpikelessError as error:
                self._failed(name, error)
        self._report()

    def _report(self, *, busy: bool = False) -> None:
        """Say in the store how things are; what keeps from it is told once."""
        settings = self._settings.report
        if settings.every is None or self._store is None:
            return
        if self._reporter is None:
            pull = self._settings.pull
            slower = replace(settings, every=max(settings.every, self._settings.interval))
            self._reporter = Reporter(self._store, pull.node, self._models, pull.servers, slower)
        followed = [
            FollowedModel(
                name,
                promotions.labels(self._fleet, name),
                self._refused.get(name) or self._errors.get(name, ""),
                name in self._refused,
            )
            for name in self._names
        ]
        try:
            self._reporter.report(self._promoted.change, followed, busy=busy)
            self._report_error = ""
        except SpikelessError as error:
            if self._report_error != str(error):
                self._progress(f"no report: {error}")
            self._report_error = str(error)

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
        self._refused.pop(name, None)
        due = new or pending(self._models, name, self._fleet)
        if due:
            self._report(busy=True)
        if self._settings.spread and due:
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
        except SpikelessError as error:
            if error.code not in PASSING:
                self._refused[name] = str(error)
                if isinstance(error, PromotionError):
                    # Not tried again until the store says something else.
                    self._tokens[name] = token
            raise
        self._measure(name, [entry.version for entry in index.versions])
        self._tokens[name] = token

    def _measure(self, name: str, versions: list[int]) -> None:
        self._wave.labels(name).set(self._promoted.wave_of(self._settings.pull.node, name))
        self._pending.labels(name).set(len(pending(self._models, name, self._fleet)))
        newest = max(layout.versions(self._models, name), default=-1)
        self._version.labels(name).set(max(newest, 0))
        self._behind.labels(name).set(sum(version > newest for version in versions))
