"""On what a result was measured: machine, kernel, processor, and the state of the source.

In: nothing. Out: facts for the record. What a system does not tell is ``unknown``.
"""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from spikeless.disk import proc

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Machine:
    """`cpus` are those that this process may use, `memory` is in bytes."""

    system: str
    kernel: str
    architecture: str
    cpu: str
    cpus: int
    memory: int
    python: str


def describe_machine() -> Machine:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        system=_distribution(),
        kernel=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        cpu=_cpu_model(),
        cpus=cpus,
        memory=psutil.virtual_memory().total,
        python=platform.python_version(),
    )


def source_commit() -> str:
    """The commit that this package is at, with ``+changes`` when files differ from it."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "--short=12", "HEAD")
        return commit + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN


def _git(directory: Path, *arguments: str) -> str:
    answer = subprocess.run(
        ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return answer.stdout.strip()


def _cpu_model() -> str:
    """The processors' name; machines that do not tell it say at least their architecture."""
    try:
        model = proc.processor_model()
    except OSError:
        model = None
    return model or platform.processor() or platform.machine() or UNKNOWN


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform(terse=True)
