"""Metrics that a model server lacks: the states of its versions, and its memory.

In: a server's gRPC address, the model repository that it serves, and its process when
that can be seen, or a copy of its status that something beside it keeps fresh, as
``docker/entrypoint`` does. Out: metrics over HTTP. It works with any server that has
TensorFlow Serving's ``ModelService``.

    spikeless_server_up
        1 while the server answers
    spikeless_version_state{model_name, version, state}
        1 for the state that a version is in, else 0
    spikeless_version_error{model_name, version, status}
        1 for a version that could not be loaded
    spikeless_versions_missing{model_name}
        how many versions it should serve and does not, or only in part: those that
        ``models.config`` names, else the newest one on disk
    spikeless_reloads_total{model_name}
        how often the AVAILABLE versions changed
    spikeless_memory_private_bytes
        what counts against a memory limit (RssAnon)
    spikeless_memory_mapped_bytes
        resident parameters that are mapped from files, which can be given back

Versions that have ended are left out, unless they could not be loaded and are still on
disk. Where the embedded engine has a metric of the same name, it means the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from spikeless.client import Client
from spikeless.disk import proc
from spikeless.errors import Code, SpikelessError
from spikeless.formats.states import State, VersionStatus
from spikeless.formats.versions import list_versions
from spikeless.repository import checks, layout, models_config

#: The name of a kind of memory, the kernel's and docker/entrypoint's -> the metric's.
_MEMORY = {"RssAnon": "private", "MappedParameters": "mapped"}
_KINDS = {"private": "its own", "mapped": "parameters that are mapped from files"}
#: A copy of a process's status that is older than this is of a process that is gone.
#: Seconds.
MAX_STATUS_AGE = 10.0


@dataclass(frozen=True)
class ExporterSettings:
    """What to watch."""

    #: The server's gRPC address, ``host:port``.
    target: str
    #: The model repository; every folder in it that is not hidden is the name of a
    #: model to ask for.
    models: Path
    #: The server's process, or its container's first one, when this process can see it.
    pid: int | None = None
    #: Where it cannot: a fresh copy of the ``/proc/<pid>/status`` of that process.
    status_file: Path | None = None
    #: Seconds between two polls; a swap shorter than this is still counted as a reload.
    interval: float = 0.5


class Exporter:
    """A Prometheus collector; a thread of its own follows the server between scrapes.

    Start it with ``start``, register it with a registry, end it with ``stop``.
    """

    def __init__(self, settings: ExporterSettings) -> None:
        self.settings = settings
        self._client = Client(settings.target, timeout=2.0)
        self._statuses: dict[str, list[VersionStatus]] = {}
        self._missing: dict[str, int] = {}
        self._reloads: dict[str, int] = {}
        self._up = False
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="exporter", daemon=True)

    def start(self) -> None:
        """Ask once, then go on asking."""
        self.poll()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._client.close()

    def _follow(self) -> None:
        while not self._stopping.wait(self.settings.interval):
            self.poll()

    def poll(self) -> None:
        """Ask the server for the states of every model's versions."""
        found: dict[str, list[VersionStatus]] = {}
        missing: dict[str, int] = {}
        up = False
        for name, wanted in _wanted(self.settings.models).items():
            try:
                statuses = self._client.statuses(name)
                up = True
            except SpikelessError as error:
                # A server that does not know the model answers too.
                up = up or error.code is Code.NOT_FOUND
                statuses = []
            on_disk = _on_disk(self.settings.models, name)
            matter = [status for status in statuses if _matters(status, status.version in on_disk)]
            if matter:
                found[name] = matter
            if wanted is not None:
                newest = {max(on_disk)} if on_disk else set()
                # A server loads half a copy, too, and then fails every request.
                available = {
                    version
                    for version in _available(statuses)
                    if version not in on_disk or not checks.missing_part(on_disk[version])
                }
                missing[name] = len((wanted or newest) - available) or int(not available)
        with self._lock:
            self._up = up
            for name, statuses in found.items():
                before = self._statuses.get(name)
                self._reloads.setdefault(name, 0)
                if before is not None and _available(before) != _available(statuses):
                    self._reloads[name] += 1
            if up:
                # What was known before the server went away is kept, so that its return
                # counts as a reload only when it serves something else.
                self._statuses, self._missing = found, missing

    def collect(self) -> Iterator[Metric]:
        """What Prometheus scrapes."""
        with self._lock:
            up, reloads = self._up, dict(self._reloads)
            statuses, missing = (self._statuses, self._missing) if up else ({}, {})
        yield GaugeMetricFamily("spikeless_server_up", "Whether the model server answers.", value=float(up))
        state = GaugeMetricFamily(
            "spikeless_version_state",
            "1 for the state that a version is in.",
            labels=["model_name", "version", "state"],
        )
        error = GaugeMetricFamily(
            "spikeless_version_error",
            "1 for a version that could not be loaded.",
            labels=["model_name", "version", "status"],
        )
        for name, versions in statuses.items():
            for status in versions:
                for candidate in State:
                    is_it = float(status.state is candidate)
                    state.add_metric([name, str(status.version), candidate.name], is_it)
                if status.error is not None:
                    error.add_metric([name, str(status.version), status.error.code.name], 1.0)
        yield state
        yield error
        behind = GaugeMetricFamily(
            "spikeless_versions_missing",
            "How many versions it should serve and does not.",
            labels=["model_name"],
        )
        for name, count in missing.items():
            behind.add_metric([name], count)
        yield behind
        counter = CounterMetricFamily(
            "spikeless_reloads", "How often the AVAILABLE versions changed.", labels=["model_name"]
        )
        for name, count in reloads.items():
            counter.add_metric([name], count)
        yield counter
        for kind, size in self._memory().items():
            yield GaugeMetricFamily(
                f"spikeless_memory_{kind}_bytes",
                f"Resident memory of the model server: {_KINDS[kind]}.",
                value=size,
            )

    def _memory(self) -> dict[str, int]:
        """Resident bytes of the server's processes by kind; none when it is gone."""
        pid, copy = self.settings.pid, self.settings.status_file
        memory: dict[str, int] = {}
        with suppress(OSError):
            if pid is not None:
                server = proc.server_of(pid)
                memory = proc.server_memory(server)
                memory["MappedParameters"] = proc.server_mapped_parameters(server)
            elif copy is not None and time.time() - copy.stat().st_mtime <= MAX_STATUS_AGE:
                memory = proc.memory_in(copy)
        return {kind: memory[field] for field, kind in _MEMORY.items() if field in memory}


def _wanted(models: Path) -> dict[str, set[int] | None]:
    """The models of a repository, and the versions that ``models.config`` names.

    None for a model that it does not list; without the file, all are served.
    """
    on_disk: list[str] = []
    with suppress(OSError):
        on_disk = layout.model_names(models)
    try:
        listed = models_config.read(models).message.model_config_list.config
    except SpikelessError:
        listed = []
    wanted: dict[str, set[int] | None] = dict.fromkeys(on_disk, None if listed else set())
    for model in listed:
        wanted[model.name] = set(model.model_version_policy.specific.versions)
    return wanted


def _on_disk(models: Path, name: str) -> dict[int, Path]:
    try:
        return list_versions(models / name)
    except SpikelessError:
        return {}


def _matters(status: VersionStatus, on_disk: bool) -> bool:
    """Leave out what has ended, which a server lists for ever, unless it failed."""
    return status.state is not State.END or (status.error is not None and on_disk)


def _available(statuses: list[VersionStatus]) -> set[int]:
    return {status.version for status in statuses if status.state is State.AVAILABLE}
