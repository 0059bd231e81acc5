"""The soak: its bounds on made-up samples, and a short one on a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import benchmark_scripts
import pytest
from bench_runs import made_up_run, with_failures
from places import ROOT

soak = benchmark_scripts.fixture("soak")


def samples(soak: Any, **grown: int) -> list[Any]:
    """Two minutes of a server whose figures end higher by `grown`."""
    return [
        soak.Sample(
            t=float(second),
            quiet=second % 2 == 0,
            private_bytes=(100 << 20) + grown.get("private_bytes", 0) * (second > 90),
            threads=20 + grown.get("threads", 0) * (second > 90),
            descriptors=30 + grown.get("descriptors", 0) * (second > 90),
            # Steps may take more: only quiet samples count.
            mappings=500 + 10_000 * (second % 2),
            disk_bytes=1 << 30,
        )
        for second in range(120)
    ]


def test_growth_beyond_a_bound_is_found(soak: Any) -> None:
    steps = [soak.Step(1.0, 2.0, "promote", 2, ""), soak.Step(3.0, 4.0, "missing file", 3, "", "version 3")]
    run = made_up_run()
    found = {one.what: one for one in soak.findings(run, steps, samples(soak), 1 << 28, "")}
    assert all(one.held for one in found.values()), found
    grown = samples(soak, private_bytes=80 << 20, threads=30, descriptors=8)
    found = {one.what: one for one in soak.findings(run, steps, grown, 1 << 28, "")}
    assert {name for name, one in found.items() if not one.held} == {"private_bytes", "threads"}
    # 21 calls were in progress at once, for which a server may keep threads.
    assert (found["threads"].bound, found["threads"].found) == ("49", "20 to 50")


def test_failures_and_steps_that_went_wrong_are_found(soak: Any) -> None:
    steps = [soak.Step(1.0, 2.0, "bad warmup", 2, "a version with a fault (bad warmup) was promoted")]
    found = soak.findings(with_failures(made_up_run(), 2), steps, samples(soak), 1 << 20, "")
    assert [one.what for one in found if not one.held] == [
        "failed requests",
        "steps that went wrong",
        "broken versions refused by name",
        "disk_bytes",
    ]
    text = soak.summary(made_up_run(), steps, found)
    assert "| failed requests | 0 | 2 of 4,000 | NO |" in text
    assert "- bad warmup 2: a version with a fault (bad warmup) was promoted" in text
    unknown = soak.findings(made_up_run(), [], [], 1, "")
    assert not any(one.held for one in unknown[4:]), "nothing is known"


def test_a_failed_load_must_be_in_the_log_of_the_server(soak: Any) -> None:
    steps = [soak.Step(1.0, 2.0, "bad warmup", 5, "", "m-canary version 5 cannot be loaded")]
    for log, held in (
        ("2026-01-02 03:04:05.6 I manager: servable version {name: m-canary version: 5}: START\n", False),
        ("2026-01-02 03:04:05.6 E manager: servable version {name: m-canary version: 15}: END: no\n", False),
        ("2026-01-02 03:04:05.6 E manager: servable version {name: m-canary version: 5}: END: no\n", True),
        ("2026-01-02 03:04:05.6: E retrier.cc:37] Loading servable: {name: m version: 5} failed: no\n", True),
    ):
        found = soak.findings(made_up_run(), steps, samples(soak), 1 << 28, log)
        assert [one.held for one in found if "log" in one.what] == [held], log


@pytest.mark.timeout(600)
def test_a_short_soak_fails_no_request(tmp_path: Path) -> None:
    """Each kind of step; growth is not judged, for which it is too short."""
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--duration", "40s", "--every", "5s"]
    command += ["--size", "1MiB", "--rate", "20", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=540)
    content = json.loads((tmp_path / "out" / "soak.json").read_text())
    assert [step["wrong"] for step in content["steps"] if step["wrong"]] == [], done.stdout
    actions = [step["action"] for step in content["steps"]]
    planned = ["promote", "rollback", "missing file", "killed promote", "promote", "bad warmup", "promote"]
    # On a slow machine the load is over before the last of them.
    assert len(actions) >= 4
    assert actions == planned[: len(actions)]
    assert "| failed requests | 0 | 0 of " in done.stdout
    for step in content["steps"]:
        assert bool(step["message"]) == (step["action"] in ("missing file", "bad warmup"))
    assert content["samples"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "private_bytes" in page
    assert (tmp_path / "out" / "load.npz").is_file()
    written = (tmp_path / "out" / "summary.md").read_text()
    (tmp_path / "out" / "summary.md").unlink()
    again = [sys.executable, command[1], "--show", str(tmp_path / "out")]
    assert subprocess.run(again, capture_output=True, timeout=300).returncode == done.returncode
    assert (tmp_path / "out" / "summary.md").read_text() == written
