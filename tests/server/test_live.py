"""What is shown while it happens: `bench run` and `status --watch`, on real servers."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench_runs import publish_boston
from harness import POLL
from terminal import Terminal
from trained_models import spikeless

from spikeless import launch
from spikeless.client import Client
from spikeless.formats.protos import predict_pb2
from spikeless.repository import publishing
from spikeless.warmup.records import read, warmup_file


@pytest.fixture
def models(saved_models: Path, tmp_path: Path) -> Path:
    return publish_boston(saved_models / "signatures", tmp_path)


@pytest.fixture
def server(models: Path, tmp_path: Path) -> Iterator[launch.ServerProcess]:
    monitoring = tmp_path / "monitoring.config"
    monitoring.write_text('prometheus_config { enable: true path: "/monitoring/prometheus/metrics" }')
    flags = (f"--monitoring_config_file={monitoring}", POLL)
    settings = launch.LaunchSettings("boston", models / "boston", flags=flags, rest=True)
    with launch.start(settings) as server:
        yield server


def publish(models: Path) -> None:
    publishing.publish(models.parent / "source", models, "boston", gates=())


def test_bench_shows_load_memory_and_the_moment_of_each_swap(models: Path, tmp_path: Path) -> None:
    load = ("--rate", 50, "--duration", 12, "--settle", 0.5, "--publish-at", 2, "--timeout", 60)
    place = ("--models", models, "--out", tmp_path / "raw", "--publish", tmp_path / "source")
    with Terminal("bench", "run", "boston", *load, *place, "--no-floor") as terminal:
        for text in ("v1 AVAILABLE", " s publish v2", " s v2 AVAILABLE", " s v1 END"):
            terminal.wait_for(text)
        assert terminal.end() == 0, terminal.shown
    for text in ("/s, p99 ", "private", "sent", "first request on the new version", "SLO "):
        assert text in terminal.shown
    assert "\x1b[" in terminal.raw, "the picture is drawn over itself"


def test_status_shows_each_change_as_it_happens(models: Path, server: launch.ServerProcess) -> None:
    metrics = f"{server.rest_url}/monitoring/prometheus/metrics"
    (record,) = list(read(warmup_file(models / "boston" / "1")))[:1]
    assert isinstance(record.request, predict_pb2.PredictRequest)
    record.request.model_spec.Clear()
    record.request.model_spec.name = "boston"
    with Terminal(
        "status", "boston", "--watch", "--models", models, "--servers", server.target, "--metrics", metrics
    ) as terminal:
        terminal.wait_for(f"boston 1 AVAILABLE on {server.target}")
        terminal.wait_for("private")
        with Client(server.target, timeout=60.0) as client:
            client.prediction.Predict(record.request)
        terminal.wait_for("p99 at most")
        publish(models)
        terminal.wait_for(f"boston 2 AVAILABLE on {server.target}")
        terminal.wait_for(f"boston 1 END on {server.target}")
        terminal.interrupt()
        assert terminal.end() == 0, terminal.shown


def test_without_a_terminal_each_change_is_a_line(models: Path, server: launch.ServerProcess) -> None:
    command = [sys.executable, "-m", "spikeless", "status", "--watch", "--models", str(models)]
    process = subprocess.Popen([*command, "--servers", server.target], stdout=subprocess.PIPE, text=True)
    lines: list[str] = []
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.endswith(f"boston 1 AVAILABLE on {server.target}\n"):
                publish(models)
            if line.endswith(f"boston 2 AVAILABLE on {server.target}\n"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 0
    assert not any("\x1b" in line for line in lines)
    assert any(line.endswith(" private") for line in lines)


def test_watching_is_for_people(tmp_path: Path) -> None:
    for options, message in (
        (("--watch", "--json"), "exclude each other"),
        (("--metrics", "http://x"), "--metrics is for --watch"),
    ):
        done = spikeless("status", *options, "--models", tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
    done = spikeless("status", "--watch", "--models", tmp_path / "nowhere")
    assert done.returncode == 1
