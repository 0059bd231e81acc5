"""Machines of a fleet: each with a repository, a server, and a process that follows.

In: the URL of a store whose model (`promotion_models`) has a promoted version. Out:
machines that report in it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from promotion_models import NAME, start_server

from spikeless.errors import SpikelessError
from spikeless.launch import ServerProcess
from spikeless.store.objects import Store
from spikeless.store.pull import PullSettings, pull
from spikeless.store.reports import NodeModel, Reports

SECONDS = 120.0


def wait_for(reached: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not after {seconds:g} s: {what}"
        threading.Event().wait(0.05)


class Machine:
    """One machine, which pulls first, then serves, then follows."""

    def __init__(self, store: str, node: str, directory: Path) -> None:
        self.node = node
        self.models = directory / node / "models"
        self._url = store
        self._store = Store(store)
        self._log = directory / node / "pull.log"
        self.server: ServerProcess
        self._follower: subprocess.Popen[bytes]

    def start(self) -> None:
        """Come up, as after a boot."""
        pull(self._url, self.models, settings=PullSettings(node=self.node))
        monitoring = self.models.parent / "monitoring.config"
        monitoring.write_text('prometheus_config { enable: true path: "/monitoring/prometheus/metrics" }')
        self.server = start_server(self.models, f"--monitoring_config_file={monitoring}", rest=True)
        command = [
            sys.executable,
            "-m",
            "spikeless",
            "pull",
            self._url,
            NAME,
            "--follow",
            "--node",
            self.node,
        ]
        command += ["--models", str(self.models), "--servers", self.server.target, "--poll=200ms"]
        command += ["--report=200ms", f"--metrics={self.server.rest_url}/monitoring/prometheus/metrics"]
        with self._log.open("ab") as log:
            self._follower = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self) -> None:
        """Power off."""
        self._follower.kill()
        self._follower.wait()
        os.kill(self.server.pid, signal.SIGKILL)
        self.server.stop()

    def close(self) -> None:
        self._follower.terminate()
        self._follower.wait(timeout=60)
        self.server.stop()

    @property
    def log(self) -> str:
        return self._log.read_text()

    def reported(self) -> NodeModel | None:
        """What it says of the model; None where there is no report."""
        try:
            return Reports(self._store).read(self.node).model(NAME)
        except SpikelessError:
            return None

    def serves(self, version: int) -> bool:
        """Whether it says that callers get this version."""
        model = self.reported()
        return model is not None and model.labels == {"stable": version}

    def has(self, version: int) -> bool:
        """Whether a version is on its disk."""
        return (self.models / NAME / str(version)).exists()


@contextlib.contextmanager
def machines(store: str, directory: Path, nodes: tuple[str, ...], version: int) -> Iterator[list[Machine]]:
    """Machines that have said that they serve a version."""
    started: list[Machine] = []
    with contextlib.ExitStack() as stack:
        for node in nodes:
            machine = Machine(store, node, directory)
            machine.start()
            stack.callback(machine.close)
            started.append(machine)
        for machine in started:
            wait_for(lambda machine=machine: machine.serves(version), f"{machine.node} to serve {version}")  # type: ignore[misc]
        yield started
