"""What happens to versions under load, on a real server: each event of `bench run`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench_runs import publish_boston
from places import ROOT
from trained_models import spikeless

from spikeless import bench
from spikeless.errors import Code
from spikeless.repository import layout, publishing
from spikeless.repository.journal import Journal, Removed

LOAD = ("--rate", 50, "--settle", "1s", "--timeout", "60s", "--no-floor", "--json")


def run(directory: Path, *options: object) -> tuple[bench.Run, bench.Summary, str]:
    """Its record, what it shows, and what it printed meanwhile."""
    places = ("--models", directory / "models", "--out", directory / "raw", "--publish", directory / "source")
    done = spikeless("bench", "run", "boston", *LOAD, *places, *options)
    assert done.returncode == 0, done.stderr
    found = bench.read_run(json.loads(done.stdout)["result"])
    assert set(found.requests["code"]) == {Code.OK}
    return found, bench.analyse(found), done.stderr


def test_old_versions_are_unloaded_alone(saved_models: Path, tmp_path: Path) -> None:
    """Three are loaded, and the newest answers all along; two are unloaded."""
    models = publish_boston(saved_models / "signatures", tmp_path)
    options = ("--event", "unload", "--publishes", 2, "--duration", "16s")
    record, summary, told = run(tmp_path, *options)
    assert [publish.version for publish in record.facts.publishes] == [2, 3]
    assert set(record.requests["version"]) == {4}
    before = {change.version for change in record.facts.states if change.state == "AVAILABLE"}
    assert before == {2, 3, 4}, "version 1 was there before and is not loaded"
    assert [reload.what for reload in summary.reloads] == ["unload v2", "unload v3"]
    assert all(reload.happened for reload in summary.reloads), summary.notes
    assert any(line.endswith(" s unload v2") for line in told.splitlines())
    assert sorted(layout.versions(models, "boston")) == [1, 4]
    removed = [entry.version for entry in Journal(models, "boston").entries() if isinstance(entry, Removed)]
    assert removed == [2, 3]
    assert not list((models / "boston").glob("**/trash"))


def test_an_event_under_a_load_over_http(saved_models: Path, tmp_path: Path) -> None:
    publish_boston(saved_models / "signatures", tmp_path)
    options = ("--event", "unload", "--publishes", 1, "--duration", "8s", "--protocol", "rest")
    record, summary, _ = run(tmp_path, *options)
    assert record.facts.settings.protocol == "rest"
    assert [publish.version for publish in record.facts.publishes] == [2]
    (reload,) = summary.reloads
    assert reload.what == "unload v2"
    assert reload.happened, summary.notes
    assert any((change.version, change.state) == (2, "END") for change in record.facts.states)


def test_a_storm_of_versions(saved_models: Path, tmp_path: Path) -> None:
    """One a second; the load ends when the newest one is served alone."""
    models = publish_boston(saved_models / "signatures", tmp_path)
    options = ("--event", "storm", "--publishes", 6, "--publish-at", "3s", "--duration", "24s")
    record, summary, _ = run(tmp_path, *options)
    begins = [publish.begin for publish in record.facts.publishes]
    assert len(begins) == 6
    assert all(begin >= 3 + number for number, begin in enumerate(begins))
    assert summary.published == 6
    assert 1 <= summary.loaded <= 6
    (reload,) = summary.reloads
    assert reload.new_version == 7, reload.incomplete
    assert 7 in summary.served
    assert summary.memory_peak
    assert sorted(layout.versions(models, "boston")) == list(range(1, 8))


def test_how_soon_servers_answer(tmp_path: Path) -> None:
    """Each round of the ladder is one start of each rung, with and without warmup."""
    models, out = tmp_path / "embedding", tmp_path / "results"
    script = [sys.executable, str(ROOT / "benchmarks" / "make_embedding_model.py"), str(models)]
    made = subprocess.run(
        [*script, "--size", "1MiB", "--kind", "module"], capture_output=True, text=True, timeout=200
    )
    assert made.returncode == 0, made.stderr
    ladder = ("bench", "ladder", models / "1", "--requests", models / "requests", "--title", "starts")
    options: tuple[object, ...] = ("--event", "start", "--rounds", 2, "--rate", 50, "--out", out)
    options += ("--rung", "stock", "--rung", "warmup")
    done = spikeless(*ladder, *options)
    assert done.returncode == 0, done.stderr
    assert sorted(file.stem for file in out.glob("*.npz")) == ["stock-1", "stock-2", "warmup-1", "warmup-2"]
    for file in out.glob("*.npz"):
        run = bench.read_run(file)
        summary = bench.analyse(run)
        assert summary.startup is not None
        assert 0 < summary.startup.answered <= summary.startup.within_slo
        assert run.requests["code"][0] == Code.UNAVAILABLE, "nobody listens at the moment of the exec"
        assert not summary.failed, "what came before the first answer is no failure"
        assert summary.steady.requests > 50
        assert run.samples["rss_anon"].max() > 0
    text = (out / "summary.md").read_text()
    assert text.startswith("# results\n\n2 starts on each rung")
    assert "**Started.** With" in text
    assert "| to the first answer within the SLO |" in text
    assert "Goal" not in text
    before = {file: file.stat().st_mtime_ns for file in out.glob("*.npz")}
    again = spikeless(*ladder, *options, "--resume")
    assert again.returncode == 0, again.stderr
    assert {file: file.stat().st_mtime_ns for file in out.glob("*.npz")} == before


def test_versions_of_many_models_at_once(saved_models: Path, tmp_path: Path) -> None:
    models, others = publish_boston(saved_models / "signatures", tmp_path), ("paris", "rome", "oslo")
    for name in others:
        publishing.publish(tmp_path / "source", models, name, gates=())
    chosen = [option for name in others for option in ("--publish-model", name)]
    record, summary, _ = run(
        tmp_path, "--event", "publish-all", *chosen, "--publishes", 2, "--duration", "20s"
    )
    assert [publish.model for publish in record.facts.publishes] == [*others, *others]
    assert len(summary.reloads) == 2
    assert summary.reloads[0].what == "publish paris, rome, oslo"
    assert all(reload.happened for reload in summary.reloads), summary.notes
    assert set(record.requests["version"]) == {1}
    for name in others:
        assert sorted(layout.versions(models, name)) == [1, 2, 3]
