"""The preloaded library that keeps loading a version apart from requests.

A small program does what a model server does; then real servers load versions with it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from harness import IS_EMBEDDED, ServerFactory, put_version
from places import ROOT

from spikeless import launch
from spikeless.client import Client
from spikeless.errors import InvalidArgument, NotFound
from spikeless.formats.states import State

COMPILER = shutil.which("gcc") and shutil.which("make")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="gcc and make are not installed")

SCHED_OTHER, SCHED_IDLE = 0, 5
POOLS, THREADS = 2, 256
#: Not a whole number of the pieces in which it is unmapped.
TABLE_BYTES, PAGE_BYTES = 9 << 20, 4096
#: Of the table of a model that a server loads.
SERVED_BYTES = 16 << 20


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("isolate") / "source"
    shutil.copytree(ROOT / "docker" / "isolate", source, ignore=shutil.ignore_patterns("*.so"))
    subprocess.run(["make", "-C", str(source)], check=True, capture_output=True, timeout=120)
    return source / launch.ISOLATE_LIBRARY


@pytest.fixture(scope="module")
def program(library: Path) -> Path:
    program = library.with_name("isolated")
    source = ROOT / "tests" / "support" / "isolated.c"
    subprocess.run(["gcc", "-O2", "-pthread", "-o", program, source], check=True, timeout=120)
    return program


@pytest.fixture
def version(tmp_path: Path) -> Path:
    """A version's folder with three files and two folders."""
    for name in ("saved_model.pb", "fingerprint.pb", "table.data", "variables/index", "assets.extra/warmup"):
        file = tmp_path / "1" / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_bytes(b"content")
    (tmp_path / "1" / "table.data").write_bytes(bytes([1]) * TABLE_BYTES)
    return tmp_path / "1"


def _seen(
    program: Path, folder: Path, preload: str, patience: int = 60, **environment: str
) -> dict[str, int]:
    """What the program saw; for `patience` seconds, loads wait for SCHED_IDLE."""
    patience = patience if _may_return_from_idle() else 0
    done = subprocess.run(
        [program, folder, str(patience)],
        env={**os.environ, "LD_PRELOAD": preload, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert not done.stderr
    return {name: int(value) for name, value in (line.split() for line in done.stdout.splitlines())}


def _may_return_from_idle() -> bool:
    """Whether this process may take SCHED_IDLE back."""
    code = "import os; idle = os.sched_param(0)\nfor policy in (os.SCHED_IDLE, os.SCHED_OTHER):\n"
    code += "    os.sched_setscheduler(0, policy, idle)"
    return subprocess.run(["python3", "-c", code], capture_output=True, timeout=60).returncode == 0


def test_a_load_is_kept_apart(library: Path, program: Path, version: Path) -> None:
    seen = _seen(program, version, str(library))
    assert seen["entries"] == 5, "`.`, `..` and three files: a walk that loads sees no sub-folders"
    assert seen["main_entries"] == 7
    assert seen["idle"] == seen["bound"] == POOLS * THREADS
    assert seen["loader_policy"] == (SCHED_IDLE if _may_return_from_idle() else SCHED_OTHER)
    assert seen["table_sum"] == TABLE_BYTES // PAGE_BYTES
    assert seen["pauses"], "what computes lets its processor look for what waits for another one"
    assert seen["rests"], "nothing disturbs a thread that waits"
    assert seen["joins_undisturbed"], "nor one that waits for another to end"
    assert seen["wakes_apart"], "a pool's threads do not wake together"
    assert seen["pauses_at_once"], "before it is seen to run"
    assert seen["touched"], "reading the table enters no page into the page table"
    assert seen["unloader_policy"] == seen["loader_policy"], "who unmaps what a load mapped unloads"
    assert seen["unloader_gone"] == seen["unmapper_gone"] == 1
    for name in ("other_policy", "unmapper_policy", "main_policy", "child_policy"):
        assert seen[name] == SCHED_OTHER, name
    assert seen["loader_processors"] == seen["other_processors"] == len(os.sched_getaffinity(0))
    assert seen["ended"], "a lock that a load held was released while every processor was busy"


def test_a_folder_that_is_no_version_is_shown_whole(library: Path, program: Path, version: Path) -> None:
    (version / "saved_model.pb").rename(version / "model.pb")
    seen = _seen(program, version, str(library), patience=0)
    assert seen["entries"] == 7
    assert seen["idle"] == seen["bound"] == 0
    assert seen["loader_policy"] == SCHED_OTHER


def test_it_can_be_switched_off(library: Path, program: Path, version: Path) -> None:
    seen = _seen(program, version, str(library), patience=0, SPIKELESS_ISOLATE="0")
    assert seen["entries"] == 7
    assert seen["idle"] == seen["bound"] == 0


@pytest.mark.skipif(not launch.jemalloc_installed(), reason=launch.JEMALLOC_REMEDY)
def test_parameters_lie_in_an_arena_of_their_own(library: Path, program: Path, version: Path) -> None:
    seen = _seen(program, version, f"{launch.JEMALLOC}:{library}")
    assert seen["arena"] >= seen["automatic_arenas"], "none that jemalloc gives to threads by turns"
    assert seen["arena"] != seen["main_arena"]
    assert seen["allocated"] >= 8 << 20, "jemalloc's own statistics"


def test_each_part_can_be_left_out(library: Path, program: Path, version: Path) -> None:
    whole = _seen(program, version, str(library))

    def changed(*parts: str) -> set[str]:
        # Without "unmap" the thread that loads gets it, the one that unloads does not.
        patience = 0 if "idle" in parts else 5 if "unmap" in parts else 60
        left_out = ",".join(parts)
        without = _seen(program, version, str(library), patience, SPIKELESS_ISOLATE_WITHOUT=left_out)
        return {name for name in whole if without[name] != whole[name]}

    loader = {"loader_policy"} if _may_return_from_idle() else set()
    unloader = {"unloader_policy"} if _may_return_from_idle() else set()
    pauses = {"pauses", "pauses_at_once"}
    assert changed("hide") == {"entries"}
    assert changed("pool") == {"idle", "bound", "wakes_apart"}
    assert changed("idle") == loader | unloader
    assert changed("pause") == pauses
    assert changed("touch") == {"touched"}
    assert changed("unmap") == unloader
    every = {"entries", "idle", "bound", "wakes_apart", "touched"} | pauses | loader | unloader
    assert changed("hide", "pool", "idle", "pause", "touch", "unmap") == every
    assert changed("hid", "", "pools") == set()


@pytest.mark.skipif(not launch.jemalloc_installed(), reason=launch.JEMALLOC_REMEDY)
def test_the_arena_can_be_left_out(library: Path, program: Path, version: Path) -> None:
    preload = f"{launch.JEMALLOC}:{library}"
    seen = _seen(program, version, preload, SPIKELESS_ISOLATE_WITHOUT="arena")
    assert seen["arena"] < seen["automatic_arenas"]


def _priorities(pid: int) -> list[int]:
    """The scheduling policy of each thread of a process."""
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            fields = (thread / "stat").read_text().rpartition(")")[2].split()
            found.append(int(fields[38]))
    return found


@pytest.mark.skipif(launch.chosen_engine() == launch.DOCKER, reason="an image brings its own library")
def test_a_server_that_loads_apart(
    library: Path, serve: ServerFactory, saved_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(launch.ISOLATE_LIBRARY_VARIABLE, str(library))
    monkeypatch.setenv(launch.ISOLATE_VARIABLE, "1")
    models, inputs = tmp_path / "times", {"x": np.array([1, 2, 4], np.float32)}
    put_version(saved_models / "times_one", models, 1)
    flags = ("--num_load_threads=1", "--num_unload_threads=1")
    with serve(*flags, model_name="times", model_base_path=models) as running:
        answers = {}
        for version, name in enumerate(("times_two", "times_one", "times_two"), start=2):
            put_version(saved_models / name, models, version)
            running.wait("times", {version: State.AVAILABLE})
            (answers[version],) = running.client.predict("times", inputs).values()
        assert np.array_equal(answers[2], answers[4])
        assert not np.array_equal(answers[2], answers[3])
        priorities = _priorities(running.server.pid)
        if not IS_EMBEDDED and _may_return_from_idle():
            deadline = time.monotonic() + 60
            while SCHED_IDLE not in priorities:
                assert time.monotonic() < deadline, "the thread that loads"
                priorities = _priorities(running.server.pid)
        assert priorities.count(SCHED_IDLE) <= 2, "no thread that answers requests"


@pytest.mark.skipif(not launch.jemalloc_installed(), reason=launch.JEMALLOC_REMEDY)
@pytest.mark.skipif(IS_EMBEDDED or launch.chosen_engine() == launch.DOCKER, reason="for a binary")
def test_where_a_server_keeps_parameters(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that is not mapped: jemalloc's statistics of each arena tell."""
    monkeypatch.setenv(launch.ISOLATE_LIBRARY_VARIABLE, str(library))
    script = [sys.executable, str(ROOT / "benchmarks" / "make_embedding_model.py"), str(tmp_path / "made")]
    options = ["--size", str(SERVED_BYTES), "--kind", "module", "--versions", "1"]
    subprocess.run([*script, *options], check=True, capture_output=True, timeout=200)
    model = tmp_path / "made" / "1"

    apart = _large_allocations(model, tmp_path / "apart", "")
    own = max(apart)
    assert apart[own] >= 2 * SERVED_BYTES, "two versions are loaded"
    together = _large_allocations(model, tmp_path / "together", "arena")
    assert own not in together
    assert max(together.values()) >= 2 * SERVED_BYTES, "among the memory of requests"


def _large_allocations(model: Path, work: Path, without: str) -> dict[int, int]:
    """Bytes in large pieces by arena, of a server that has loaded a model twice."""
    for name in "12":
        shutil.copytree(model, work / name / "1")
    settings = launch.LaunchSettings(
        wait_for=("1", "2"),
        flags=(f"--model_config_file={work / 'models.config'}", "--num_load_threads=1"),
        allocator="jemalloc",
        isolate=True,
        environment={
            launch.ISOLATE_WITHOUT_VARIABLE: without,
            # It prints them, as JSON, whenever so many bytes have been allocated.
            "MALLOC_CONF": "stats_interval:4194304,stats_interval_opts:Jgmdblxe",
        },
        log=work / "log",
    )
    configs = [
        f'config {{ name: "{name}" base_path: "{work / name}" model_platform: "tensorflow" }}'
        for name in "12"
    ]
    (work / "models.config").write_text(f"model_config_list {{ {' '.join(configs)} }}")
    with (
        launch.start(launch.unoptimizing(settings, work)) as server,
        Client(server.target, timeout=60) as client,
    ):
        loaded = (work / "log").stat().st_size
        deadline = time.monotonic() + 60
        while not (found := _last_statistics((work / "log").read_bytes()[loaded:].decode(errors="replace"))):
            assert time.monotonic() < deadline
            client.predict("1", {"ids": np.zeros((500, 32), np.int64)})
    return found


def _last_statistics(log: str) -> dict[int, int]:
    """By arena, from the last text of jemalloc's that is complete."""
    *_, complete, _ = ["", *log.split('{"jemalloc"')]
    found = re.findall(r'"(\d+)":{"nthreads":.*?"large":{"allocated":(\d+)', complete)
    return {int(arena): int(allocated) for arena, allocated in found}


def test_what_cannot_be_preloaded_is_refused(saved_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.ISOLATE_LIBRARY_VARIABLE, "libnothing.so")
    settings = launch.LaunchSettings("times", saved_models, isolate=True, engine=launch.EMBEDDED)
    with pytest.raises(NotFound, match=r"libnothing\.so cannot be loaded: build it with"):
        launch.start(settings)
    monkeypatch.setenv(launch.ISOLATE_VARIABLE, "yes")
    with pytest.raises(InvalidArgument, match="SPIKELESS_ISOLATE must be 0 or 1, not 'yes'"):
        launch.start(launch.LaunchSettings("times", saved_models, engine=launch.EMBEDDED))
