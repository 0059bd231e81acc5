"""What a call costs: each way is measured under each load, shown and documented."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import benchmark_scripts
import compatibility
import numpy as np
import pytest

from spikeless import launch
from spikeless.openloop.schedule import Schedule

serving = benchmark_scripts.fixture("serving")


def test_each_way_is_measured_under_each_load(
    serving: Any,
    saved_models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "serving.npz"
    command = ["serving.py", "--saved-model", str(saved_models / "signatures"), "--quick"]
    engine = launch.chosen_engine()
    beside = Path(engine).is_file()
    if beside:
        command += ["--server", engine]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(output)])
    serving.main()
    shown = capsys.readouterr().out

    result = serving.read(output)
    ways = {serving.GRPC, serving.GRPCIO, serving.REST, serving.FLASK}
    opened = {serving.GRPC, serving.INSTANT}
    if beside:
        ways |= {serving.SERVING, serving.SERVING_GRPCIO}
        opened |= {serving.SERVING}
    closed = {(way, clients) for way in ways for clients in (1, 2)}
    closed |= {(serving.BARE, 1), (serving.POLLING, 1), (serving.WORKERS, 2)}
    closed |= {(serving.SERVING_POLLING, 1)} if beside else set()
    assert result.closed.keys() == closed
    assert all(len(values) and values.all() for (values,) in result.closed.values())
    assert result.open.keys() == {(way, rate) for way in opened for rate in (50, 4000)} | {
        (serving.WORKERS, 4000)
    }
    for (way, rate), (values,) in result.open.items():
        assert len(values) == len(Schedule(rate, result.facts["seconds"], seed=0).offsets()), way
        assert values.any(), f"{way}: no call was answered"
    for way, load in [*result.closed, *result.open]:
        assert f"| {way} | {load:g} | " in shown or f"| {load:g} | {way} | " in shown

    tables = compatibility.serving_tables(serving, result)
    assert "\n| 4,000 | " in tables
    assert "gRPC, 2 workers, p50 (p99) ms" in tables
    monkeypatch.setattr(sys, "argv", ["serving.py", "--show", str(output)])
    serving.main()
    assert capsys.readouterr().out == shown


def test_a_call_that_failed_took_for_ever(serving: Any) -> None:
    values = np.array([3_000_000, 0, 1_000_000, 2_000_000], np.uint64)
    assert serving.milliseconds(values, 50) == 3.0
    assert serving.milliseconds(values, 99) == np.inf
