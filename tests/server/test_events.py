"""What happens to versions under load, on a real server: each event of `bench run`."""

from __future__ import annotations

import json
from pathlib import Path

from bench_runs import publish_boston
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
