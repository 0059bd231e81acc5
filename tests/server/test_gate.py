"""The gate as a command: on the demo's model, and on results that it reads."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from bench_runs import made_up_run, with_failures
from trained_models import spikeless

from spikeless import bench
from spikeless.repository import publishing


def test_the_model_of_the_demo_is_swapped_without_a_regression(boston_run: Path, tmp_path: Path) -> None:
    """With limits that only a real regression breaks; a slow machine is none."""
    model, models = boston_run / "saved_model", tmp_path / "models"
    publishing.publish(model, models, "boston", gates=())
    limits = ("--slo", "p50=2s", "--slo", "p99=10s", "--spike-ratio", 1000, "--errors", 0)
    load = ("--rate", 100, "--duration", "27s", "--publishes", 6, "--timeout", "1m", "--no-floor")
    places = ("--models", models, "--out", tmp_path / "raw", "--junit", tmp_path / "gate.xml")
    done = spikeless("bench", "gate", "boston", "--publish", model, *limits, *load, *places, "--json")
    assert done.returncode in (0, 3), f"{done.stdout}\n{done.stderr}"
    judgement = json.loads(done.stdout)
    outcomes = {check["name"]: check["outcome"] for check in judgement["checks"]}
    assert outcomes["failed requests"] == outcomes["failed loads"] == "held"
    assert "broken" not in outcomes.values(), judgement
    assert judgement["reloads"] == 6
    assert (judgement["outcome"] == "held") == (done.returncode == 0)
    suites = ElementTree.parse(tmp_path / "gate.xml").getroot()
    assert suites.get("failures") == "0"
    (result,) = (tmp_path / "raw").glob("*.npz")
    assert len(bench.read_run(result).facts.publishes) == 6


@pytest.fixture
def results(tmp_path: Path) -> Path:
    run = made_up_run("swap", *[50.0] * 6, rate=1000)
    run.save(tmp_path / "run.npz")
    with_failures(run, 2).save(tmp_path / "failed.npz")
    made_up_run("swap", *[50.0] * 3).save(tmp_path / "few.npz")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--run run.npz --slo p99.9=60ms --spike-ratio 60 --baseline run.npz", 0, "Held: swap, 6 of 6"),
        ("--run run.npz --slo p99.9=60ms --spike-ratio 1.5", 1, "Broken: swap, 6 of 6 reloads."),
        ("--run failed.npz --slo p99.9=60ms", 1, "failed requests: 2 UNAVAILABLE"),
        ("--run failed.npz --slo p99.9=60ms --errors 2", 0, "Held"),
        ("--run few.npz --slo p99.9=60ms", 3, "Too noisy to tell: swap, 3 of 3 reloads."),
    ],
)
def test_the_exit_code_is_the_verdict(results: Path, options: str, code: int, message: str) -> None:
    files = ("--markdown", results / "gate.md", "--junit", results / "gate.xml")
    done = spikeless("bench", "gate", *options.split(), *files, cwd=results)
    assert done.returncode == code, done.stderr
    assert message in done.stdout
    assert message.partition(": ")[0] in (results / "gate.md").read_text()
    assert ElementTree.parse(results / "gate.xml").getroot().tag == "testsuites"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--slo p99=1s", 2, "give --publish or --publish-command to measure swaps, or --run to read them"),
        ("a --run run.npz --publish .", 2, "give --publish or --publish-command"),
        ("--publish .", 2, "NAME is the model to measure"),
        ("a --run run.npz", 2, "NAME is the model to measure"),
        ("--run run.npz --slo p99.9", 2, "'p99.9' is no limit: say p99.9=20ms"),
        ("--run run.npz --slo p99=fast", 2, "'fast' is no duration"),
        ("--run run.npz --slo p95=1s", 1, "no figure 'p95': choose one of p50, p99, p99.9, max"),
        ("--run run.npz --slo p99=1s --junit no/where.xml", 1, "its directory does not exist"),
        ("--run nowhere.npz --slo p99=1s", 1, "nowhere.npz cannot be read"),
    ],
)
def test_what_is_wrong_is_told(results: Path, options: str, code: int, message: str) -> None:
    done = spikeless("bench", "gate", *options.split(), cwd=results)
    assert done.returncode == code
    assert message in done.stderr
