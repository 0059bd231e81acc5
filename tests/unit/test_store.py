"""Push and pull through a folder: what is sent, what is kept, what a fault leaves."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from fleet_models import NAME
from places import SUPPORT
from small_versions import PIECE, TABLE, small_version
from trained_models import spikeless

from spikeless.errors import (
    AlreadyExists,
    Cancelled,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from spikeless.formats import savedmodel
from spikeless.launch import free_port
from spikeless.mapping import MapSettings, check, read_manifest
from spikeless.repository import models_config
from spikeless.repository.gates import GateSettings
from spikeless.repository.journal import CameFromStore, ChangeBegun, Journal, SentToStore
from spikeless.repository.publishing import publish
from spikeless.rollout.fleet import FleetSettings
from spikeless.rollout.prune import prune
from spikeless.store import promotions
from spikeless.store.follow import FollowSettings, StoreFollower
from spikeless.store.manifest import VersionManifest
from spikeless.store.manifest import read_manifest as parse
from spikeless.store.objects import Store
from spikeless.store.pull import PullSettings, pull
from spikeless.store.push import push
from spikeless.store.settings import StoreSettings

#: Where everything fails at once.
QUICK = StoreSettings(attempts=2)


def tree(version: Path) -> dict[str, tuple[int, bytes]]:
    """Path -> mode and content; of a mapped graph, without the paths in it."""
    found = {}
    for path in sorted(version.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name == savedmodel.SAVED_MODEL_FILE:
                content = b"graph"
            found[path.relative_to(version).as_posix()] = (path.stat().st_mode & 0o777, content)
    return found


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Versions 1 and 2, of 1 MB each, which differ by a bit in each 64 KiB."""
    models = tmp_path / "models"
    table = bytearray(random.Random(1).randbytes(16 * PIECE + 100))
    small_version(models, 1, bytes(table))
    for offset in range(0, len(table), PIECE):
        table[offset + 7] ^= 1
    small_version(models, 2, bytes(table), note=b"new")
    return models


def manifest_in(store: Path, version: int) -> VersionManifest:
    file = store / NAME / "versions" / f"{version}.json"
    return parse(file.read_bytes(), str(file), NAME, version)


def test_what_is_pulled_is_what_was_pushed(trained: Path, tmp_path: Path) -> None:
    store, models = str(tmp_path / "store"), tmp_path / "pulled"
    for number in (1, 2, 3):
        source = trained / NAME / str(number)
        assert not push(source, store).already
        (pulled,) = pull(store, models, settings=PullSettings(serving_root="/srv/models"))
        target = models / NAME / str(number)
        assert (pulled.version, pulled.path, pulled.already) == (number, str(target), False)
        assert tree(target) == tree(source)
        # The paths in the graph are those of the server that will load it.
        check(target, f"/srv/models/{NAME}/{number}")
        assert [path.stat().st_mode & 0o777 for path in (target, target / "variables")] == [0o755] * 2
    entries = Journal(models, NAME).entries()
    assert [entry.version for entry in entries if isinstance(entry, CameFromStore)] == [1, 2, 3]
    # Once more: nothing to do.
    (again,) = pull(store, models, settings=PullSettings(serving_root="/srv/models"))
    assert (again.version, again.already, again.fetched) == (3, True, 0)
    assert push(trained / NAME / "3", store).already


def test_only_what_changed_is_on_the_wire(trained: Path, tmp_path: Path) -> None:
    """The bars: 3 % where 1 % of the rows changed, 1 % where a dense layer did."""
    store, models = str(tmp_path / "store"), tmp_path / "pulled"
    shares = []
    for number in (1, 2, 3):
        pushed = push(trained / NAME / str(number), store)
        (pulled,) = pull(store, models)
        shares.append((pushed.sent / pushed.bytes, pulled.fetched / pulled.bytes))
        assert pulled.bytes == pushed.bytes > 64 << 20
    assert all(0.8 < share <= 1.01 for share in shares[0])
    assert all(share <= 0.03 for share in shares[1]), shares
    assert all(share < 0.01 for share in shares[2]), shares
    # The table did not change: it is one file, and one page cache.
    (mapped,) = read_manifest(models / NAME / "3").mapped_files()
    files = [models / NAME / number / mapped.path for number in ("1", "2", "3")]
    assert [os.path.samefile(files[2], file) for file in files[:2]] == [False, True]
    # Whoever has version 1 fetches two differences, whoever has none a little more.
    (late,) = pull(store, tmp_path / "late", version=1)
    (late,) = pull(store, tmp_path / "late")
    assert late.fetched <= 0.03 * late.bytes
    (fresh,) = pull(store, tmp_path / "fresh")
    assert fresh.fetched <= 1.01 * fresh.bytes
    assert tree(tmp_path / "late" / NAME / "3") == tree(tmp_path / "fresh" / NAME / "3")


def test_a_chain_of_differences_ends(tmp_path: Path) -> None:
    models, store = tmp_path / "models", tmp_path / "store"
    table = bytearray(random.Random(1).randbytes(PIECE))
    lengths = []
    for number in range(1, 20):
        table[number] ^= 1
        push(small_version(models, number, bytes(table)), str(store))
        written = manifest_in(store, number)
        (file,) = (file for file in written.files if file.path == "variables/table")
        lengths.append(len(file.pieces[0]))
    assert lengths == [*range(1, 14), *range(1, 7)]
    (pulled,) = pull(str(store), tmp_path / "pulled")
    assert tree(Path(pulled.path)) == tree(models / NAME / "19")


def test_a_version_is_never_overwritten(small: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    push(small / NAME / "1", store)
    before = sorted((path, path.read_bytes()) for path in Path(store).rglob("*.json"))
    other = small_version(tmp_path / "other", 1, b"another table")
    with pytest.raises(AlreadyExists, match=r"versions/1.json is there already with other content"):
        push(other, store)
    assert sorted((path, path.read_bytes()) for path in Path(store).rglob("*.json")) == before
    # Nor is one on the disk.
    with pytest.raises(AlreadyExists, match=r"variables/table differs from version 1 in"):
        pull(store, tmp_path / "other")
    assert (other / TABLE).read_bytes() == b"another table"


def test_the_machine_that_pushed_pulls_nothing(small: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    push(small / NAME / "2", store)
    (pulled,) = pull(store, small)
    assert pulled.already
    assert not [entry for entry in Journal(small, NAME).entries() if isinstance(entry, CameFromStore)]


def test_pieces_come_from_versions_that_were_published_here(small: Path, tmp_path: Path) -> None:
    """They need no receipt of a pull: the store knows what they hold."""
    store, here = str(tmp_path / "store"), tmp_path / "here"
    shutil.copytree(small / NAME / "1", here / NAME / "1")
    for number in "12":
        push(small / NAME / number, store)
    (pulled,) = pull(store, here)
    assert pulled.fetched < 0.05 * pulled.bytes
    assert tree(here / NAME / "2") == tree(small / NAME / "2")


def test_damage_on_this_disk_is_fetched_anew(small: Path, tmp_path: Path) -> None:
    store, models = str(tmp_path / "store"), tmp_path / "pulled"
    push(small / NAME / "1", store)
    pull(store, models)
    table = models / NAME / "1" / TABLE
    content = bytearray(table.read_bytes())
    content[PIECE // 2] ^= 1
    table.write_bytes(bytes(content))
    push(small / NAME / "2", store, piece_bytes=PIECE)
    (pulled,) = pull(store, models)
    assert tree(models / NAME / "2") == tree(small / NAME / "2")
    assert pulled.fetched > 0.5 * pulled.bytes


@pytest.mark.parametrize("fault", ["missing", "truncated", "corrupted", "longer"])
def test_an_object_that_is_not_what_the_manifest_says(fault: str, small: Path, tmp_path: Path) -> None:
    store, models = tmp_path / "store", tmp_path / "pulled"
    push(small / NAME / "1", str(store), piece_bytes=PIECE)
    written = manifest_in(store, 1)
    (file,) = (file for file in written.files if file.path == "variables/table")
    name = file.pieces[3][0].object
    piece = store / NAME / "pieces" / name[:2] / name
    content = piece.read_bytes()
    changed = {
        "missing": None,
        "truncated": content[:-1],
        "corrupted": bytes([content[0] ^ 1]) + content[1:],
        "longer": content + b"x",
    }[fault]
    if changed is None:
        piece.unlink()
    else:
        piece.write_bytes(changed)
    if fault == "longer":  # what is beyond is not read
        pull(str(store), models, settings=PullSettings(store=QUICK))
        assert tree(models / NAME / "1") == tree(small / NAME / "1")
        return
    with pytest.raises(NotFound if fault == "missing" else DataLoss, match=name):
        pull(str(store), models, settings=PullSettings(store=QUICK))
    assert not (models / NAME / "1").exists()
    # A push mends what is not there; the next pull goes on where this one stopped.
    if fault == "missing":
        piece.write_bytes(content)
        (pulled,) = pull(str(store), models)
        assert tree(models / NAME / "1") == tree(small / NAME / "1")
        assert pulled.fetched < 0.5 * pulled.bytes


def test_a_manifest_that_is_not_what_the_index_says(small: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    push(small / NAME / "1", str(store))
    file = store / NAME / "versions" / "1.json"
    file.write_bytes(file.read_bytes().replace(b'"mode":420', b'"mode":493', 1))
    with pytest.raises(DataLoss, match=r"1.json has another content than"):
        pull(str(store), tmp_path / "pulled", settings=PullSettings(store=QUICK))
    assert not (tmp_path / "pulled" / NAME / "1").exists()


def test_a_planted_link_is_not_followed(small: Path, tmp_path: Path) -> None:
    store, models, outside = tmp_path / "store", tmp_path / "pulled", tmp_path / "outside"
    push(small / NAME / "1", str(store))
    outside.mkdir()
    with pytest.raises(FailedPrecondition, match="File too large"):
        # Cut short, so that there is something to go on from.
        _limited(lambda: pull(str(store), models))
    (staged,) = (models / NAME / ".spikeless" / "pulls").iterdir()
    shutil.rmtree(staged / "variables")
    (staged / "variables").symlink_to(outside)
    pull(str(store), models)
    assert not any(outside.iterdir())
    assert tree(models / NAME / "1") == tree(small / NAME / "1")


def _limited(act: Callable[[], object]) -> None:
    """Run it where no file may become larger than half a megabyte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        act()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk(small: Path, tmp_path: Path) -> None:
    store, disk = str(tmp_path / "store"), tmp_path / "disk"
    push(small / NAME / "1", store)
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=18m", "tmpfs", str(disk)], check=True)
    try:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(17 << 20))
        with pytest.raises(ResourceExhausted, match=r"more bytes, and .* has .*; make room and try again"):
            pull(store, disk / "models")
        assert not (disk / "models" / NAME / "1").exists()
        # A push to a full disk.
        with pytest.raises(ResourceExhausted, match=r"No space left on device.*make room"):
            push(small / NAME / "1", str(disk / "store"))
        assert not list((disk / "store").rglob("*.json"))
        ballast.unlink()
        push(small / NAME / "1", str(disk / "store"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("what", ["push", "pull"])
def test_a_kill_at_any_point_leaves_nothing_half_visible(what: str, small: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    for number in "12":
        push(small / NAME / number, str(whole))
    expected = {int(number): tree(small / NAME / number) for number in "12"}
    runs = tmp_path / "runs"
    runs.mkdir()
    script = SUPPORT / "killed_fleet.py"
    source = small if what == "push" else whole
    done = subprocess.run(
        [sys.executable, script, what, source, runs], capture_output=True, text=True, cwd=script.parents[2]
    )
    assert done.returncode == 0, done.stderr
    kills = done.stdout.splitlines()
    events = {line.partition(" ")[0] for line in kills}
    assert events >= {"open", "os.mkdir", "os.rename"} | ({"os.link"} if what == "push" else {"os.chmod"})
    outcomes = []
    for run, kill in enumerate(kills):
        folder = runs / str(run)
        models = folder if what == "pull" else tmp_path / f"pulled-{run}"
        store = str(whole if what == "pull" else folder / "store")
        if what == "push":
            # Whoever pulls now gets what is there, whole.
            (pulled,) = pull(store, models)
            outcomes.append(pulled.version)
            assert tree(Path(pulled.path)) == expected[pulled.version], kill
            push(folder / "models" / NAME / "2", store)
        else:
            found = {int(path.name): tree(path) for path in (models / NAME).glob("[0-9]*")}
            outcomes.append(max(found))
            assert all(found[version] == expected[version] for version in found), kill
        (pulled,) = pull(store, models)
        assert pulled.version == 2, kill
        assert tree(models / NAME / "2") == expected[2], kill
        assert not list((models / NAME / ".spikeless" / "pulls").iterdir()), kill
        shutil.rmtree(folder)
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}


@pytest.mark.parametrize("what", ["push", "pull"])
def test_two_at_once(what: str, small: Path, tmp_path: Path) -> None:
    store, models = str(tmp_path / "store"), tmp_path / "pulled"
    if what == "pull":
        push(small / NAME / "1", store)
    command = {
        "push": [*("push", str(small / NAME / "1"), store)],
        "pull": ["pull", store, NAME, "--models", str(models)],
    }[what]
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "spikeless", *command, "--json"], stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    results = [json.loads(child.communicate(timeout=120)[0]) for child in children]
    assert [child.returncode for child in children] == [0] * 4
    assert sorted(result["already"] for result in results) == [False, True, True, True]
    if what == "push":
        pull(store, models)
    assert tree(models / NAME / "1") == tree(small / NAME / "1")


def test_versions_that_are_pushed_at_once_are_all_in_the_index(tmp_path: Path) -> None:
    models, store = tmp_path / "models", str(tmp_path / "store")
    versions = [small_version(models, number, b"%d" % number) for number in range(1, 9)]
    threads = [threading.Thread(target=push, args=(version, store)) for version in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    index = json.loads((tmp_path / "store" / NAME / "index.json").read_bytes())
    assert [entry["version"] for entry in index["versions"]] == list(range(1, 9))


def test_an_interrupted_pull_says_so_and_the_next_goes_on(small: Path, tmp_path: Path) -> None:
    store, models = str(tmp_path / "store"), tmp_path / "pulled"
    push(small / NAME / "1", store, piece_bytes=PIECE)
    interrupted = threading.Event()
    interrupted.set()
    with pytest.raises(Cancelled):
        pull(store, models, interrupted=interrupted)
    with pytest.raises(Cancelled):
        push(small / NAME / "2", store, interrupted=interrupted)
    assert not (models / NAME / "1").exists()
    pull(store, models)


def test_a_store_in_memory_takes_a_saved_model_from_anywhere(fleet_models: Path, tmp_path: Path) -> None:
    """A SavedModel that no repository published passes the gates on its way."""
    store = f"memory://{tmp_path.name}/models"
    lines: list[str] = []
    with pytest.raises(InvalidArgument, match="give the model's name, too"):
        push(fleet_models / "first", store)
    pushed = push(fleet_models / "first", store, name=NAME, progress=lines.append)
    assert pushed.version == 1
    assert any("loading and asking it" in line for line in lines)
    # TFX's Pusher writes <model>/<version>/ without our journal.
    pusher = tmp_path / NAME / "1700000000"
    shutil.copytree(fleet_models / "rows", pusher)
    assert (push(pusher, store).name, push(pusher, store).version) == (NAME, 1700000000)
    assert not [path for path in pusher.parent.iterdir() if path != pusher]
    # Where its destination is not called as the model, the model is named.
    elsewhere = tmp_path / "push_destination" / "1700003600"
    shutil.copytree(fleet_models / "dense", elsewhere)
    assert (push(elsewhere, store, name=NAME).name, push(elsewhere, store, name=NAME).already) == (NAME, True)
    (pulled,) = pull(store, tmp_path / "pulled")
    assert pulled.version == 1700003600
    assert tree(Path(pulled.path)) == tree(elsewhere)
    pull(store, tmp_path / "pulled", version=1700000000)
    assert tree(tmp_path / "pulled" / NAME / "1700000000") == tree(pusher)
    broken = tmp_path / "broken"
    shutil.copytree(fleet_models / "first", broken)
    (broken / "variables" / "variables.index").unlink()
    with pytest.raises(NotFound, match=r"variables.index is missing"):
        push(broken, store, name=NAME)
    assert len(fsspec.filesystem("memory").ls(f"{tmp_path.name}/models/{NAME}/versions")) == 3


def test_old_versions_leave_by_the_rules_of_prune(small: Path, tmp_path: Path) -> None:
    store, models = str(tmp_path / "store"), tmp_path / "pulled"
    for number in (3, 4):
        small_version(small, number, b"%d" % number)
    for number in (1, 2, 3):
        push(small / NAME / str(number), store)
        pull(store, models, settings=PullSettings(keep=2))
    assert sorted(path.name for path in (models / NAME).glob("[0-9]*")) == ["2", "3"]
    (models / "models.config").write_text(
        f'model_config_list {{ config {{ name: "{NAME}" base_path: "/models/{NAME}" '
        "model_version_policy { specific { versions: 2 } } } }"
    )
    push(small / NAME / "4", store)
    pull(store, models, settings=PullSettings(keep=1))
    assert sorted(path.name for path in (models / NAME).glob("[0-9]*")) == ["2", "4"]


def test_a_file_that_two_versions_share_belongs_to_the_one_that_is_mapped(
    trained: Path, tmp_path: Path
) -> None:
    store, models = str(tmp_path / "store"), tmp_path / "pulled"
    for number in "23":
        push(trained / NAME / number, store)
        pull(store, models)
    (mapped,) = read_manifest(models / NAME / "3").mapped_files()
    program = (
        "import mmap, sys; f = open(sys.argv[1]); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)\n"
    )
    program += "print(flush=True); sys.stdin.read()"
    for used, removed in (("3", (2,)), ("2", ())):
        child = subprocess.Popen(
            [sys.executable, "-c", program, models / NAME / used / mapped.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        child.stdout.readline()
        found = prune(models, NAME, 1, None, force=True, dry_run=True)
        child.communicate(timeout=60)
        assert found.removed == removed


def test_follow_pulls_what_appears_and_tells_how_it_is(small: Path, tmp_path: Path) -> None:
    store, models = str(tmp_path / "store"), tmp_path / "pulled"
    pulled: list[int] = []
    lines: list[str] = []
    follower = StoreFollower(
        store,
        models,
        NAME,
        FollowSettings(spread=0.01, pull=PullSettings(store=QUICK)),
        pulled=lambda result: pulled.append(result.version),
        progress=lines.append,
    )

    def metric(name: str, **labels: str) -> float | None:
        return follower.registry.get_sample_value(f"spikeless_pull_{name}", {"model_name": NAME, **labels})

    follower.look()
    assert lines == [f"{NAME}: {store} has no version of {NAME} yet"]
    assert metric("failures_total") == 1
    for number in (1, 2):
        push(small / NAME / str(number), store)
        follower.look()
        follower.look()
        assert metric("version") == number
    assert pulled == [1, 2]
    assert metric("versions_behind") == 0
    age = metric("freshness_seconds")
    assert age is not None
    assert 0 < age < 3600
    fetched = [entry.fetched for entry in Journal(models, NAME).entries() if isinstance(entry, CameFromStore)]
    assert metric("bytes_total", source="store") == sum(fetched)
    # A version that cannot be pulled: what is there stays, and what is wrong is told
    # once.
    push(small_version(small, 3, b"table"), store)
    manifest = Path(store, NAME, "versions", "3.json")
    content = manifest.read_bytes()
    manifest.write_bytes(content[:-9])
    before = len(lines)
    for _ in range(2):
        follower.look()
    assert (metric("version"), metric("versions_behind"), metric("failures_total")) == (2, 1, 3)
    assert len([line for line in lines[before:] if "3.json" in line]) == 1
    manifest.write_bytes(content)
    follower.look()
    assert (metric("version"), metric("versions_behind")) == (3, 0)


def test_bandwidth_is_what_was_asked_for(small: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    push(small / NAME / "1", store, piece_bytes=PIECE)
    began = time.monotonic()
    (pulled,) = pull(
        store, tmp_path / "pulled", settings=PullSettings(store=StoreSettings(bandwidth=1 << 20))
    )
    # The last pieces are on their way when their turn comes.
    assert time.monotonic() - began > (pulled.fetched - 4 * PIECE) / (1 << 20)


def test_credentials_are_in_no_message_and_no_journal(small: Path, tmp_path: Path) -> None:
    done = spikeless(
        "push", small / NAME / "1", "http://me:hunter2@127.0.0.1:9/models?token=hunter2", "--timeout=5s"
    )
    assert done.returncode == 1
    assert "http://127.0.0.1:9/models" in done.stderr
    assert "hunter2" not in done.stderr + done.stdout
    assert not [entry for entry in Journal(small, NAME).entries() if isinstance(entry, SentToStore)]


def test_a_store_of_no_known_kind() -> None:
    with pytest.raises(InvalidArgument, match="nosuch://"):
        Store("nosuch://bucket/models")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://[bad", "'s3://\\[bad' is no address: .*brackets are only for IPv6"),
        ("gs://me:hunter2@[?hunter2", "'gs://\\[' is no address"),
        ("http://[::1", "'http://\\[::1' is no address"),
        ("file://[", "'file://\\[' is no address"),
        ("s3://", "'s3://' names no bucket and no host: write s3://BUCKET/FOLDER"),
        ("s3:///models", "'s3:///models' names no bucket"),
        ("https://me:hunter2@/models", "'https:///models' names no bucket and no host"),
        ("sftp://:22/models", "'sftp://:22/models' names no bucket and no host"),
        ("s3:/bucket", "'s3:/bucket' is no address: write s3://bucket, or ./s3:/bucket for a folder"),
        ("s3://a b/models", "'s3://a b/models': 'a b' is no name of a bucket"),
        ("http://me:hunter2@h:port/", "'http://h:port': Port .*write http://HOST:PORT/FOLDER"),
        ("sftp://h:99999/", "'sftp://h:99999': Port out of range"),
        ("github://a", "github://a is no address of a store: "),
        (" ", "the address of the store is empty"),
    ],
)
def test_a_strange_address_is_no_store(
    address: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidArgument, match=message) as refused:
        Store(address)
    assert "hunter2" not in str(refused.value)
    assert not [*tmp_path.iterdir()]


def test_a_folder_may_be_named_like_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("./s3:/bucket")
    store.write("object", b"1")
    assert (tmp_path / "s3:" / "bucket" / "object").read_bytes() == b"1"


def test_commands_refuse_a_strange_address(small: Path, tmp_path: Path) -> None:
    pulled = tmp_path / "pulled"
    for command in (
        ["push", small / NAME / "1", "s3://[bad"],
        ["pull", "s3://[bad", NAME, "--models", pulled],
        ["pull", "s3://[bad", NAME, "--models", pulled, "--follow"],
        ["promote", "--store", "s3://[bad", NAME, "1"],
        ["status", "--store", "s3://[bad"],
        ["prune", "--store", "s3://[bad", NAME, "--keep=1"],
    ):
        done = spikeless(*command)
        assert done.returncode == 1, command
        assert done.stderr.count("\n") == 1, command
        assert "'s3://[bad' is no address" in done.stderr, command
    assert not pulled.exists()


def test_a_file_is_no_store(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("text")
    for command in (
        ["push", small / NAME / "1", file],
        ["pull", file, NAME, "--models", tmp_path / "pulled"],
    ):
        done = spikeless(*command)
        assert done.returncode == 1
        assert done.stderr.endswith(f"{file} is a file, and no store: give a folder, or a URL\n")
    assert file.read_text() == "text"


def test_a_manifest_says_when_a_version_was_exported(fleet_models: Path, tmp_path: Path) -> None:
    """The file's time goes through publishing, also where its graph is changed."""
    source, models, store = tmp_path / "saved_model", tmp_path / "models", tmp_path / "store"
    shutil.copytree(fleet_models / "first", source)
    os.utime(source / "saved_model.pb", (1_700_000_000, 1_700_000_000))
    for mapping in (None, MapSettings(verify=False)):
        gates = GateSettings(load=False, allow_cold=True, mapping=mapping).pipeline()
        published = publish(source, models, NAME, gates=gates)
        push(published, str(store))
        assert manifest_in(store, int(published.name)).trained == 1_700_000_000
    (pulled,) = pull(str(store), tmp_path / "pulled")
    assert pulled.trained == 1_700_000_000


def test_the_commands(small: Path, tmp_path: Path) -> None:
    store, models = tmp_path / "store", tmp_path / "pulled"
    done = spikeless("push", small / NAME / "1", store)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{NAME}: version 1 is in {store}: sent ")
    done = spikeless("push", small / NAME / "1", store, "--json")
    assert json.loads(done.stdout)["already"] is True
    done = spikeless("pull", store, "--models", models, "--keep=2", "--serving-root=/models")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{NAME}: version 1 is in {models / NAME / '1'}: fetched ")
    done = spikeless("pull", store, "other", "--models", models)
    assert done.returncode == 1
    assert f"{store} has no version of other: push one first" in done.stderr
    done = spikeless("pull", store, f"{NAME}s", "--models", models)
    assert f"{store} has no version of {NAME}s: did you mean {NAME}?" in done.stderr
    done = spikeless("pull", tmp_path / "nothing", "--models", models)
    assert done.returncode == 1
    assert "has no models" in done.stderr
    for wrong in (("--metrics-port=0",), ("--follow", "--version=1")):
        assert spikeless("pull", store, "--models", models, *wrong).returncode == 2


def test_a_link_in_a_version_is_refused(small: Path, tmp_path: Path) -> None:
    (small / NAME / "1" / "link").symlink_to("/etc/passwd")
    with pytest.raises(FailedPrecondition, match="is no plain file"):
        push(small / NAME / "1", str(tmp_path / "store"))


# Promotion ----------------------------------------------------------------------------


def served(models: Path) -> tuple[list[int], dict[str, int]]:
    """What ``models.config`` has a server load, and where labels point."""
    model = models_config.read(models).model(NAME)
    assert model is not None
    return list(model.model_version_policy.specific.versions), dict(model.version_labels)


def test_a_machine_gets_and_serves_what_is_promoted(small: Path, tmp_path: Path) -> None:
    store, models = str(tmp_path / "store"), tmp_path / "pulled"
    for number in (3, 4):
        small_version(small, number, b"%d" % number)
    for number in (1, 2, 3, 4):
        push(small / NAME / str(number), store)
    pull(store, models)
    assert not (models / "models.config").exists(), "nothing is promoted"
    assert promotions.promote(store, NAME, 2).result == "promoted"
    outcome = promotions.promote(store, NAME, 3, reason="better")
    assert (outcome.previous, outcome.version) == (2, 3)
    settings = PullSettings(serving_root="/models", keep=1)
    pulled = pull(store, models, settings=settings)
    assert [(one.version, one.already) for one in pulled] == [(3, False), (4, True)]
    assert served(models) == ([3], {"stable": 3})
    model = models_config.read(models).model(NAME)
    assert model is not None
    assert model.base_path == f"/models/{NAME}"
    # What the fleet serves is older than what --keep keeps, and stays.
    assert promotions.promote(store, NAME, 1, label="old").result == "promoted"
    pull(store, models, settings=settings)
    assert served(models) == ([1, 3], {"old": 1, "stable": 3})
    assert promotions.rollback(store, NAME).version == 2
    pull(store, models, settings=settings)
    assert served(models) == ([1, 2], {"old": 1, "stable": 2})
    assert sorted(path.name for path in (models / NAME).glob("[0-9]*")) == ["1", "2", "3", "4"]
    # Repeated, it goes no further back; the machine's own journal knows the way, too.
    assert promotions.rollback(store, NAME).result == "unchanged"
    begun = [entry for entry in Journal(models, NAME).entries() if isinstance(entry, ChangeBegun)]
    assert [(entry.label, entry.version, entry.previous) for entry in begun] == [
        ("stable", 3, None),
        ("old", 1, None),
        ("stable", 2, 3),
    ]
    assert Journal(models, NAME).unfinished() is None
    record = json.loads(Path(store, ".promotions", "2.json").read_bytes())
    assert (record["model"], record["version"], record["reason"]) == (NAME, 3, "better")


def test_models_that_are_not_promoted_are_served_as_before(small: Path, tmp_path: Path) -> None:
    store, models = str(tmp_path / "store"), tmp_path / "pulled"
    for name in (NAME, "other"):
        if name != NAME:
            shutil.copytree(small / NAME, small / name)
        push(small / name / "1", store)
    promotions.promote(store, NAME, 1)
    pull(store, models)
    other = models_config.read(models).model("other")
    assert other is not None
    assert (other.base_path, list(other.model_version_policy.specific.versions)) == (f"{models}/other", [])


def test_what_cannot_be_promoted_in_a_store(small: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    for number in (1, 2):
        push(small / NAME / str(number), store)
    with pytest.raises(NotFound, match=f"no version 9 of {NAME}, only 1, 2"):
        promotions.promote(store, NAME, 9)
    with pytest.raises(NotFound, match="has no label stable"):
        promotions.rollback(store, NAME, version=1)
    promotions.promote(store, NAME, 1)
    with pytest.raises(FailedPrecondition, match="above the stable version 1"):
        promotions.promote(store, NAME, 2, label="next")
    with pytest.raises(NotFound, match="knows no earlier stable"):
        promotions.rollback(store, NAME)
    with pytest.raises(InvalidArgument, match="to go on to 2"):
        promotions.rollback(store, NAME, version=2)
    assert promotions.promote(store, NAME, 2, dry_run=True).steps
    assert [path.name for path in Path(store, ".promotions").iterdir()] == ["1.json"]
    # A change that was cut short between its record and the file is completed.
    content = Path(store, "models.config").read_bytes()
    Path(store, "models.config").unlink()
    assert promotions.promote(store, NAME, 1).result == "unchanged"
    assert Path(store, "models.config").read_bytes() == content
    for wrong in (
        b"model_config_list {",
        b"\xff",
        content.replace(b"value: 1", b"value: 2"),
        b"x" * (2 << 20),
    ):
        Path(store, "models.config").write_bytes(wrong)
        with pytest.raises(DataLoss, match=r"models\.config"):
            pull(store, tmp_path / "pulled")
    assert promotions.promote(store, NAME, 1).result == "unchanged"
    pull(store, tmp_path / "pulled")


def test_changes_of_a_fleet_at_once_are_all_recorded(small: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    push(small / NAME / "1", store)
    names = [f"label-{number}" for number in range(6)]
    threads = [
        threading.Thread(target=promotions.promote, args=(store, NAME, 1), kwargs={"label": name})
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    config = promotions.read(Store(store)).config
    assert sorted(promotions.labels(config, NAME)) == names
    assert len(list(Path(store, ".promotions").glob("*.json"))) == len(names)


def test_an_old_copy_of_what_is_promoted_is_not_believed(small: Path, tmp_path: Path) -> None:
    """As one leaves it that is killed while another promotes."""
    store, models = tmp_path / "store", tmp_path / "pulled"
    for number in (1, 2):
        push(small / NAME / str(number), str(store))
    promotions.promote(str(store), NAME, 1)
    old = (store / "models.config").read_bytes()
    promotions.promote(str(store), NAME, 2)
    follower = StoreFollower(str(store), models, NAME, FollowSettings())
    follower.look()
    (store / "models.config").write_bytes(old)
    follower.look()
    assert promotions.labels(models_config.read(models), NAME) == {"stable": 2}
    pull(str(store), tmp_path / "another", NAME)
    assert promotions.labels(models_config.read(tmp_path / "another"), NAME) == {"stable": 2}


def test_follow_brings_what_is_promoted(small: Path, tmp_path: Path) -> None:
    store, models = str(tmp_path / "store"), tmp_path / "pulled"
    follower = StoreFollower(store, models, None, FollowSettings(pull=PullSettings(keep=1)))

    def metric(name: str) -> float | None:
        return follower.registry.get_sample_value(f"spikeless_pull_{name}", {"model_name": NAME})

    for number in (1, 2):
        push(small / NAME / str(number), store)
    follower.look()
    assert not (models / "models.config").exists()
    for version in (1, 2):
        promotions.promote(store, NAME, version)
        follower.look()
        assert served(models) == ([version], {"stable": version})
        assert (metric("promotions_pending"), metric("version")) == (0, 2)
    # No server: it is told on, and tried again at each look.
    servers = FleetSettings((f"127.0.0.1:{free_port()}",), patience=0.1)
    lines: list[str] = []
    follower = StoreFollower(
        store, models, NAME, FollowSettings(pull=PullSettings(servers=servers)), progress=lines.append
    )
    follower.look()
    assert metric("failures_total") == 0, "it is served already"
    promotions.rollback(store, NAME)
    for count in (1, 2):
        follower.look()
        assert (metric("failures_total"), metric("promotions_pending")) == (count, 1)
    assert served(models) == ([2], {"stable": 2})
    assert servers.targets[0] in lines[-1]


def test_the_commands_of_a_fleet(small: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for number in (1, 2):
        push(small / NAME / str(number), str(store))
        done = spikeless("promote", NAME, number, "--store", store, "--reason=why")
        assert done.returncode == 0, done.stderr
    assert done.stdout == f"{NAME}: stable is version 2 (it was 1)\n"
    done = spikeless("rollback", NAME, "--store", store, "--json")
    assert json.loads(done.stdout)["version"] == 1
    for command in (("promote", NAME, 1, "--servers=127.0.0.1:1"), ("rollback", NAME, "--canary")):
        done = spikeless(*command, "--store", store)
        assert done.returncode == 2
        assert "has no meaning with --store" in done.stderr
