"""The ladder on a real server, with a model made for it, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from rich.console import Console
from trained_models import spikeless

from spikeless import bench
from spikeless.bench import ladder
from spikeless.bench.rungs import LADDER
from spikeless.errors import AlreadyExists, InvalidArgument


def test_a_ladder_of_one_rung(tmp_path: Path) -> None:
    models, out = tmp_path / "embedding", tmp_path / "results"
    script = [sys.executable, str(ROOT / "benchmarks" / "make_embedding_model.py"), str(models)]
    made = subprocess.run(
        [*script, "--size", "1MiB", "--kind", "module"], capture_output=True, text=True, timeout=200
    )
    assert made.returncode == 0, made.stderr
    before = sorted(models.rglob("*"))

    load = (
        "--rounds",
        1,
        "--publishes",
        2,
        "--publish-every",
        5,
        "--rate",
        50,
        "--requests",
        models / "requests",
        "--engine-note",
        "made by hand",
    )
    arguments = ("bench", "ladder", models / "1", models / "2", "--title", "tiny", "--rung", "threads", *load)
    done = spikeless(*arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["summary.md", "threads-1.npz"]
    summary = (out / "summary.md").read_text()
    assert summary.startswith("# results\n")
    assert "spikeless bench ladder" in summary
    assert "| | + load/unload threads |" in summary
    run = bench.read_run(out / "threads-1.npz")
    assert "--num_load_threads=1" in run.facts.server.command
    assert len(run.facts.publishes) == 2
    assert run.facts.floor is not None
    assert run.facts.server.engine_note == "made by hand"
    assert sorted(models.rglob("*")) == before, "nothing is left beside the models"

    assert "Goal: p99 and p99.9 during reloads at most 1.1 x" in summary
    (out / "summary.md").unlink()
    before_resuming = (out / "threads-1.npz").stat()
    resumed = spikeless(*arguments, "--out", out, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert (out / "summary.md").exists()
    assert (out / "threads-1.npz").stat() == before_resuming, "what is there is not measured again"
    other = spikeless(*arguments, "--out", out, "--resume", "--rate", 60)
    assert other.returncode == 1
    assert "threads-1.npz is the result of another load" in other.stderr

    again = spikeless(*arguments, "--out", out)
    assert again.returncode == 1
    assert "is there already and is not overwritten" in again.stderr
    again = subprocess.run(script, capture_output=True, text=True, timeout=200)
    assert again.returncode == 1
    assert "is there already" in again.stderr


def test_the_load_of_a_ladder() -> None:
    settings = ladder.LadderSettings([Path("model")], Path("requests"), Path("out"), "command")
    first, second = settings.load(1), settings.load(2)
    assert first.publish_moments == (9, 19, 29, 39, 49)
    assert first.seconds == 53
    assert first.seed != second.seed, "another load in each round"
    with pytest.raises(InvalidArgument, match="a rung"):
        ladder.LadderSettings([Path("model")], Path("requests"), Path("out"), "command", rungs=())


def test_results_are_not_overwritten_and_rungs_that_cannot_be_run_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spikeless.launch.jemalloc_installed", lambda: False)
    jemalloc = next(rung for rung in LADDER if rung.key == "jemalloc")
    settings = ladder.LadderSettings(
        [Path("model")], Path("requests"), tmp_path / "out", "command", rungs=(jemalloc,)
    )
    with pytest.raises(InvalidArgument, match="none of the rungs"):
        ladder.run(settings, Console(quiet=True))
    (tmp_path / "out").mkdir()
    with pytest.raises(AlreadyExists):
        ladder.run(settings, Console(quiet=True))
