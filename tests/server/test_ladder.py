"""The ladder on a real server, with a model made for it, and what it refuses."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from rich.console import Console
from trained_models import spikeless

from spikeless import bench, launch
from spikeless.bench import capacity, ladder
from spikeless.bench.rungs import LADDER
from spikeless.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from spikeless.mapping import check


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
    assert re.search(
        r"^\+ load/unload threads \(1\): [0-2] of 2 reloads can be used", done.stderr, re.MULTILINE
    )
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


def test_a_model_whose_loads_take_long(tmp_path: Path) -> None:
    """Warming runs its second signature, which requests do not."""
    script = [sys.executable, str(ROOT / "benchmarks" / "make_embedding_model.py"), str(tmp_path / "made")]
    options = ["--size", "1MiB", "--versions", "1", "--requests", "30", "--steps", "3"]
    refused = subprocess.run([*script, *options], capture_output=True, text=True, timeout=200)
    assert refused.returncode == 1
    assert "--steps is for the kinds module and sparse" in refused.stderr
    assert not (tmp_path / "made").exists()

    options += ["--kind", "module"]
    made = subprocess.run([*script, *options], capture_output=True, text=True, timeout=200)
    assert made.returncode == 0, made.stderr
    verified = spikeless("warmup", "verify", tmp_path / "made" / "1", "--json")
    assert verified.returncode == 0, verified.stderr
    assert signatures(tmp_path / "made" / "1") == {"serving_default": 20, "steps": 1}
    assert signatures(tmp_path / "made" / "requests") == {"serving_default": 30}


def signatures(records: Path) -> dict[str, int]:
    """How often each signature is called by a file of records."""
    done = spikeless("warmup", "inspect", records, "--json")
    assert done.returncode == 0, done.stderr
    return collections.Counter(key for record in json.loads(done.stdout) for key in record["signatures"])


@pytest.mark.skipif(not launch.jemalloc_installed(), reason=launch.JEMALLOC_REMEDY)
def test_models_that_are_mapped_already_at_a_share_of_what_the_server_can_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models, out = tmp_path / "embedding", tmp_path / "results"
    script = [sys.executable, str(ROOT / "benchmarks" / "make_embedding_model.py"), str(models)]
    made = subprocess.run(
        [*script, "--size", "1MiB", "--kind", "module", "--versions", "1", "--mapped-only"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert made.returncode == 0, made.stderr
    assert sorted(path.name for path in models.iterdir()) == ["mapped", "optimized", "requests"]
    one, other = models / "mapped" / "1", models / "optimized" / "1"
    for file in (file for path in (one, other) for file in check(path, str(path)).files):
        assert (one / file.path).samefile(other / file.path), "what both have is on the disk once"

    # A rough search does here.
    search = functools.partial(capacity.find_capacity, seconds=1.0, narrow=1.0)
    monkeypatch.setattr(capacity, "find_capacity", search)
    settings = ladder.LadderSettings(
        [one, other],
        models / "requests",
        out,
        "command",
        rungs=tuple(rung for rung in LADDER if rung.key in ("stock", "mapped", "optimized")),
        rounds=1,
        publishes=1,
        publish_every=5,
        load_share=0.05,
    )
    try:
        summary = ladder.run(settings, Console(stderr=True)).read_text()
    except FailedPrecondition as error:
        if "cannot be loaded with a share" not in str(error):
            raise
        pytest.skip("this machine is too busy even for the first rate of the search")
    assert "Left out: stock, because no model is given that it could serve" in summary
    runs = {path.stem: bench.read_run(path) for path in out.glob("*.npz")}
    assert runs.keys() == {"mapped-1", "optimized-1"}
    (rate,) = {run.facts.settings.rate for run in runs.values()}
    (note,) = {note for run in runs.values() for note in run.facts.notes}
    assert note.startswith("the rate is 5% of what the server keeps up with, ")
    assert note[1:] in summary
    assert float(note.split(", ", 1)[1].partition("/s")[0]) * 0.05 == pytest.approx(rate, abs=0.1)
    assert "capacity: 50/s" in capsys.readouterr().err, "each rate that is tried is told"
    (out / "optimized-1.npz").unlink()
    ladder.run(dataclasses.replace(settings, resume=True), Console(stderr=True))
    assert bench.read_run(out / "optimized-1.npz").facts.settings.rate == rate, "nothing is searched again"


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
