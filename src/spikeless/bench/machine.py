"""What a result was measured on: system, processor, and the commit of the source.

What a system does not tell is ``unknown``.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

from spikeless.disk import proc
from spikeless.disk.git import commit

UNKNOWN = "unknown"
#: Says in our images which commit they were made of.
REVISION_VARIABLE = "SPIKELESS_REVISION"


@dataclass(frozen=True)
class Machine:
    """The machine of a measurement."""

    system: str
    kernel: str
    architecture: str
    cpu: str
    #: Those that this process may use.
    cpus: int
    #: In bytes.
    memory: int
    python: str

    def describe(self) -> str:
        """One line, the same for every run on one machine."""
        return (
            f"{self.cpu}, {self.cpus} CPUs, {self.memory / 2**30:.0f} GiB, {self.system}, {self.kernel}, "
            f"{self.architecture}"
        )


def describe_machine() -> Machine:
    """The machine that this process runs on."""
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
    """The commit that this package is at (see `spikeless.disk.git.commit`).

    Images have no git: their environment says which it is.
    """
    return commit(Path(__file__).parent, digits=12) or os.environ.get(REVISION_VARIABLE) or UNKNOWN


def _cpu_model() -> str:
    """The processors' name; where it is not told, the architecture."""
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
