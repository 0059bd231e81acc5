"""What a command has started ends with it, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from promotion_models import NAME

from spikeless.disk import children


def words_of(process: psutil.Process) -> set[str]:
    """The command of a process; nothing when it has ended."""
    try:
        return set(process.cmdline())
    except psutil.NoSuchProcess:
        return set()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_bench_leaves_nothing_behind(models: Path, tmp_path: Path, ending: signal.Signals) -> None:
    command = [sys.executable, "-m", "spikeless", "bench", "run", NAME, "--duration", "100"]
    command += ["--no-floor", "--models", str(models), "--out", str(tmp_path / "raw")]
    with (tmp_path / "log").open("w") as log:
        bench = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    started: list[psutil.Process] = []
    try:
        parent, deadline = psutil.Process(bench.pid), time.monotonic() + 100
        while not {"locust", f"--model_name={NAME}"} <= set().union(*map(words_of, started)):
            assert bench.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            started = parent.children(recursive=True)
            time.sleep(0.05)
        bench.send_signal(ending)
        assert bench.wait(120) == (143 if ending is signal.SIGTERM else -ending)
        _, alive = psutil.wait_procs(started, timeout=120)
        assert not alive
    finally:
        bench.kill()
        for child in started:
            if child.is_running():
                child.kill()


def test_a_thread_that_ends_does_not_end_what_it_started() -> None:
    """The kernel would take the end of a thread for that of its parent."""
    found: list[list[str]] = []
    thread = threading.Thread(target=lambda: found.append(children.tied(["true"])))
    thread.start()
    thread.join()
    assert found == [["true"]]
