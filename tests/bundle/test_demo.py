"""The demo, whole and real, with less load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from spikeless import bench, demo

pytestmark = pytest.mark.xdist_group("demo")  # one demo serves all of these tests


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The report's page and what the terminal showed."""
    reports = tmp_path_factory.mktemp("reports")
    command = [sys.executable, "-m", "spikeless", "demo", "--reports", str(reports)]
    result = subprocess.run(
        [*command, "--rate", "100", "--duration", "9s", "--repeats", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (page,) = reports.glob("*/index.html")
    return page, result.stdout


def test_both_scenarios_swap_under_load_and_no_request_fails(done: tuple[Path, str]) -> None:
    page, _ = done
    for scenario in demo.SCENARIOS:
        run = bench.read_run(page.parent / "results" / f"{scenario.replace(' ', '-')}-1.npz")
        summary = bench.analyse(run)
        assert run.facts.scenario == scenario
        assert summary.failed == 0
        assert set(run.requests["version"].tolist()) == {1, 2}
        assert {change.state for change in run.facts.states if change.version == 2} >= {"AVAILABLE"}


def test_only_one_scenario_has_warmup_files(done: tuple[Path, str]) -> None:
    page, _ = done
    warmed = {
        path.relative_to(page.parent / "models").parts[0]
        for path in (page.parent / "models").glob("*/boston/*/assets.extra/tf_serving_warmup_requests")
    }
    assert warmed == {"warmup-1"}
    warm, cold = (page.parent / "logs" / f"{name}-1.log" for name in ("warmup", "no-warmup"))
    assert "warmed boston version 2 with" in warm.read_text()
    assert "warmed boston version 2 with 0 records" in cold.read_text()


def test_the_terminal_ends_with_the_table_and_the_place_of_the_report(done: tuple[Path, str]) -> None:
    page, output = done
    assert "SLO " in output
    for label in ("reload p99.9", "steady p99.9", "first request on the new version", "failed requests"):
        assert label in output
    assert str(page) in output.replace("\n", "")


def test_outside_a_clone_it_says_so(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "spikeless", "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert "run the demo in a clone of the project" in result.stderr
    assert not list(tmp_path.iterdir())
