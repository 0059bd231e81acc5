"""The factorization machine, trained as a user would.

In: nothing. Out: the session fixture ``boston_run``, its run directory; ``spikeless``
runs the command; ``NEEDS_JAVA`` marks what Spark has to be there for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

NEEDS_JAVA = pytest.mark.skipif(
    shutil.which("java") is None and "JAVA_HOME" not in os.environ,
    reason="Spark needs Java: apt-get install openjdk-17-jre-headless",
)


def spikeless(*arguments: object, cwd: Path = ROOT, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, from the root of the bundle by default."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [sys.executable, "-m", "spikeless", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        **options,
    )
    return done


@pytest.fixture(scope="session")
def boston_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    done = spikeless("train", "factorization_machine", "--runs", runs)
    assert done.returncode == 0, done.stderr
    (run,) = (path for path in runs.iterdir() if not path.name.startswith("."))
    assert done.stdout.splitlines()[-1] == f"run directory: {run}"
    return run
