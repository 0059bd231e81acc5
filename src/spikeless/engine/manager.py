"""The life of model versions: START, LOADING, AVAILABLE, UNLOADING, END.

In: the versions that are wanted of each model (``set_aspired``). Out: a handle on a
loaded version (``use``), and every version's state. It knows neither gRPC nor files: a
loader function turns a path into something that can be closed.

One thread decides, and two pools of threads load and unload, so that neither waits for
the other and requests wait for neither. The policy is TensorFlow Serving's
availability-preserving one: a version that is no longer wanted stays until one that is
wanted is available. A version is closed only after the last request that uses it has
ended; later look-ups do not find it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Generic, TypeVar

from spikeless.engine.flags import DEFAULTS, ServerFlags
from spikeless.engine.lending import Closable, Loaded, Shelf
from spikeless.errors import Internal, SpikelessError, Unavailable
from spikeless.formats.states import State, VersionStatus

_log = logging.getLogger(__name__)

#: States of versions that have ended are kept for status queries, this many for each
#: model.
MAX_ENDED = 1000
_NO_VERSION = "it has no version to load"


T = TypeVar("T", bound=Closable)
Loader = Callable[[str, int, Path], T]


class _Version(Generic[T]):
    """One version as the manager sees it; only touched under the manager's lock."""

    def __init__(self, name: str, version: int, path: Path) -> None:
        self.name = name
        self.version = version
        self.path = path
        self.state = State.START
        self.error: SpikelessError | None = None
        self.aspired = True
        self.attempts = 0
        self.retry_at = 0.0
        self.loaded: Loaded[T] | None = None

    def __str__(self) -> str:
        return f"{{name: {self.name} version: {self.version}}}"


class Manager(Generic[T]):
    """Loads and unloads versions and lends them to requests: start, stop."""

    def __init__(self, loader: Loader[T], flags: ServerFlags = DEFAULTS) -> None:
        self._loader = loader
        self._flags = flags
        self._versions: dict[str, dict[int, _Version[T]]] = defaultdict(dict)
        self._shelf: Shelf[T] = Shelf()
        self._changed = threading.Condition()
        self._stopping = False
        self._listeners: list[Callable[[str, VersionStatus], None]] = []
        self._load_pool = _pool(flags.num_load_threads, "load")
        self._unload_pool = _pool(flags.num_unload_threads, "unload")
        self._thread = threading.Thread(target=self._decide_forever, name="manager", daemon=True)

    def start(self) -> None:
        """Begin to load what is wanted, unless it was stopped meanwhile."""
        with self._changed:
            if not self._stopping:
                self._thread.start()

    # --- what is wanted ---------------------------------------------------------------

    def set_aspired(self, name: str, versions: Mapping[int, Path]) -> None:
        """Want these versions of the model ``name``, and no others."""
        with self._changed:
            known = self._versions[name]
            for version, path in versions.items():
                entry = known.get(version)
                ended = entry is not None and entry.state is State.END
                if entry is None or (ended and (entry.error is None or not entry.aspired)):
                    entry = known[version] = _Version(name, version, path)
                    self._announce(entry)
                entry.aspired = True
            for version, entry in known.items():
                if version not in versions:
                    entry.aspired = False
            self._changed.notify_all()

    def add_listener(self, listener: Callable[[str, VersionStatus], None]) -> None:
        """Call ``listener(name, status)`` at each change of state; it may not block."""
        with self._changed:
            self._listeners.append(listener)

    # --- what there is ----------------------------------------------------------------

    def use(self, name: str, version: int | None = None) -> AbstractContextManager[T]:
        """Lend a loaded version, by default the highest, to one ``with`` statement.

        It is not closed while it is lent.

        Raises:
            NotFound: no such version is available.
        """
        return self._shelf.use(name, version)

    def available(self, name: str) -> list[int]:
        """The versions of ``name`` that can be used now, lowest first."""
        return self._shelf.versions(name)

    def names(self) -> list[str]:
        """The models of which a version was ever wanted."""
        with self._changed:
            return list(self._versions)

    def statuses(self, name: str) -> list[VersionStatus]:
        """Every version of ``name`` that was ever wanted, lowest first."""
        with self._changed:
            return [_status(entry) for _, entry in sorted(self._versions.get(name, {}).items())]

    def wait_available(
        self, names: Iterable[str], timeout: float | None = None, all_have_versions: bool = True
    ) -> dict[str, str]:
        """Wait until each model is available, or cannot become available any more.

        Args:
            all_have_versions: wait for a model that has no version yet, too; else only
                while no model has one.

        Returns:
            The models that have none, with the reason.
        """
        names = list(names)

        def failure(name: str) -> str | None:
            """Why the model failed; empty when available, None while undecided."""
            if self._shelf.versions(name):
                return ""
            wanted = self._wanted(name)
            if not wanted and not all_have_versions and any(map(self._wanted, names)):
                return _NO_VERSION
            if wanted and all(entry.state is State.END for entry in wanted):
                return "; ".join(f"{entry} due to error: {entry.error}" for entry in wanted)
            return None

        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping or all(failure(name) is not None for name in names), timeout
            )
            results = {name: failure(name) for name in names}
        return {
            name: _NO_VERSION if reason is None else reason
            for name, reason in results.items()
            if reason != ""
        }

    def wait_settled(self, name: str, versions: Collection[int]) -> None:
        """Wait until none of these versions is still on its way."""
        known = self._versions[name]
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._stopping
                    or not any(
                        entry.aspired and entry.state in (State.START, State.LOADING)
                        for entry in known.values()
                        if entry.version in versions
                    )
                )
            )

    def _wanted(self, name: str) -> list[_Version[T]]:
        return [entry for entry in self._versions.get(name, {}).values() if entry.aspired]

    def stop(self) -> None:
        """Let running requests end, unload everything and stop the threads."""
        with self._changed:
            if self._stopping:
                return
            self._stopping = True
            for entry in self._entries():
                entry.aspired = False
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        for pool in (self._load_pool, self._unload_pool):
            if pool is not None:
                pool.shutdown()

    # --- how it gets there ------------------------------------------------------------

    def _decide_forever(self) -> None:
        while True:
            with self._changed:
                loads, unloads = self._decide(time.monotonic())
                if not loads and not unloads:
                    if self._stopping and not self._busy():
                        return
                    self._changed.wait(self._until_next_retry(time.monotonic()))
                    continue
            for entry in loads:
                _submit(self._load_pool, self._load, entry)
            for entry in unloads:
                _submit(self._unload_pool, self._unload, entry)

    def _entries(self) -> Iterator[_Version[T]]:
        return chain.from_iterable(versions.values() for versions in self._versions.values())

    def _busy(self) -> bool:
        return any(entry.state is not State.END for entry in self._entries())

    def _until_next_retry(self, now: float) -> float | None:
        waits = (entry.retry_at - now for entry in self._entries() if entry.retry_at > now)
        return min(waits, default=None)

    def _decide(self, now: float) -> tuple[list[_Version[T]], list[_Version[T]]]:
        """What to load and what to unload now; changes the state of these versions."""
        loads: list[_Version[T]] = []
        unloads: list[_Version[T]] = []
        for versions in self._versions.values():
            entries = [versions[version] for version in sorted(versions, reverse=True)]
            for entry in entries:
                # Waiting for its first or its next try: no thread works on it.
                waiting = entry.state is State.START or entry.retry_at > 0
                if waiting and not entry.aspired:
                    entry.retry_at = 0.0
                    self._enter(entry, State.END, entry.error)
                elif waiting and entry.retry_at <= now:
                    entry.retry_at = 0.0
                    if entry.state is State.START:
                        self._enter(entry, State.LOADING)
                    loads.append(entry)
            served = any(entry.aspired and entry.state is State.AVAILABLE for entry in entries)
            if served or not any(entry.aspired for entry in entries):
                for entry in entries:
                    if entry.state is State.AVAILABLE and not entry.aspired:
                        self._shelf.withdraw(entry.name, entry.version)
                        self._enter(entry, State.UNLOADING)
                        unloads.append(entry)
            self._forget_oldest(versions)
        return loads, unloads

    def _load(self, entry: _Version[T]) -> None:
        if self._flags.load_threads_yield and self._load_pool and not self._shelf.is_empty():
            give_way()
        try:
            model = self._loader(entry.name, entry.version, entry.path)
        except SpikelessError as error:
            self._load_failed(entry, error)
        except Exception as error:
            _log.exception("loading %s", entry)
            self._load_failed(entry, Internal(f"{type(error).__name__}: {error}"))
        else:
            loaded = Loaded(entry.version, model)
            with self._changed:
                entry.loaded = loaded
                self._shelf.put(entry.name, loaded)
                self._enter(entry, State.AVAILABLE)

    def _load_failed(self, entry: _Version[T], error: SpikelessError) -> None:
        with self._changed:
            entry.attempts += 1
            entry.error = error
            if self._stopping or entry.attempts > self._flags.max_num_load_retries:
                self._enter(entry, State.END, error)
                return
            _log.error(
                "loading %s failed (attempt %d of %d): %s",
                entry,
                entry.attempts,
                self._flags.max_num_load_retries + 1,
                error,
            )
            entry.retry_at = time.monotonic() + self._flags.load_retry_interval_micros / 1e6
            self._changed.notify_all()

    def _unload(self, entry: _Version[T]) -> None:
        if self._flags.load_threads_yield and self._unload_pool:
            give_way()
        loaded = entry.loaded
        assert loaded is not None
        loaded.retire()
        entry.loaded = None
        try:
            loaded.model.close()
        except Exception:
            _log.exception("unloading %s", entry)
        with self._changed:
            self._enter(entry, State.END)

    def _forget_oldest(self, versions: dict[int, _Version[T]]) -> None:
        ended = [version for version, entry in versions.items() if entry.state is State.END]
        for version in sorted(ended)[: max(0, len(ended) - MAX_ENDED)]:
            if not versions[version].aspired:
                del versions[version]

    def _enter(self, entry: _Version[T], state: State, error: SpikelessError | None = None) -> None:
        entry.state = state
        entry.error = error
        self._announce(entry)
        self._changed.notify_all()

    def _announce(self, entry: _Version[T]) -> None:
        if entry.error is None:
            _log.info("servable version %s: %s", entry, entry.state.name)
        else:
            _log.error("servable version %s: %s: %s", entry, entry.state.name, entry.error)
        for listener in self._listeners:
            listener(entry.name, _status(entry))


def _status(entry: _Version[T]) -> VersionStatus:
    return VersionStatus(entry.version, entry.state, entry.error)


def _pool(threads: int, name: str) -> ThreadPoolExecutor | None:
    return ThreadPoolExecutor(threads, thread_name_prefix=name) if threads > 0 else None


def give_way() -> None:
    """Run this thread only while no other wants its processor (``SCHED_IDLE``).

    A request's thread that wakes up then never waits for a loading one to use up its
    slice of time, which takes up to a tick of the kernel's clock and a slice more: 4 to
    8 ms at 250 Hz. The price: where the processors are always busy, loads take long.
    Threads that this one starts are like it, and no thread may go back, so the first
    load must not call this: it starts the pools that TensorFlow runs requests on.
    """
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _submit(pool: ThreadPoolExecutor | None, work: Callable[[_Version[T]], None], entry: _Version[T]) -> None:
    if pool is None:
        work(entry)
        return
    try:
        pool.submit(work, entry)
    except RuntimeError:  # the interpreter is shutting down
        raise Unavailable("the server is stopping") from None
