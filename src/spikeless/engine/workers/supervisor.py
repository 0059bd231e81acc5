"""The process that leads workers: it decides what they serve, and serves nothing.

In: the values of flags. Out: ports on which workers listen. The configuration, labels
and versions are those of a `ServerCore`, whose loads happen in the workers.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from dataclasses import replace

from spikeless.engine import configuration
from spikeless.engine.configuration import ConfigFile
from spikeless.engine.core import ServerCore
from spikeless.engine.flags import ServerFlags
from spikeless.engine.server import Ports
from spikeless.engine.workers import view
from spikeless.engine.workers.pool import WorkerPool
from spikeless.engine.workers.replica import RELOAD
from spikeless.engine.workers.view import View
from spikeless.errors import Internal, SpikelessError, Unavailable
from spikeless.formats.protos import model_server_config_pb2
from spikeless.formats.states import State, VersionStatus

_log = logging.getLogger(__name__)


class Supervisor:
    """A server of several workers, used as `Server` is: start, wait, stop."""

    def __init__(self, flags: ServerFlags) -> None:
        configuration.check_named(flags)
        # The ports are taken as long as this process lives, so that workers which are
        # started again find them.
        self._sockets: list[socket.socket] = []
        self._flags = replace(
            flags,
            port=self._reserve(flags.host, flags.port),
            rest_api_port=self._reserve(flags.host, flags.rest_api_port) if flags.rest_api_port else 0,
        )
        self._pool = WorkerPool(self._flags, {RELOAD: self._reload}, self._view, self._end)
        # What loads yields in the workers; this process has nothing else to do.
        self.core = _Core(self._pool, replace(self._flags, load_threads_yield=False))
        self.core.add_listener(self._version_changed)
        self._news = threading.Event()
        self._stopping = threading.Event()
        self._stopped = threading.Event()
        self._failures: list[str] = []

    def start(self) -> Ports | None:
        """Have the models loaded, then listen; as `Server.start`."""
        try:
            config = configuration.initial(self._flags)
            self._pool.start()
            threading.Thread(target=self._tell_news, name="news", daemon=True).start()
            self.core.start(config)
            if self._stopping.is_set():
                return None
            self._pool.listen()
            ConfigFile(self._flags, self.core, self._stopping).start()
            return Ports(self._flags.port, self._flags.rest_api_port or None)
        except BaseException:
            self.stop(0.0)
            if self._failures:
                self.wait()
            raise

    def wait(self, timeout: float | None = None) -> bool:
        """As `Server.wait`."""
        stopped = self._stopped.wait(timeout)
        if self._failures:
            raise Internal("; ".join(self._failures))
        return stopped

    def drain(self, seconds: float) -> None:
        """As `Server.drain`: workers drain by themselves."""
        self._pool.terminate()
        self._pool.wait(seconds)

    def stop(self, grace: float) -> None:
        """Wait for the workers, which stop as servers do, by a grace of their own."""
        if self._stopping.is_set():
            self._stopped.wait()
            return
        self._stopping.set()
        self._news.set()
        self._pool.terminate()
        self._pool.wait()
        self._failures += self._pool.failures
        self.core.stop()
        for reserved in self._sockets:
            reserved.close()
        self._stopped.set()

    def _reload(self, config: str) -> None:
        """A worker was asked for another configuration."""
        self.core.reload_config(view.decode_config(config))

    def _view(self) -> View:
        return view.of(self.core, self.core.manager.names())

    def _version_changed(self, name: str, status: VersionStatus) -> None:
        if status.state is State.END:
            self._pool.forget(f'model_name="{name}"', f'version="{status.version}"')
        self._news.set()

    def _tell_news(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            if self._stopping.is_set():
                return
            self._pool.show()

    def _end(self, error: SpikelessError) -> None:
        """Have the process stopped, as it always is, because workers fail."""
        self._failures.append(str(error))
        os.kill(os.getpid(), signal.SIGTERM)

    def _reserve(self, host: str, port: int) -> int:
        """Take a port that nobody has, for several processes; returns its number."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as alone:
                # Without sharing it finds out whether somebody listens.
                alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                alone.bind(address)
                address = alone.getsockname()
            reserved = socket.socket(family, kind, protocol)
            self._sockets.append(reserved)
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            reserved.bind(address)
            return int(address[1])
        except OSError:
            raise Unavailable(f"cannot listen on {host}:{port}: is it right, and free?") from None


class _Core(ServerCore):
    """Whose changes are told to all workers before anybody hears that they are done."""

    def __init__(self, pool: WorkerPool, flags: ServerFlags) -> None:
        super().__init__(pool.load, flags)
        self._pool = pool

    def reload_config(self, config: model_server_config_pb2.ModelServerConfig) -> None:
        try:
            super().reload_config(config)
        finally:
            self._pool.show()
