"""Every alert fires and stops, in a real Prometheus that scrapes a real server.

`prometheus.sooner` divides the durations of the rules, so that five minutes are fifteen
seconds. What the durations themselves do is shown by promtool, on made-up series.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import numpy as np
import prometheus
import pytest
import yaml
from fleet_models import NAME as FLEET
from harness import Running, ServerFactory, put_version
from places import ROOT
from prometheus import MONITORING, Prometheus
from small_versions import small_version

from spikeless.client import Client
from spikeless.errors import SpikelessError
from spikeless.formats.states import State
from spikeless.launch import free_port
from spikeless.repository import models_config
from spikeless.repository.models_config import new_block
from spikeless.store import promotions
from spikeless.store.pull import pull
from spikeless.store.push import push

NAME = "m"
FAST = {"x": np.asarray([1.0], np.float32)}
#: Some hundred milliseconds.
SLOW = {"steps": np.asarray(300, np.int32)}


def alerts() -> set[str]:
    rules = yaml.safe_load((MONITORING / "rules.yml").read_text())
    return {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}


def test_durations_are_those_of_the_file(programs: Path, tmp_path: Path) -> None:
    for source in (MONITORING / "rules.yml", ROOT / "tests" / "bundle" / "rules_test.yml"):
        shutil.copy(source, tmp_path)
    command = [str(programs / "promtool"), "test", "rules", "rules_test.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


class Callers:
    """Calls the model without a pause; which signature can be changed."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._slow = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._call)

    @contextmanager
    def running(self) -> Iterator[Callers]:
        self._thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            self._thread.join()

    @contextmanager
    def slowly(self) -> Iterator[None]:
        self._slow.set()
        try:
            yield
        finally:
            self._slow.clear()

    def _call(self) -> None:
        with Client(self._target, timeout=120) as client:
            while not self._ended.wait(0.01):
                try:
                    if self._slow.is_set():
                        client.predict(NAME, SLOW, "spin")
                    else:
                        client.predict(NAME, FAST)
                except SpikelessError:  # The server may just be stopped.
                    continue


class Faults:
    """For each alert a fault of a server: a context that ends when it is mended."""

    def __init__(
        self,
        running: Running,
        callers: Callers,
        models: Path,
        source: Path,
        monitor: Prometheus,
        store: str,
    ) -> None:
        self._running = running
        self._callers = callers
        self._models = models
        self._source = source
        self._monitor = monitor
        self._store = store

    @contextmanager
    def promotion_that_cannot_be_applied(self) -> Iterator[None]:
        """The server of a machine that follows a store does not answer."""
        promotions.promote(self._store, FLEET, 2)
        yield
        promotions.rollback(self._store, FLEET)

    @contextmanager
    def broken_version(self) -> Iterator[None]:
        """The newest version cannot be loaded, until its folder is removed."""
        version = self._models / NAME / "9"
        version.mkdir()
        (version / "saved_model.pb").write_bytes(b"no SavedModel")
        yield
        shutil.rmtree(version)

    @contextmanager
    def model_without_version(self) -> Iterator[None]:
        """models.config names a model that the server does not have."""
        blocks = {name: new_block(name, str(self._models / name)) for name in (NAME, "gone")}
        models_config.edit(self._models, blocks)
        yield
        (self._models / "models.config").unlink()

    @contextmanager
    def hung_server(self) -> Iterator[None]:
        os.kill(self._running.server.pid, signal.SIGSTOP)
        yield
        os.kill(self._running.server.pid, signal.SIGCONT)

    @contextmanager
    def slow_swap(self) -> Iterator[None]:
        """Requests become slow, and a version is swapped meanwhile."""
        p99 = f'model:request_latency_seconds:p99_1m{{model_name="{NAME}"}}'
        # What is usual is a median: it becomes slow when there were more slow seconds
        # than others, and a busy machine needs some to load a version.
        usual = f"count_over_time({p99}[60s]) > {40 / prometheus.INTERVAL:g}"
        self._monitor.wait_for(lambda: bool(self._monitor.query(usual)), "what is usual")
        with self._callers.slowly():
            self._monitor.wait_for(
                lambda: bool(self._monitor.query(f"{p99} > 3 * model:request_latency_seconds:p99_usual")),
                "slow requests",
            )
            put_version(self._source, self._models / NAME, 2)
            self._running.wait(NAME, {1: State.END, 2: State.AVAILABLE})
            yield


@pytest.mark.timeout(600)
def test_every_alert_fires_and_stops(
    programs: Path, serve: ServerFactory, saved_models: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    put_version(saved_models / "times_one", models / NAME, 1)
    monitoring = tmp_path / "monitoring.config"
    monitoring.write_text('prometheus_config { enable: true path: "/monitoring/prometheus/metrics" }')
    flags = (
        f"--monitoring_config_file={monitoring}",
        "--file_system_poll_wait_seconds=1",
        "--max_num_load_retries=0",
    )
    with ExitStack() as stack:
        running = stack.enter_context(
            serve(*flags, model_name=NAME, model_base_path=models / NAME, rest=True)
        )
        running.client.predict(NAME, SLOW, "spin")
        exporter = stack.enter_context(exporting(running, models))
        store = str(tmp_path / "store")
        follower = stack.enter_context(following(store, tmp_path))
        targets = {
            "model-server": running.rest_url.removeprefix("http://"),
            "exporter": f"{exporter},{follower}",
        }
        callers = stack.enter_context(Callers(running.server.target).running())
        monitor = stack.enter_context(prometheus.running(programs, tmp_path / "prometheus", targets))
        faults = Faults(running, callers, models, saved_models / "times_two", monitor, store)
        shown: set[str] = set()
        for fault, raised in (
            (faults.slow_swap, {"ReloadSpike"}),
            (faults.hung_server, {"ServerDown"}),
            (faults.broken_version, {"ModelLoadFailed", "ModelLoadAttemptsFail", "VersionNotServed"}),
            (faults.promotion_that_cannot_be_applied, {"PromotionNotApplied"}),
            (faults.model_without_version, {"ModelUnavailable", "VersionNotServed"}),
        ):
            show(monitor, fault, raised)
            shown |= raised
        assert shown == alerts()


def show(monitor: Prometheus, fault: Callable[[], AbstractContextManager[None]], raised: set[str]) -> None:
    """The alerts are silent before a fault, fire in it, and stop after it."""

    def silent() -> bool:
        return not any(map(monitor.firing, raised))

    monitor.wait_for(silent, f"{raised} to be silent before")
    with fault():
        begun = time.monotonic()
        # One may stop by itself while another is waited for.
        monitor.wait_for(
            lambda: all(monitor.fired(alert, time.monotonic() - begun) for alert in raised),
            f"{raised} to fire",
        )
    monitor.wait_for(silent, f"{raised} to stop")


@contextmanager
def exporting(running: Running, models: Path) -> Iterator[str]:
    """The exporter of a server; gives its ``host:port``."""
    command = [sys.executable, "-m", "spikeless", "exporter", "--server", running.server.target, "--port=0"]
    process = subprocess.Popen(
        [*command, "--models", str(models), "--pid", str(running.server.pid)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    try:
        yield url.removeprefix("http://").removesuffix("/metrics")
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


@contextmanager
def following(store: str, directory: Path) -> Iterator[str]:
    """A machine that follows a store; its ``host:port`` of metrics."""
    for number in (1, 2):
        push(small_version(directory / "trained", number, b"%d" % number), store)
    promotions.promote(store, FLEET, 1)
    pull(store, directory / "pulled")
    command = [sys.executable, "-m", "spikeless", "pull", store, "--models", str(directory / "pulled")]
    process = subprocess.Popen(
        [*command, "--follow", "--poll=200ms", f"--servers=127.0.0.1:{free_port()}", "--metrics-port=0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    url = process.stderr.readline().split()[-1]
    try:
        yield url.removeprefix("http://").removesuffix("/metrics")
    finally:
        process.terminate()
        process.communicate(timeout=60)
