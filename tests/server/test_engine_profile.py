"""Where the processor time of a call goes: every part is found and counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import benchmark_scripts
import pytest

engine_profile = benchmark_scripts.fixture("engine_profile")


def test_each_part_of_a_call_is_timed(
    engine_profile: Any,
    saved_models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "profile.json"
    command = ["--saved-model", str(saved_models / "signatures"), "--metrics", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["engine_profile.py", *command, "--clients", "2", "--seconds", "2"])
    engine_profile.main()
    shown = capsys.readouterr().out
    result = json.loads(output.read_text())
    assert result["alone"]["calls"] > 0
    assert result["timed"]["calls"] > 0
    assert result["parts"].keys() == engine_profile.PARTS.keys()
    for part, row in result["parts"].items():
        assert row["entered"] > 0, part
        assert row["processor"] >= 0, part
        assert row["waiting"] >= 0, part
        assert f"| {part} |" in shown
    assert result["parts"]["session, without TensorFlow"]["entered"] == 1.0
    monkeypatch.setattr(sys, "argv", ["engine_profile.py", "--show", str(output)])
    engine_profile.main()
    assert capsys.readouterr().out == shown


def test_a_part_within_another_counts_for_itself(engine_profile: Any) -> None:
    clocks = engine_profile.Clocks()
    inner = clocks.timed("inner", lambda: sum(range(200_000)))
    clocks.timed("outer", lambda: [inner() for _ in range(20)])()
    inside, around = clocks.total("inner"), clocks.total("outer")
    assert (inside.entered, inside.left) == (20, 0)
    assert (around.entered, around.left) == (1, 20)
    assert 0 <= around.processor < inside.processor
    failing = clocks.timed("failing", lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        clocks.timed("outer", failing)()
    assert clocks.total("failing").entered == 1
    assert clocks.total("outer").entered == 2
