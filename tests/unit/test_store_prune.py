"""Old versions leave a store, and nothing that anybody still needs."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fleet_models import NAME
from places import SUPPORT
from small_versions import PIECE, TABLE, contents, small_version
from trained_models import spikeless

from spikeless.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable
from spikeless.store import promotions
from spikeless.store import push as pushing
from spikeless.store.catalog import Catalog
from spikeless.store.objects import Store
from spikeless.store.prune import GRACE_SECONDS, prune
from spikeless.store.pull import pull
from spikeless.store.push import push


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Versions 1, 2 and 3; each shares one piece with the next."""
    pieces = [random.Random(seed).randbytes(PIECE) for seed in range(4)]
    for number in (1, 2, 3):
        small_version(tmp_path / "models", number, *pieces[number - 1 : number + 1])
    return tmp_path / "models"


@pytest.fixture
def store(models: Path, tmp_path: Path) -> Path:
    """A store with all three."""
    for number in (1, 2, 3):
        push(models / NAME / str(number), str(tmp_path / "store"), piece_bytes=PIECE)
    return tmp_path / "store"


def age(store: Path, seconds: float = GRACE_SECONDS + 60) -> None:
    """Let everything in a store be older."""
    for path in store.rglob("*"):
        if path.is_file():
            os.utime(path, (path.stat().st_mtime - seconds,) * 2)


def in_index(store: Path) -> list[int]:
    return [entry.version for entry in Catalog(Store(str(store)), NAME).index().versions]


def pieces_in(store: Path) -> int:
    return sum(path.is_file() for path in (store / NAME / "pieces").rglob("*"))


def assert_whole(store: Path, models: Path, target: Path) -> None:
    """Each version of the index comes to a machine that has nothing."""
    for number in in_index(store):
        shutil.rmtree(target, ignore_errors=True)
        pull(str(store), target, NAME, number)
        assert contents(target / NAME / str(number)) == contents(models / NAME / str(number))


def test_what_leaves_today_is_freed_tomorrow(store: Path, models: Path, tmp_path: Path) -> None:
    before = pieces_in(store)
    tried = prune(str(store), NAME, 1, force=True, dry_run=True)
    assert (tried.removed, tried.freed, tried.dry_run) == ((1, 2), 0, True)
    assert in_index(store) == [1, 2, 3]

    first = prune(str(store), NAME, 1, force=True)
    assert first.removed == (1, 2)
    assert first.kept == {3: "among the newest 1"}
    assert first.freed == 0
    # Two pieces of the table and two graphs.
    assert first.waiting == tried.waiting > 2 * PIECE
    assert in_index(store) == [3]
    assert pieces_in(store) == before
    with pytest.raises(NotFound, match="no version 2 of ctr, only 3"):
        pull(str(store), tmp_path / "pulled", NAME, 2)

    again = prune(str(store), NAME, 1, force=True)
    assert (again.removed, again.freed, again.waiting) == ((), 0, first.waiting)
    age(store)
    last = prune(str(store), NAME, 1)
    assert (last.removed, last.freed, last.waiting) == ((), first.waiting, 0)
    assert pieces_in(store) == 3
    assert not list((store / NAME / "removed").iterdir())
    assert_whole(store, models, tmp_path / "pulled")
    assert prune(str(store), NAME, 1).freed == 0


def test_young_and_promoted_versions_stay(store: Path, models: Path, tmp_path: Path) -> None:
    promotions.promote(str(store), NAME, 1)
    young = prune(str(store), NAME, 1)
    assert young.removed == ()
    assert young.kept == {1: "promoted in the store", 2: "younger than a day", 3: "younger than a day"}
    forced = prune(str(store), NAME, 1, force=True)
    assert forced.removed == (2,)
    age(store)
    assert prune(str(store), NAME, 1).freed > 0
    assert in_index(store) == [1, 3]
    assert_whole(store, models, tmp_path / "pulled")


def test_what_is_promoted_meanwhile_comes_back(
    store: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = Catalog.remove

    def promoted_first(catalog: Catalog, number: int, manifest: bytes) -> None:
        if number == 2:
            promotions.promote(str(store), NAME, 2)
        removed(catalog, number, manifest)

    monkeypatch.setattr(Catalog, "remove", promoted_first)
    pruned = prune(str(store), NAME, 1, force=True)
    assert pruned.removed == (1,)
    assert in_index(store) == [2, 3]
    assert_whole(store, models, tmp_path / "pulled")


def test_a_push_that_runs_at_the_same_time_finds_what_it_began_with(
    store: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 4 shares a piece with 3, which leaves before 4 is complete."""
    third = (models / NAME / "3" / TABLE).read_bytes()
    small_version(models, 4, third, b"new")
    small_version(models, 5, b"another")
    push(models / NAME / "5", str(store), piece_bytes=PIECE)
    shutil.rmtree(store / NAME / "versions" / "5.json", ignore_errors=True)
    age(store)
    add = Catalog.add

    def pruned_first(catalog: Catalog, manifest: Any) -> bool:
        monkeypatch.setattr(Catalog, "add", add)
        assert prune(str(store), NAME, 1, force=True).removed == (1, 2, 3)
        return add(catalog, manifest)

    monkeypatch.setattr(Catalog, "add", pruned_first)
    push(models / NAME / "4", str(store), piece_bytes=PIECE)
    assert in_index(store) == [4, 5]
    age(store)
    assert prune(str(store), NAME, 2).freed > 0
    assert_whole(store, models, tmp_path / "pulled")


def test_a_piece_that_no_version_names_is_written_anew(store: Path, models: Path, tmp_path: Path) -> None:
    """Its removal may be about to begin: the push makes it young."""
    prune(str(store), NAME, 1, force=True)
    age(store)
    first = (models / NAME / "1" / TABLE).read_bytes()
    small_version(models, 4, first)
    pushed = push(models / NAME / "4", str(store), piece_bytes=PIECE)
    assert pushed.sent > len(first)
    prune(str(store), NAME, 1)
    assert_whole(store, models, tmp_path / "pulled")


def test_a_push_that_takes_too_long_is_repeated(
    store: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_version(models, 4, b"more")
    with monkeypatch.context() as patch:
        patch.setattr(pushing, "LONGEST_SECONDS", -1.0)
        with pytest.raises(Unavailable, match="more than half a day; push it again"):
            push(models / NAME / "4", str(store))
    assert in_index(store) == [1, 2, 3]
    push(models / NAME / "4", str(store))
    assert in_index(store) == [1, 2, 3, 4]


def test_a_number_that_was_removed_is_not_taken_again(store: Path, models: Path) -> None:
    prune(str(store), NAME, 1, force=True)
    with pytest.raises(AlreadyExists, match=r"version 1 was removed from .*: push it under another number"):
        push(models / NAME / "1", str(store))
    assert in_index(store) == [3]
    age(store)
    prune(str(store), NAME, 1)
    push(models / NAME / "1", str(store))
    assert in_index(store) == [1, 3]


def test_a_kill_at_any_point_and_the_next_prune_goes_on(models: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    script = SUPPORT / "killed_fleet.py"
    done = subprocess.run(
        [sys.executable, script, "prune", models, runs], capture_output=True, text=True, cwd=script.parents[2]
    )
    assert done.returncode == 0, done.stderr
    kills = done.stdout.splitlines()
    assert {line.partition(" ")[0] for line in kills} >= {"open", "os.rename", "os.remove"}
    seen = set()
    for run, kill in enumerate(kills):
        store = runs / str(run)
        seen.add(tuple(in_index(store)))
        assert_whole(store, models, tmp_path / "pulled")
        prune(str(store), NAME, 1, force=True)
        assert in_index(store) == [3], kill
        age(store)
        prune(str(store), NAME, 1)
        assert pieces_in(store) == 2, kill
        assert_whole(store, models, tmp_path / "pulled")
        shutil.rmtree(store)
    assert seen == {(1, 2, 3), (2, 3), (3,)}


def test_pushes_and_prunes_at_once(models: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    push(models / NAME / "1", str(store))
    for number in range(4, 10):
        small_version(models, number, b"%d" % number * 100)
    errors: list[BaseException] = []

    def tried(act: Callable[[], object]) -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=tried, args=[act])
        for number in range(4, 10)
        for act in (
            lambda number=number: push(models / NAME / str(number), str(store)),
            lambda: prune(str(store), NAME, 20, force=True),
        )
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    assert in_index(store) == [1, *range(4, 10)]


def test_the_command(store: Path, models: Path) -> None:
    command = ["prune", NAME, "--store", str(store), "--keep", "1"]
    assert "version 1 stays: younger than a day" in spikeless(*command).stdout
    done = spikeless(*command, "--force", "--dry-run")
    assert "would remove 1, 2 (0 bytes; " in done.stdout
    assert in_index(store) == [1, 2, 3]
    done = spikeless(*command, "--force", "--json")
    assert json.loads(done.stdout)["removed"] == [1, 2]
    done = spikeless(*command, "--offline", check=False)
    assert done.returncode == 2
    assert "--offline has no meaning with --store" in done.stderr
    with pytest.raises(InvalidArgument, match="so 1 or more"):
        prune(str(store), NAME, 0)
    with pytest.raises(NotFound, match="no version of other"):
        prune(str(store), "other", 1)
