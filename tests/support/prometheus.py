"""A real Prometheus, from the distribution's package, with rules that run faster.

In: the shipped configuration and rules. Out: ``programs``, the folder of ``prometheus``
and ``promtool``; ``Prometheus``, a server on loopback whose rules are those of the file
with every duration divided by `SPEED`. Tests are skipped, with the reason, where there
is neither an installed Prometheus nor its package.

The package is unpacked below the cache, not installed: its service is not wanted.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine import cache_folder
from places import ROOT

from spikeless import launch

MONITORING = ROOT / "docker" / "monitoring"
SPEED = 20
#: Seconds between scrapes and evaluations; of the shipped configuration, 5.
INTERVAL = 0.5
_UNITS = {"s": 1, "m": 60, "h": 3600}
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="session")
def programs() -> Path:
    """The folder of ``prometheus`` and ``promtool``."""
    if (installed := shutil.which("prometheus")) and shutil.which("promtool"):
        return Path(installed).parent
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("there is no Prometheus, and no package of it")
    folder = cache_folder() / "prometheus"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        root = folder / "root"
        if not root.is_dir():
            partial = folder / "partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                _run("apt-get", "download", "prometheus", cwd=partial)
                (package,) = partial.glob("prometheus_*.deb")
                _run("dpkg-deb", "--extract", package, partial / "root")
            except subprocess.CalledProcessError as error:
                pytest.skip(f"there is no Prometheus, and its package cannot be had: {error.stderr}")
            (partial / "root").rename(root)
            shutil.rmtree(partial)
    return root / "usr" / "bin"


def _run(*command: object, cwd: Path | None = None) -> None:
    subprocess.run(list(map(str, command)), cwd=cwd, check=True, capture_output=True, text=True, timeout=300)


def sooner(text: str) -> str:
    """Rules in which every duration is divided by `SPEED`."""

    def divided(match: re.Match[str]) -> str:
        milliseconds = int(match[2]) * _UNITS[match[3]] * 1000 // SPEED
        return f"{match[1]}{milliseconds}ms"

    return re.sub(r"(\[|offset |for: )(\d+)([smh])\b", divided, text)


class Prometheus:
    """A running Prometheus and what it says."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self._process = process
        self._url = url
        self._log = log

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an instant query finds."""
        query = urllib.parse.urlencode({"query": expression})
        answer = json.loads(_OPENER.open(f"{self._url}/api/v1/query?{query}", timeout=60).read())
        assert answer["status"] == "success", (expression, answer)
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def firing(self, alert: str) -> bool:
        return bool(self.query(f'ALERTS{{alertname="{alert}", alertstate="firing"}}'))

    def fired(self, alert: str, seconds: float) -> bool:
        """Whether it fired in the last so many seconds."""
        window = f"[{max(1, round(seconds * 1000))}ms]"
        return bool(self.query(f'last_over_time(ALERTS{{alertname="{alert}", alertstate="firing"}}{window})'))

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a state; a Prometheus that ends fails the wait at once."""
        deadline = time.monotonic() + 240
        while not condition():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, f"waited for {what}; {self.query('ALERTS')}"
            time.sleep(0.1)


@contextmanager
def running(programs: Path, folder: Path, targets: dict[str, str]) -> Iterator[Prometheus]:
    """Prometheus as it is shipped, with these targets for its jobs, and sooner.

    A job may have several, with commas between them.
    """
    settings = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    settings["global"] = dict.fromkeys(("scrape_interval", "evaluation_interval"), f"{INTERVAL * 1000:g}ms")
    jobs = {job["job_name"]: job for job in settings["scrape_configs"]}
    assert jobs.keys() == targets.keys()
    for name, target in targets.items():
        jobs[name]["static_configs"] = [{"targets": target.split(",")}]
    folder.mkdir()
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    (folder / "rules.yml").write_text(sooner((MONITORING / "rules.yml").read_text()))
    address, log = f"127.0.0.1:{launch.free_port()}", folder / "log"
    command = [
        programs / "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        f"--query.lookback-delta={300 // SPEED}s",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output)
    prometheus = Prometheus(process, f"http://{address}", log)

    count = sum(len(several.split(",")) for several in targets.values())

    def scrapes() -> bool:
        try:
            return len(prometheus.query("up == 1")) == count
        except OSError:
            return False

    try:
        prometheus.wait_for(scrapes, "all targets")
        yield prometheus
    finally:
        process.terminate()
        process.wait(60)
