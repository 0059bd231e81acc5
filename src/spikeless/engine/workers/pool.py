"""The workers of a server: started, restarted, and made to change versions together.

In: versions to load, and what is to be said of models. Out: the same in every worker. A
version is loaded by one worker first, so that one which takes its process down takes
only that; then by the others, one after another while they serve. When all of them have
it, all of them switch. One that cannot be loaded somewhere is switched nowhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from operator import attrgetter
from pathlib import Path
from typing import Any

from spikeless.disk import children, proc
from spikeless.engine.flags import ServerFlags
from spikeless.engine.workers.connection import Disconnected, Handlers, PeerConnection
from spikeless.engine.workers.pages import Pages
from spikeless.engine.workers.view import View
from spikeless.errors import SpikelessError, Unavailable

_log = logging.getLogger(__name__)
#: The variable that makes ``spikeless serve`` a worker: its number and its socket's.
WORKER_MARK = "SPIKELESS_WORKER_SOCKET"
#: A worker that ends so many times without having served for so many seconds between
#: ends the server.
MAX_ENDS = 5
STEADY_SECONDS = 60.0
#: Seconds until a worker is started again, doubled each time.
_BACKOFF_SECONDS = 0.25
#: Seconds that a worker may take for what should take no time.
_PATIENCE_SECONDS = 10.0
#: Exit codes of a worker that was told to end, as early as it may have been.
_STOPPED = (0, -signal.SIGTERM, 128 + signal.SIGTERM)
_Key = tuple[str, int]


class Worker:
    """One process, as the leading one sees it."""

    def __init__(self, number: int, command: list[str], handlers: Handlers) -> None:
        self.number = number
        #: The versions that it has loaded.
        self.held: set[_Key] = set()
        #: Its last metrics.
        self.page = ""
        self.since = time.monotonic()
        self._terminated = False
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                children.tied(command),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, WORKER_MARK: f"{number}:{theirs.fileno()}"},
            )
        self.connection = PeerConnection(ours, handlers, closed=self._disconnected)
        self.connection.start()

    def call(self, method: str, **params: Any) -> Future[Any]:
        return self.connection.call(method, **params)

    def terminate(self) -> None:
        """Have it end as a server does; asked again, it would end at once."""
        if not self._terminated:
            self._terminated = True
            self.process.terminate()

    def _disconnected(self) -> None:
        """It is about to end, or stuck."""
        try:
            self.process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()


class WorkerPool:
    """All workers: start, listen, stop. Safe to use from several threads."""

    def __init__(
        self,
        flags: ServerFlags,
        handlers: Handlers,
        view: Callable[[], View],
        failed: Callable[[SpikelessError], None],
    ) -> None:
        """Args:
        flags: of each worker; their ports are free or shared.
        handlers: what workers ask for.
        view: what is to be said of models now.
        failed: told when a worker cannot be kept running.
        """
        self._flags = flags
        self._command = [sys.executable, "-m", "spikeless", "serve", *flags.command_line()]
        self._handlers: Handlers = {**handlers, "page": self.page}
        self._view = view
        self._failed = failed
        self._pages = Pages()
        #: What went wrong while they stopped.
        self.failures: list[str] = []
        self._running: dict[int, Worker] = {}
        # Those that hold what was switched to, and what that is.
        self._members: list[Worker] = []
        self._served: dict[_Key, Path] = {}
        self._ends: dict[int, int] = {}
        self._listening = False
        self._stopping = False
        self._changed = threading.Condition()
        self._showing = threading.Lock()

    def start(self) -> None:
        """Start the processes; they load nothing yet."""
        for number in range(self._flags.workers):
            self._spawn(number)

    def listen(self) -> None:
        """Open the ports of all workers, and of those that come later.

        Raises:
            Unavailable: one cannot.
        """
        with self._changed:
            self._await_all()
            self._listening = True
            members = list(self._members)
        self.show()
        for future in [worker.call("listen") for worker in members]:
            try:
                future.result()
            except Disconnected:
                raise Unavailable("a worker ended before it listened: see what it said") from None

    # --- versions ---------------------------------------------------------------------

    def load(self, name: str, version: int, path: Path) -> SwitchedVersion:
        """Load a version in all workers, then switch all of them.

        Raises:
            SpikelessError: one worker could not load it; it serves in none.
        """
        key = (name, version)
        deaths = 0
        while True:
            with self._changed:
                self._await_all() if deaths else self._await_one()
                # In the order of their numbers: what kills one is tried there again.
                members = sorted(self._members, key=attrgetter("number"))
                missing = [worker for worker in members if key not in worker.held]
                if not missing:
                    self._served[key] = path
                    break
                at_once = not self._listening and len(missing) < len(members)
            some = missing if at_once else missing[:1]
            loads = [worker.call("load", name=name, version=version, path=str(path)) for worker in some]
            errors = []
            for worker, load in zip(some, loads, strict=True):
                if error := load.exception():
                    errors.append(error)
                else:
                    worker.held.add(key)
            deaths += sum(isinstance(error, Disconnected) for error in errors)
            refused = [error for error in errors if not isinstance(error, Disconnected)]
            if deaths > 1 and not refused:
                refused.append(Unavailable(f"workers that loaded version {version} of {name} ended"))
            if refused:
                self._drop(key)
                raise refused[0]
        _settle([worker.call("serve", name=name, version=version) for worker in members])
        return SwitchedVersion(self, key)

    def unload(self, key: _Key) -> None:
        """Unload a version in all workers, which answer for it no more."""
        with self._changed:
            path = self._served.pop(key, None)
        # Labels have left it: calls must know before it goes.
        self.show()
        self._drop(key)
        self.forget(f'model_path="{path}"')

    def _drop(self, key: _Key) -> None:
        with self._changed:
            workers = list(self._members)
        name, version = key
        unloads = [(worker, worker.call("unload", name=name, version=version)) for worker in workers]
        for worker, unloaded in unloads:
            with contextlib.suppress(SpikelessError):
                unloaded.result()
            worker.held.discard(key)

    def show(self) -> None:
        """Have all workers say of models what is to be said now; wait until they do."""
        with self._showing:
            message = self._view().to_json()
            with self._changed:
                members = list(self._members)
            shown = [worker.call("view", **message) for worker in members]
        _settle(shown)

    # --- metrics ----------------------------------------------------------------------

    def page(self) -> str:
        """The metrics of all workers."""
        with self._changed:
            members = list(self._members)
        pages = [(worker, worker.call("page")) for worker in members]
        for worker, page in pages:
            # One that does not answer counts as it did.
            with contextlib.suppress(SpikelessError, FutureTimeoutError):
                worker.page = page.result(_PATIENCE_SECONDS)
        private = 0
        with contextlib.suppress(OSError):
            private = proc.private_memory()
        with self._changed:
            return self._pages.total([worker.page for worker in members if worker.page], private)

    def forget(self, *labels: str) -> None:
        """Drop the series with these labels from what ended workers counted."""
        with self._changed:
            self._pages.forget(*labels)

    # --- processes --------------------------------------------------------------------

    def terminate(self) -> None:
        """Have all workers end as a server does, and start no more."""
        with self._changed:
            self._stopping = True
            workers = list(self._running.values())
            self._changed.notify_all()
        for worker in workers:
            worker.terminate()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all have ended; False after ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout)

    def _spawn(self, number: int) -> None:
        with self._changed:
            if self._stopping:
                return
            worker = self._running[number] = Worker(number, self._command, self._handlers)
        _log.info("worker %d is process %d", number, worker.process.pid)
        threading.Thread(target=self._watch, args=(worker,), name="worker", daemon=True).start()
        threading.Thread(target=self._join, args=(worker,), name="join", daemon=True).start()

    def _join(self, worker: Worker) -> None:
        """Bring a new worker to what the others serve, then let it listen."""
        try:
            while True:
                with self._changed:
                    missing = {key: path for key, path in self._served.items() if key not in worker.held}
                    extra = worker.held - self._served.keys()
                    if not missing and not extra:
                        self._members.append(worker)
                        listening = self._listening
                        self._changed.notify_all()
                        break
                for (name, version), path in missing.items():
                    worker.call("load", name=name, version=version, path=str(path)).result()
                    worker.call("serve", name=name, version=version).result()
                    worker.held.add((name, version))
                for name, version in extra:
                    worker.call("unload", name=name, version=version).result()
                    worker.held.discard((name, version))
            if listening:
                self.show()
                worker.call("listen").result()
        except Disconnected:
            pass  # It has ended, which another thread sees to.
        except SpikelessError as error:
            _log.error("worker %d cannot serve what the others do: %s", worker.number, error)
            worker.process.kill()

    def _watch(self, worker: Worker) -> None:
        """Wait for a worker's end, and start another one."""
        code = worker.process.wait()
        worker.connection.close()
        with self._changed:
            del self._running[worker.number]
            if worker in self._members:
                self._members.remove(worker)
            self._pages.end(worker.page)
            stopping = self._stopping
            if stopping and code not in _STOPPED:
                self.failures.append(f"worker {worker.number} ended with code {code} while it stopped")
            self._changed.notify_all()
        if stopping:
            return
        if time.monotonic() - worker.since > STEADY_SECONDS:
            self._ends[worker.number] = 0
        ends = self._ends[worker.number] = self._ends.get(worker.number, 0) + 1
        _log.error("worker %d has ended with code %d", worker.number, code)
        if ends >= MAX_ENDS:
            self._failed(
                Unavailable(f"worker {worker.number} has ended {ends} times, the last with code {code}")
            )
            return
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, _BACKOFF_SECONDS * 2 ** (ends - 1))
        self._spawn(worker.number)

    def _await_one(self) -> None:
        self._changed.wait_for(lambda: self._members or self._stopping)
        self._check_running()

    def _await_all(self) -> None:
        self._changed.wait_for(
            lambda: (
                self._stopping
                or self._flags.workers == sum(not worker.connection.is_closed for worker in self._members)
            )
        )
        self._check_running()

    def _check_running(self) -> None:
        if self._stopping:
            raise Unavailable("the server is stopping")


class SwitchedVersion:
    """A version that all workers serve."""

    def __init__(self, pool: WorkerPool, key: _Key) -> None:
        self._pool = pool
        self._key = key

    def close(self) -> None:
        self._pool.unload(self._key)


def _settle(futures: list[Future[Any]]) -> None:
    """Wait for answers; a worker that gives none is restarted and knows then."""
    for future in futures:
        with contextlib.suppress(SpikelessError, FutureTimeoutError):
            future.result(_PATIENCE_SECONDS)
