"""Captured calls are replayed against a server, at the times at which they arrived."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from bench_runs import publish_boston
from trained_models import spikeless

from spikeless import bench, launch
from spikeless.bench.replayed import read_requests
from spikeless.errors import Code
from spikeless.openloop.loop import OpenLoop
from spikeless.sidecars.capture import Capture, CaptureSettings
from spikeless.sidecars.recording import RecorderSettings
from spikeless.warmup.records import warmup_file

RUN = ("--settle", "0s", "--timeout", "60s", "--no-floor", "--json")


@pytest.fixture(scope="module")
def captured(saved_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``models`` and ``calls``: 60 calls in bursts of 20."""
    directory = tmp_path_factory.mktemp("captured")
    models = publish_boston(saved_models / "signatures", directory)
    offsets = np.concatenate([burst + np.arange(20) * 0.01 for burst in (0.0, 1.0, 2.0)])
    requests = read_requests(warmup_file(models / "boston" / "1"), "boston")
    recorder = RecorderSettings(directory / "calls", per_shape=1000)
    settings = launch.LaunchSettings("boston", models / "boston", flags=bench.SERVER_FLAGS)
    with launch.start(settings) as server:
        capture = Capture(CaptureSettings(server.target, "127.0.0.1:0", recorder, sample=1.0))
        port = capture.start()
        load = OpenLoop(offsets, requests, f"127.0.0.1:{port}", 60)
        load.run(time.monotonic())
        capture.stop()
    assert set(load.columns.ended()["code"]) == {Code.OK}
    return directory


def test_a_capture_is_replayed_at_twice_the_speed(captured: Path, tmp_path: Path) -> None:
    recording = bench.read_recording(captured / "calls", "boston")
    assert len(recording.offsets) == 60
    places = ("--models", captured / "models", "--out", tmp_path, "--replay", captured / "calls")
    done = spikeless("bench", "run", "boston", *places, "--speed", "2x", "--processes", 2, *RUN)
    assert done.returncode == 0, done.stderr
    run = bench.read_run(json.loads(done.stdout)["result"])
    assert set(run.requests["code"]) == {Code.OK}
    np.testing.assert_allclose(run.requests["intended"], recording.offsets / 2)
    assert run.requests["request"].tolist() == recording.numbers.tolist()
    assert (run.facts.settings.arrivals, run.facts.settings.speed) == ("recorded", 2.0)
    assert run.facts.settings.rate == pytest.approx(recording.rate * 2)


def test_a_capture_of_grpc_is_replayed_over_http(captured: Path, tmp_path: Path) -> None:
    recording = bench.read_recording(captured / "calls", "boston")
    places = ("--models", captured / "models", "--out", tmp_path, "--replay", captured / "calls")
    done = spikeless("bench", "run", "boston", *places, "--protocol", "rest", *RUN)
    assert done.returncode == 0, done.stderr
    run = bench.read_run(json.loads(done.stdout)["result"])
    assert set(run.requests["code"]) == {Code.OK}
    np.testing.assert_allclose(run.requests["intended"], recording.offsets)
    assert run.requests["request"].tolist() == recording.numbers.tolist()
    assert (run.facts.settings.protocol, run.facts.settings.arrivals) == ("rest", "recorded")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rate", 5), "leave --rate out"),
        (("--requests", "x"), "leave --requests out"),
        (("--load", "70%"), "leave --load out"),
        (("--duration", "1h"), "--duration is longer"),
        (("--speed", "0x"), "'0x' is no speed: say 2x"),
    ],
)
def test_a_recording_has_its_own_load(captured: Path, options: tuple[object, ...], message: str) -> None:
    places = ("--models", captured / "models", "--replay", captured / "calls")
    done = spikeless("bench", "run", "boston", *places, *RUN, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert spikeless("bench", "run", "boston", "--speed", "2x").returncode == 2, "without a recording"
