"""The exporter against a real server: states, reloads, errors, memory, over HTTP."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import POLL
from prometheus_client.parser import text_string_to_metric_families

from spikeless import launch
from spikeless.disk import proc
from spikeless.repository import models_config, publishing
from spikeless.repository.models_config import new_block, with_versions
from spikeless.sidecars.exporter import MAX_STATUS_AGE, Exporter, ExporterSettings

FAST = (POLL, "--max_num_load_retries=0")


@pytest.fixture
def models(saved_models: Path, tmp_path: Path) -> Path:
    publishing.publish(saved_models / "signatures", tmp_path / "models", "m")
    return tmp_path / "models"


@pytest.fixture
def server(models: Path, tmp_path: Path) -> Iterator[launch.ServerProcess]:
    settings = launch.LaunchSettings("m", models / "m", flags=FAST, log=tmp_path / "server.log")
    with launch.start(settings) as server:
        yield server


@pytest.fixture
def exporter(server: launch.ServerProcess, models: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "spikeless", "exporter", "--server", server.target, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--models", str(models), "--pid", str(server.pid)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    yield url
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    process.stdout.close()


def scrape(url: str) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of label names...) -> value."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    text = opener.open(url, timeout=60).read().decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_states_reloads_errors_and_memory(
    server: launch.ServerProcess, exporter: str, models: Path, saved_models: Path
) -> None:
    def value(*key: str) -> float | None:
        return scrape(exporter).get(key)

    def wait(expected: float, *key: str) -> None:
        """A poll may fail where the machine is busy; the next one finds it again."""
        server.wait_for(lambda: value(*key) == expected, f"{key} to be {expected}")

    wait(1, "spikeless_server_up")
    wait(1, "spikeless_version_state", "m", "AVAILABLE", "1")
    wait(0, "spikeless_version_state", "m", "LOADING", "1")
    assert value("spikeless_reloads_total", "m") == 0
    memory = proc.memory(server.pid)
    assert value("spikeless_memory_private_bytes") == pytest.approx(memory["RssAnon"], rel=0.1)
    assert value("spikeless_memory_mapped_bytes") == 0, "libraries are no parameters"

    publishing.publish(saved_models / "signatures", models, "m")
    available = ("spikeless_version_state", "m", "AVAILABLE")
    server.wait_for(lambda: value(*available, "2") == 1 and value(*available, "1") is None, "the swap")
    assert (value("spikeless_reloads_total", "m") or 0) > 0

    (models / "m" / "3").mkdir()
    (models / "m" / "3" / "saved_model.pb").write_bytes(b"no SavedModel")
    error = ("spikeless_version_error", "m")
    server.wait_for(
        lambda: any(key[0] == error[0] and key[-1] == "3" for key in scrape(exporter)), "the error"
    )
    wait(1, *available, "2")
    wait(1, "spikeless_versions_missing", "m")
    shutil.rmtree(models / "m" / "3")
    server.wait_for(
        lambda: not any(key[0] == error[0] for key in scrape(exporter)), "the error to be history"
    )

    wait(0, "spikeless_versions_missing", "m")
    # A server would load it, and answer nothing.
    (models / "m" / "2" / "variables").rename(models / "m" / "2" / "elsewhere")
    wait(1, "spikeless_versions_missing", "m")
    (models / "m" / "2" / "elsewhere").rename(models / "m" / "2" / "variables")
    wait(0, "spikeless_versions_missing", "m")
    block = new_block("m", str(models / "m"))
    models_config.edit(models, {"m": with_versions(block, [2, 7], {}), "gone": new_block("gone", "/gone")})
    server.wait_for(
        lambda: all(value("spikeless_versions_missing", name) == 1 for name in ("m", "gone")),
        "what models.config names to be missed",
    )

    server.stop()
    deadline = time.monotonic() + 60
    while value("spikeless_server_up") != 0:
        assert time.monotonic() < deadline, "the exporter has not noticed that the server is gone"
        time.sleep(0.05)
    assert value(*available, "2") is None, "states of a server that does not answer are not known"


def test_memory_from_a_copy_of_a_status_while_that_is_fresh(tmp_path: Path) -> None:
    copy = tmp_path / "status"
    exporter = Exporter(ExporterSettings("127.0.0.1:1", tmp_path / "models", status_file=copy))

    def memory() -> list[float]:
        metrics = [metric for metric in exporter.collect() if metric.name.startswith("spikeless_memory_")]
        return [sample.value for metric in metrics for sample in metric.samples]

    exporter.start()
    try:
        assert memory() == []
        copy.write_text("RssAnon:\t    2048 kB\nRssFile:\t  300000 kB\nMappedParameters: 4096 kB\n")
        assert memory() == [2 << 20, 4 << 20]
        os.utime(copy, (time.time() - MAX_STATUS_AGE - 1,) * 2)
        assert memory() == [], "whose memory it was is gone"
    finally:
        exporter.stop()


def test_one_way_to_see_the_process() -> None:
    command = [sys.executable, "-m", "spikeless", "exporter", "--pid", "1", "--status-file", "status"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--pid and --status-file" in done.stderr


def test_a_repository_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spikeless", "exporter", "--models", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"spikeless: error: {tmp_path / 'nowhere'} is no directory: give the repository with --models\n"
    )
