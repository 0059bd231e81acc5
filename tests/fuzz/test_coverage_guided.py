"""Every fuzz target for a few seconds; ``make fuzz`` takes its time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("coverage_guided.py")
TARGETS = (
    *("json", "tensor", "request", "infer_json", "infer_message"),
    *(
        "http2",
        "http2_answer",
        "tfrecord",
        "warmup",
        "checkpoint",
        "rest",
        "store",
        "version",
        "models_config",
    ),
)

pytest.importorskip("atheris", reason="atheris has no wheel for this Python or machine")


@pytest.mark.parametrize("target", TARGETS)
def test_whatever_is_read_ends_in_a_value_or_a_proper_error(target: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), target, "-runs=30000", "-seed=1", "-max_total_time=4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DONE" in done.stderr, "it ran"


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "x"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "usage:" in done.stderr
    assert all(target in done.stderr for target in TARGETS)
