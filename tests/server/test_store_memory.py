"""What push and pull need of memory: as much for a large version as for a small one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fleet_models import NAME
from small_versions import TABLE, small_version

from spikeless.disk import pages, proc
from spikeless.mapping import read_manifest
from spikeless.store.manifest import PIECE_BYTES
from spikeless.store.pull import pull
from spikeless.store.push import push

MIB = 1 << 20
WORKERS = 2
ROW_BYTES = 256
SMALL, LARGE = 64 * MIB, 256 * MIB
#: An object on its way as it is, as it was, the difference and the compressed one.
COPIES = 4


def peak(*arguments: object) -> int:
    """The most private memory of a command while it runs, in bytes."""
    command = [sys.executable, "-m", "spikeless", *map(str, arguments), f"--workers={WORKERS}"]
    most = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        while running.poll() is None:
            # A process that has just ended has no memory.
            most = max(most, proc.private_memory(running.pid))
        assert running.stderr is not None
        assert running.returncode == 0, running.stderr.read()
    return most


@pytest.mark.timeout(900)
def test_memory_does_not_grow_with_the_version(tmp_path: Path) -> None:
    """Neither for a whole table, nor for one in which rows have changed."""
    peaks: dict[tuple[int, str], int] = {}
    for size in (SMALL, LARGE):
        place = tmp_path / str(size)
        store, trained, pulled = place / "store", place / "trained", place / "pulled"
        random = np.random.default_rng(1)
        table = np.frombuffer(random.bytes(size), np.uint8).reshape(-1, ROW_BYTES).copy()
        small_version(trained, 1, table.tobytes())
        table[::100] ^= 1
        small_version(trained, 2, table.tobytes())
        for number in (1, 2):
            peaks[size, f"push {number}"] = peak("push", trained / NAME / str(number), store)
            peaks[size, f"pull {number}"] = peak("pull", store, NAME, "--models", pulled)
            assert (pulled / NAME / str(number) / TABLE).stat().st_size == size
    for act in ("push 1", "pull 1", "push 2", "pull 2"):
        growth = peaks[LARGE, act] - peaks[SMALL, act]
        assert growth < WORKERS * COPIES * PIECE_BYTES < (LARGE - SMALL) // 2, (act, peaks)


def test_versions_share_the_page_cache_of_what_did_not_change(trained: Path, tmp_path: Path) -> None:
    """The mapped table of two pulled versions is one file, which is in memory once."""
    store, models = str(tmp_path / "store"), tmp_path / "pulled"
    for number in (2, 3):
        push(trained / NAME / str(number), store)
        pull(store, models)
    files = []
    for number in (2, 3):
        (mapped,) = read_manifest(models / NAME / str(number)).mapped_files()
        files.append(models / NAME / str(number) / mapped.path)
    older, newer = (file.stat() for file in files)
    assert (older.st_dev, older.st_ino) == (newer.st_dev, newer.st_ino)
    assert older.st_size > 64 * MIB - 1
    pages.prefetch(files[0])
    with pages.Mapping(files[1]) as mapping:
        assert mapping.resident() == mapping.size
