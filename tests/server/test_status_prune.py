"""Status and pruning, against real servers and by processes that are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import SUPPORT
from promotion_models import NAME, add_version, block_of, flawless, fleet_of, served, settings, start_server
from trained_models import spikeless

from spikeless.client import Client
from spikeless.errors import InvalidArgument, NotFound, Unavailable
from spikeless.repository import layout, models_config
from spikeless.repository.journal import ChangeBegun, Journal
from spikeless.repository.models_config import new_block, with_versions
from spikeless.rollout.promotion import promote
from spikeless.rollout.prune import prune
from spikeless.rollout.status import status

OLD = time.time() - 10 * 86400


def age(models: Path, *numbers: int) -> None:
    for number in numbers:
        os.utime(models / NAME / str(number), (OLD, OLD))


def test_status_and_prune_follow_a_promotion(models: Path, scales: Path) -> None:
    for number in (3, 4, 5):
        add_version(scales / "3", models, number, expected=3)
    (models / NAME / "3" / "assets.extra" / "tf_serving_warmup_requests").write_bytes(b"damaged")
    (models / NAME / "3" / "assets.extra" / "spikeless.json").write_text("{}")
    with start_server(models) as server, flawless(server.target):
        promote(models, NAME, 2, fleet_of(server), settings())
        age(models, 1, 2, 3, 5)
        (report,) = status(models, None, (server.target,))
        assert (report.name, report.labels, report.disagreements) == (NAME, {"stable": 2}, ())
        by_number = {one.version: one for one in report.versions}
        assert sorted(by_number) == [1, 2, 3, 4, 5]
        assert by_number[2].labels == ("stable",)
        assert (by_number[2].checks, by_number[2].servers) == ("promoted", {server.target: "AVAILABLE"})
        assert (by_number[1].warmup, by_number[1].golden, by_number[1].mapped) == (1, True, False)
        assert (by_number[3].warmup, by_number[3].mapped, by_number[3].servers) == (None, True, {})
        assert by_number[1].size > 1000
        assert by_number[1].age > 86400 > by_number[4].age

        done = spikeless("status", NAME, "--models", models, "--servers", server.target)
        assert done.returncode == 0, done.stderr
        for text in (server.target, "AVAILABLE", "stable", "promoted", "damaged", "10 d"):
            assert text in done.stdout.replace("\n", ""), done.stdout
        done = spikeless("status", "--json", "--models", models, "--servers", server.target)
        assert json.loads(done.stdout)[0]["labels"] == {"stable": 2}

        dry = prune(models, NAME, 1, fleet_of(server), dry_run=True)
        assert (dry.removed, dry.dry_run) == ((3,), True)
        assert set(layout.versions(models, NAME)) == {1, 2, 3, 4, 5}
        done = spikeless("prune", NAME, "--keep=1", "--json", "--models", models, "--servers", server.target)
        assert done.returncode == 0, done.stderr
        pruned = json.loads(done.stdout)
        assert pruned["removed"] == [3]
        assert pruned["freed"] > 1000
        assert set(layout.versions(models, NAME)) == {1, 2, 4, 5}
        assert pruned["kept"]["1"] == f"configured for {NAME}"
        assert pruned["kept"]["2"] == "labelled stable"
        assert pruned["kept"]["4"] == "younger than a day"
        assert pruned["kept"]["5"] == "among the newest 1"
        assert prune(models, NAME, 1, fleet_of(server), force=True).removed == (4,)
        assert prune(models, NAME, 1, fleet_of(server), force=True).removed == ()
        with Client(server.target, timeout=60.0) as client:
            assert served(client) == 2


def test_status_says_what_does_not_agree(models: Path, scales: Path) -> None:
    with start_server(models) as server:
        gone = "127.0.0.1:1"
        block = block_of(models)
        models_config.edit(models, {NAME: with_versions(block, [2, 9], {"stable": 2, "new": 9})})
        Journal(models, NAME).append(ChangeBegun("1", "promote", 9, "stable", previous=1))
        add_version(scales / "1", models / "more", 1)
        (models / "more" / NAME).rename(models / "unlisted")
        (models / "more").rmdir()
        done = spikeless("status", "--json", "--models", models, "--servers", server.target)
        assert done.returncode == 1, "they disagree"
        assert json.loads(done.stdout)
        reports = {report.name: report for report in status(models, None, (server.target, gone))}
        problems = "\n".join(reports[NAME].disagreements)
        for text in (
            f"{server.target} should serve version 2 as {NAME}, and does not",
            f"{server.target} serves version 1 as {NAME}, unlike models.config",
            f"label stable of {NAME} is version 2, {server.target} takes it for version 1",
            f"label new of {NAME} is version 9, {server.target} does not know it",
            "version 9 is labelled new, but not on disk",
            "a promote to version 9 was cut short, or is running",
            f"no server answers at {gone}",
        ):
            assert text in problems, problems
        assert "models.config does not list unlisted" in reports["unlisted"].disagreements
        assert not reports[NAME].versions[-1].on_disk
    with pytest.raises(NotFound, match=f"no model nothing; there is: {NAME}, unlisted"):
        status(models, "nothing", ())


def test_what_is_loaded_is_not_known_when_a_server_is_silent(models: Path, scales: Path) -> None:
    age(models, 1, 2)
    models_config.edit(models, {NAME: with_versions(block_of(models), [2], {"stable": 2})})
    with pytest.raises(Unavailable, match=r"no server answers at 127\.0\.0\.1:1"):
        prune(models, NAME, 1, fleet_of("127.0.0.1:1", patience=0.5))
    assert set(layout.versions(models, NAME)) == {1, 2}
    with pytest.raises(InvalidArgument, match="--keep 0"):
        prune(models, NAME, 0, None)
    with pytest.raises(NotFound, match="has no versions"):
        prune(models, "other", 1, None)


def test_space_is_freed_only_where_something_goes(models: Path) -> None:
    command = ("prune", NAME, "--keep", "1", "--offline", "--models", models)
    done = spikeless(*command)
    assert done.returncode == 0, done.stderr
    assert f"{NAME}: removed no version (0 bytes)\n" in done.stdout
    assert "freeing" not in done.stderr
    age(models, 1)
    models_config.edit(models, {NAME: with_versions(block_of(models), [2], {"stable": 2})})
    assert "would remove 1 " in (dry := spikeless(*command, "--dry-run")).stdout
    assert "freeing" not in dry.stderr
    assert spikeless(*command).stderr.splitlines() == ["removing version 1", "freeing the space"]


def test_what_a_process_has_mapped_stays(models: Path) -> None:
    import mmap

    age(models, 1, 2)
    models_config.edit(models, {NAME: with_versions(block_of(models), [2], {"stable": 2})})
    file = models / NAME / "1" / "variables" / "variables.index"
    # By its path, and as a container sees it, under another path.
    elsewhere = models / "elsewhere"
    os.link(file, elsewhere)
    for path in (file, elsewhere):
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ):
            assert prune(models, NAME, 1, None).kept[1] == "mapped by a process on this machine"
    assert prune(models, NAME, 1, None).removed == (1,)


def test_a_clock_that_was_set_back_makes_no_version_old(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models_config.edit(models, {NAME: with_versions(block_of(models), [2], {"stable": 2})})
    future = time.time() + 365 * 86400
    os.utime(models / NAME / "1", (future, future))
    assert prune(models, NAME, 1, None).kept[1] == "younger than a day"


def test_killed_at_every_step_a_prune_leaves_whole_versions_and_repeating_finishes(tmp_path: Path) -> None:
    models = tmp_path / "models"
    for number in (1, 2, 3):
        path = models / NAME / str(number)
        path.mkdir(parents=True)
        for file in ("saved_model.pb", "fingerprint.pb"):
            (path / file).write_text("content")
    age(models, 1, 2, 3)
    block = with_versions(new_block(NAME, str(models / NAME)), [3], {"stable": 3})
    models_config.edit(models, {NAME: block})
    script = SUPPORT / "killed_prunes.py"
    done = subprocess.run(
        [sys.executable, script, models, tmp_path / "walk"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    kills = done.stdout.splitlines()
    assert {kill.split()[0] for kill in kills} >= {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
    outcomes = []
    for number, kill in enumerate(kills):
        walked = tmp_path / "walk" / str(number)
        found = layout.versions(walked, NAME)
        for path in found.values():
            assert len([file for file in path.rglob("*") if file.is_file()]) == 2, kill
        outcomes.append(tuple(found))
        assert set(prune(walked, NAME, 1, None).kept) == {3}
        assert tuple(layout.versions(walked, NAME)) == (3,), kill
        assert not (walked / NAME / ".spikeless" / "trash").exists(), kill
    assert set(outcomes) == {(1, 2, 3), (2, 3), (3,)}
    assert outcomes == sorted(outcomes, key=len, reverse=True)
