"""The server as the image starts it: ``docker/entrypoint``, without a container.

In: a model repository, flags and variables. Out: a running `Container` with a client,
on whichever engine is tested.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import ENGINE, IS_EMBEDDED, states
from places import ROOT
from promotion_models import X

from spikeless import launch
from spikeless.client import Client
from spikeless.errors import SpikelessError
from spikeless.formats.states import State


class Container:
    """What the entrypoint started, without a container around it."""

    def __init__(self, models: Path, *flags: str, **environment: str) -> None:
        self.temporary = models.parent / "tmp"
        self.temporary.mkdir()
        self.log = models.parent / "entrypoint.log"
        self.port, rest = launch.free_port(), launch.free_port()
        monitoring = models.parent / "monitoring.config"
        monitoring.write_text("prometheus_config { enable: true }")
        path = [str(Path(sys.executable).parent), str(ROOT / "docker"), str(ROOT / "src" / "spikeless")]
        if not IS_EMBEDDED:
            path.insert(0, str(Path(ENGINE).parent))
        self.environment = {
            **os.environ,
            "PATH": ":".join([*path, os.environ["PATH"]]),
            "TMPDIR": str(self.temporary),
            "MODEL_BASE_PATH": str(models),
            "SPIKELESS_ENGINE": "embedded" if IS_EMBEDDED else "tensorflow_serving",
            "SPIKELESS_ALLOCATOR": "glibc",
            **environment,
        }
        self._command = [
            str(ROOT / "docker" / "entrypoint"),
            f"--port={self.port}",
            f"--rest_api_port={rest}",
            f"--monitoring_config_file={monitoring}",
            *(["--host=127.0.0.1"] if IS_EMBEDDED else []),
            *flags,
        ]
        self.target = f"127.0.0.1:{self.port}"
        self.client = Client(self.target, timeout=60.0)
        self.start()

    def start(self) -> None:
        """Start it, again if it has ended; the log goes on."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a state; a container that ends fails the wait at once."""

        def reached() -> bool:
            try:
                return condition()
            except SpikelessError:
                return False

        for _ in range(1200):
            if reached():
                return
            try:
                code = self.process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            pytest.fail(f"ended with {code} while waiting for {what}:\n{self.log.read_text()}")
        pytest.fail(f"waited in vain for {what}:\n{self.log.read_text()}")

    def wait_states(self, name: str, **expected: State) -> None:
        wanted = {int(version.lstrip("v")): state for version, state in expected.items()}
        self.wait_for(
            lambda: wanted.items() <= states(self.client, name).items(), f"{name} to reach {expected}"
        )

    def answers(self, name: str, **spec: str) -> float:
        return float(self.client.predict(name, {"x": X}, **spec)["y"][0, 0])  # type: ignore[arg-type]

    def health(self) -> tuple[int, str]:
        """What the container's health check says."""
        done = subprocess.run(
            [ROOT / "docker" / "health"], env=self.environment, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout

    def server_pid(self) -> int:
        return int((self.temporary / "spikeless-pid").read_text())


@contextmanager
def container(models: Path, *flags: str, **environment: str) -> Iterator[Container]:
    running = Container(models, *flags, **{"DRAIN": "0", **environment})
    try:
        yield running
    finally:
        running.client.close()
        if running.process.poll() is None:
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()
