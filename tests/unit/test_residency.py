"""The page cache: what is in it, what brings it there, what keeps it there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from trained_models import spikeless

from spikeless.disk import pages, proc
from spikeless.disk.atomic import write_atomically
from spikeless.errors import FailedPrecondition, InvalidArgument, NotFound
from spikeless.mapping.manifest import FileRecord, Manifest, manifest_path
from spikeless.repository import models_config
from spikeless.sidecars.keep import Keeper, served_versions

SIZE = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "größer als eine Seite"
    path.write_bytes(os.urandom(SIZE + 100))
    return path


def _evict(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_resident_and_prefetch(file: Path) -> None:
    assert pages.resident(file) == SIZE + 100
    _evict(file)
    if pages.resident(file):
        pytest.skip("this file system keeps its pages")
    pages.prefetch(file)
    assert pages.resident(file) == SIZE + 100


def test_empty_files(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    assert pages.resident(path) == 0
    pages.prefetch(path)
    with pytest.raises(FailedPrecondition, match="empty"):
        pages.Mapping(path)


def test_locked_pages_stay(file: Path) -> None:
    with pages.Mapping(file) as mapping:
        mapping.lock()
        assert _locked_bytes() >= SIZE
        _evict(file)
        assert mapping.resident() == SIZE + 100
    assert _locked_bytes() == 0


def test_single_pages_are_expected_where_a_file_is_mapped(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "another"
    other.write_bytes(os.urandom(SIZE))
    with pages.Mapping(file), pages.Mapping(file), pages.Mapping(other):
        assert pages.expect_single_pages([file]) == 2
        assert _flags(file) == [True, True]
        assert _flags(other) == [False]
    assert pages.expect_single_pages([file]) == 0
    assert pages.expect_single_pages([]) == 0


def _flags(path: Path) -> list[bool]:
    """For each mapping of a file, whether the kernel expects random reads."""
    found, ours = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.partition(" ")[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("VmFlags:"):
            found.append("rr" in line.split())
    return found


def _locked_bytes(pid: int | str = "self") -> int:
    return proc.memory(pid)["VmLck"]


#: Gives up the right to lock beyond the limit, which takes hold with the next program,
#: and tries to lock.
_LIMITED = """
import ctypes, os, resource, sys
from spikeless.disk import pages

PR_CAPBSET_DROP, CAP_IPC_LOCK = 24, 14
if sys.argv[2] == "first":
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0)
    os.execv(sys.executable, [sys.executable, "-c", sys.orig_argv[2], sys.argv[1], "second"])
pages.Mapping(sys.argv[1]).lock()
"""


def test_the_limit_is_named(file: Path) -> None:
    command = [sys.executable, "-c", _LIMITED, str(file), "first"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "ResourceExhausted" in done.stderr
    assert "memlock limit (now 65536 bytes)" in done.stderr


def _version(models: Path, name: str, number: int, *sizes: int) -> Path:
    """A version with mapped files of these sizes, which appears as a whole."""
    version = models / name / f"staged-{number}"
    (version / "variables").mkdir(parents=True)
    records = []
    for index, size in enumerate(sizes, 1):
        path = f"variables/variables.data-{index:05}-of-{len(sizes) + 1:05}"
        (version / path).write_bytes(bytes(size))
        records.append(FileRecord(path, size, "", True))
    manifest_path(version).parent.mkdir()
    manifest_path(version).write_text(Manifest("test", "", "", 1, False, tuple(records), ()).to_json())
    return version.rename(models / name / str(number))


def test_keeper_follows_what_is_served(tmp_path: Path) -> None:
    first = _version(tmp_path, "a", 1, SIZE, SIZE)
    _version(tmp_path, "b", 7, SIZE)
    (tmp_path / "plain" / "1").mkdir(parents=True)
    with Keeper(lambda: served_versions(tmp_path), 10 * SIZE) as keeper:
        kept = keeper.poll()
        assert (len(kept.locked), kept.released, kept.left_out, kept.bytes) == (3, (), (), 3 * SIZE)
        assert _locked_bytes() == 3 * SIZE
        assert keeper.poll().locked == ()
        second = _version(tmp_path, "a", 2, SIZE)
        kept = keeper.poll()
        assert {path.parents[1] for path in kept.locked} == {second}
        assert {path.parents[1] for path in kept.released} == {first}
        assert _locked_bytes() == kept.bytes == 2 * SIZE
    assert _locked_bytes() == 0


def test_a_version_that_goes_away_is_passed_over(tmp_path: Path) -> None:
    version = _version(tmp_path, "a", 1, SIZE, SIZE)
    next((version / "variables").iterdir()).unlink()
    with Keeper(lambda: served_versions(tmp_path), 10 * SIZE) as keeper:
        assert keeper.poll().bytes == SIZE


def test_keeper_spends_its_budget_on_the_newest_first(tmp_path: Path) -> None:
    old = _version(tmp_path, "a", 1, SIZE)
    new = _version(tmp_path, "a", 2, SIZE)
    other = _version(tmp_path, "b", 1, SIZE)
    served = {"a": [new, old], "b": [other]}
    with Keeper(lambda: served, 2 * SIZE) as keeper:
        kept = keeper.poll()
        assert {path.parents[1] for path in kept.locked} == {new, other}
        assert {path.parents[1] for path in kept.left_out} == {old}
        served = {"a": [new, old]}
        assert {path.parents[1] for path in keeper.poll().locked} == {old}


def test_served_versions_are_those_of_the_configuration(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        _version(tmp_path, "a", number)
    _version(tmp_path, "b", 4)
    assert served_versions(tmp_path) == {"a": [tmp_path / "a" / "3"], "b": [tmp_path / "b" / "4"]}
    config = tmp_path / models_config.FILE_NAME
    config.write_text(
        'model_config_list { config { name: "x" base_path: "/models/a" '
        "model_version_policy { specific { versions: 1 versions: 3 } } } "
        'config { name: "gone" base_path: "/models/gone" } }'
    )
    assert served_versions(tmp_path) == {"x": [tmp_path / "a" / "3", tmp_path / "a" / "1"]}
    config.write_text("model_config_list {")
    with pytest.raises(InvalidArgument, match=r"models\.config"):
        served_versions(tmp_path)
    with pytest.raises(NotFound):
        served_versions(tmp_path / "absent")


def test_a_look_that_keeps_nothing_says_why(tmp_path: Path) -> None:
    (tmp_path / "plain" / "1").mkdir(parents=True)
    look = ("keep", "--once", "--models", tmp_path, "--budget")
    done = spikeless(*look, "1MiB")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"keeping 0 of {SIZE:,} bytes",
        "no version that is served has mapped parameters: see `spikeless map`",
    ]
    _version(tmp_path, "a", 1, SIZE)
    lines = spikeless(*look, 1000).stdout.splitlines()
    assert lines[0].startswith("over budget: ")
    assert lines[1:] == ["keeping 0 of 1,000 bytes"]


def test_the_command_keeps_until_it_is_told_to_stop(tmp_path: Path) -> None:
    _version(tmp_path, "a", 1, SIZE)
    command = [
        sys.executable,
        "-u",
        "-m",
        "spikeless",
        "keep",
        "--models",
        str(tmp_path),
        "--budget",
        "64MiB",
        "--poll",
        "0.05",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert "locked: " in next(lines)
        assert next(lines) == f"keeping {SIZE:,} of {64 * SIZE:,} bytes\n"
        _version(tmp_path, "a", 2, SIZE, SIZE)
        changes = [next(lines).partition(":")[0] for _ in range(3)]
        assert changes == ["locked", "locked", "released"]
        assert next(lines) == f"keeping {2 * SIZE:,} of {64 * SIZE:,} bytes\n"
        # A configuration that cannot be read changes nothing, and is complained of
        # once.
        config = tmp_path / models_config.FILE_NAME
        write_atomically(config, b"model_config_list {")
        assert next(lines).startswith(f"what is locked stays locked: {config} cannot be read: ")
        assert _locked_bytes(process.pid) == 2 * SIZE
        write_atomically(config, b'model_config_list { config { name: "a" base_path: "/m/a" } }')
        _version(tmp_path, "a", 3, SIZE)
        assert [next(lines).partition(":")[0] for _ in range(3)] == ["locked", "released", "released"]
        assert next(lines) == f"keeping {SIZE:,} of {64 * SIZE:,} bytes\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
