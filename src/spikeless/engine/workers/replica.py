"""A worker's models: loaded, switched and unloaded as the leading process says.

In: commands by a socket. Out: models for requests, and what the leading process says of
them. Without that process a worker ends at once.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikeless.engine.flags import ServerFlags
from spikeless.engine.lending import Loaded, Shelf
from spikeless.engine.loader import ModelLoader
from spikeless.engine.manager import give_way
from spikeless.engine.served_models import ServedModels
from spikeless.engine.workers import view
from spikeless.engine.workers.connection import PeerConnection
from spikeless.engine.workers.view import View
from spikeless.formats.protos import model_server_config_pb2
from spikeless.formats.states import State, VersionStatus
from spikeless.runtime.model import Model

if TYPE_CHECKING:
    from spikeless.engine.metrics import Metrics

_log = logging.getLogger(__name__)
#: Methods of the leading process.
RELOAD, PAGE = "reload", "page"


class Replica(ServedModels):
    """The models of one worker: start, stop."""

    def __init__(
        self, loader: ModelLoader, flags: ServerFlags, leader: socket.socket, metrics: Metrics | None
    ) -> None:
        super().__init__()
        self._loader = loader
        self._yields = flags.load_threads_yield
        self._metrics = metrics
        self._shelf: Shelf[Model] = Shelf()
        self._loaded: dict[tuple[str, int], Loaded[Model]] = {}
        self._changing = threading.Condition()
        self._loading = 0
        self._view = View()
        self._listeners: list[Callable[[str, VersionStatus], None]] = []
        self._may_listen = threading.Event()
        self._listens = threading.Event()
        self._stopping = False
        handlers: dict[str, Callable[..., Any]] = {
            "load": self._load,
            "serve": self._serve,
            "unload": self._unload,
            "view": self._show,
            "listen": self._listen,
            "page": self._page,
        }
        in_order = ("serve", "view")
        self._leader = PeerConnection(leader, handlers, in_order, closed=_end)
        if metrics is not None:
            metrics.gather = self._gather

    def start(self) -> None:
        """Do as the leading process says, until it says to listen."""
        self._leader.start()
        self._may_listen.wait()

    def listens(self) -> None:
        """The ports are open."""
        self._listens.set()

    def stop(self) -> None:
        """Wait for running requests, and unload everything."""
        self._stopping = True
        self._may_listen.set()
        with self._changing:
            self._changing.wait_for(lambda: not self._loading)
        for name, version in list(self._loaded):
            self._unload(name, version)

    # --- for requests -----------------------------------------------------------------

    def available(self, name: str) -> list[int]:
        return [one.version for one in self.version_statuses(name) if one.state is State.AVAILABLE]

    def version_statuses(self, name: str) -> list[VersionStatus]:
        return self._view.statuses.get(name, [])

    def add_listener(self, listener: Callable[[str, VersionStatus], None]) -> None:
        self._listeners.append(listener)

    def reload_config(self, config: model_server_config_pb2.ModelServerConfig) -> None:
        self._leader.call(RELOAD, config=view.encode_config(config)).result()

    def _lend(self, name: str, version: int | None) -> AbstractContextManager[Model]:
        return self._shelf.use(name, version)

    def _gather(self) -> bytes:
        """The metrics of all workers."""
        page: str = self._leader.call(PAGE).result()
        return page.encode()

    # --- commands ---------------------------------------------------------------------

    def _load(self, name: str, version: int, path: str) -> None:
        """Load and warm up a version, which no request finds yet."""
        if self._yields and not self._shelf.is_empty():
            give_way()
        with self._changing:
            self._loading += 1
        try:
            loaded = Loaded(version, self._loader(name, version, Path(path)))
            with self._changing:
                self._loaded[name, version] = loaded
        finally:
            with self._changing:
                self._loading -= 1
                self._changing.notify_all()

    def _serve(self, name: str, version: int) -> None:
        with self._changing:
            self._shelf.put(name, self._loaded[name, version])

    def _unload(self, name: str, version: int) -> None:
        with self._changing:
            loaded = self._loaded.pop((name, version), None)
            self._shelf.withdraw(name, version)
        if loaded is None:
            return
        if self._yields and not self._stopping:
            give_way()
        loaded.retire()
        loaded.model.close()

    def _show(self, **message: Any) -> None:
        """Say from now on what the leading process says."""
        before, now = self._view, View.from_json(message)
        self._view = now
        self._config, self._labels = now.config, now.labels
        for name, statuses in now.statuses.items():
            known = {one.version: one for one in before.statuses.get(name, [])}
            for status in statuses:
                if repr(known.get(status.version)) != repr(status):
                    for listener in self._listeners:
                        listener(name, status)

    def _listen(self) -> None:
        self._may_listen.set()
        self._listens.wait()

    def _page(self) -> str:
        return "" if self._metrics is None else self._metrics.own_page().decode()


def _end() -> None:
    """Nobody is there who would say what to serve."""
    os._exit(1)
