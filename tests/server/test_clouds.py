"""Versions go through servers of three clouds: all that one does with a store."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from clouds import ACCOUNT_KEY, Cloud, azure_server, gcs_server
from fleet_models import NAME
from small_versions import PIECE, contents, small_version
from stores import s3_server

from spikeless.errors import AlreadyExists, NotFound, SpikelessError
from spikeless.repository import models_config
from spikeless.store import promotions
from spikeless.store import prune as pruning
from spikeless.store.catalog import Catalog
from spikeless.store.follow import FollowSettings, StoreFollower
from spikeless.store.objects import Store
from spikeless.store.prune import prune
from spikeless.store.pull import PullSettings, pull
from spikeless.store.push import push
from spikeless.store.settings import StoreSettings

#: Gives up soon.
HASTY = StoreSettings(timeout=30.0, attempts=2)


@contextmanager
def _s3(directory: Path) -> Iterator[Cloud]:
    with s3_server(directory) as server:
        yield Cloud(server.url, server.environment())


@pytest.fixture(scope="module", params=[_s3, azure_server, gcs_server], ids=["s3", "azure", "gcs"])
def cloud(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with request.param(tmp_path_factory.mktemp("cloud")) as server:
        yield server


@pytest.fixture
def store(cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of one's own; the libraries find the server and their credentials."""
    for variable, value in cloud.environment.items():
        monkeypatch.setenv(variable, value)
    return f"{cloud.url}/{tmp_path.name}"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Version 1 of 32 pieces, and 2, in which each differs by one byte."""
    table = bytearray(random.Random(1).randbytes(32 * PIECE + 100))
    small_version(tmp_path / "models", 1, bytes(table))
    for offset in range(0, len(table), PIECE):
        table[offset + 7] ^= 1
    small_version(tmp_path / "models", 2, bytes(table))
    return tmp_path / "models"


def test_only_what_changed_goes_there_and_back(store: str, models: Path, tmp_path: Path) -> None:
    there = tmp_path / "pulled"
    first = push(models / NAME / "1", store, piece_bytes=PIECE)
    assert not first.already
    pull(store, there)
    second = push(models / NAME / "2", store, piece_bytes=PIECE)
    assert second.sent < 0.05 * second.bytes
    (pulled,) = pull(store, there)
    assert pulled.fetched < 0.05 * pulled.bytes
    for number in "12":
        assert contents(there / NAME / number) == contents(models / NAME / number)
    # Another machine fetches all of it, and what is there is not pushed again.
    (whole,) = pull(store, tmp_path / "other", NAME)
    assert whole.fetched > whole.bytes
    assert contents(tmp_path / "other" / NAME / "2") == contents(models / NAME / "2")
    assert push(models / NAME / "2", store, piece_bytes=PIECE).already
    assert ACCOUNT_KEY not in (there / NAME / ".spikeless" / "journal.jsonl").read_text()


def test_a_version_is_never_overwritten_and_an_object_is_damaged(
    store: str, models: Path, tmp_path: Path
) -> None:
    push(models / NAME / "1", store, piece_bytes=PIECE)
    small_version(tmp_path / "others", 1, b"another")
    with pytest.raises(AlreadyExists, match="there already with other content"):
        push(tmp_path / "others" / NAME / "1", store)
    opened = Store(store, HASTY)
    catalog = Catalog(opened, NAME)
    path, found = next(iter(opened.below(catalog.pieces_path).items()))
    content = opened.read(path, found.bytes)
    opened.write(path, bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(SpikelessError, match="another content than its manifest says"):
        pull(store, tmp_path / "pulled", settings=PullSettings(store=HASTY))
    assert not (tmp_path / "pulled" / NAME / "1").exists()
    opened.write(path, content)
    pull(store, tmp_path / "pulled")
    assert contents(tmp_path / "pulled" / NAME / "1") == contents(models / NAME / "1")


def test_of_many_that_write_where_nothing_is_one_does(store: str) -> None:
    opened = Store(store)
    written: list[int] = []

    def create(number: int) -> None:
        try:
            opened.create("object", b"%d" % number)
        except AlreadyExists:
            return
        written.append(number)

    threads = [threading.Thread(target=create, args=[number]) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(written) == 1
    assert opened.read("object", 10) == b"%d" % written[0]


def test_pushes_at_once_are_all_in_the_index(store: str, models: Path) -> None:
    for number in range(3, 7):
        small_version(models, number, b"%d" % number * 100)
    errors: list[BaseException] = []

    def tried(act: Callable[[], object]) -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=tried, args=[lambda number=number: push(models / NAME / str(number), store)])
        for number in range(1, 7)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not errors
    entries = Catalog(Store(store), NAME).index().versions
    assert [entry.version for entry in entries] == [1, 2, 3, 4, 5, 6]


def test_a_machine_follows_what_is_pushed_and_promoted(store: str, models: Path, tmp_path: Path) -> None:
    there = tmp_path / "pulled"
    follower = StoreFollower(store, there, NAME, FollowSettings())
    follower.look()
    assert not (there / NAME).exists()
    for number in (1, 2):
        push(models / NAME / str(number), store, piece_bytes=PIECE)
        follower.look()
        assert contents(there / NAME / str(number)) == contents(models / NAME / str(number))
    promotions.promote(store, NAME, 1)
    follower.look()
    assert promotions.labels(models_config.read(there), NAME) == {"stable": 1}
    promotions.promote(store, NAME, 2)
    promotions.rollback(store, NAME)
    follower.look()
    assert promotions.labels(models_config.read(there), NAME) == {"stable": 1}
    assert follower.registry.get_sample_value("spikeless_pull_version", {"model_name": NAME}) == 2


def test_old_versions_leave(
    store: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        push(models / NAME / str(number), store)
    assert prune(store, NAME, 1).kept == {1: "younger than a day", 2: "younger than a day"}
    pruned = prune(store, NAME, 1, force=True)
    assert (pruned.removed, pruned.freed) == ((1,), 0)
    with pytest.raises(NotFound, match="no version 1 of ctr, only 2"):
        pull(store, tmp_path / "pulled", NAME, 1)
    # As a day later; a server's clock may have whole seconds.
    monkeypatch.setattr(pruning, "GRACE_SECONDS", -5.0)
    assert prune(store, NAME, 1).freed == pruned.waiting > 0
    pull(store, tmp_path / "pulled", NAME)
    assert contents(tmp_path / "pulled" / NAME / "2") == contents(models / NAME / "2")
