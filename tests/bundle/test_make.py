"""What `make` removes and installs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from places import ROOT

#: Everything that commands write into a clone, and its cache.
WRITTEN = (
    ".venv-oldest/x",
    "runs/x",
    "runs/.data/x",
    "reports/x",
    "models/boston/1/x",
    "models/models.config",
    "site/x",
    ".mypy_cache/x",
    "cache/engine/x",
)
KEPT = ("runs/.gitignore", "reports/.gitignore", "models/.gitignore", "cache/other")


@pytest.mark.parametrize(
    ("target", "removed"),
    [
        ("clean", {"site/x", ".mypy_cache/x"}),
        ("clean-env", {".venv-oldest/x"}),
        ("clean-runs", {"runs/x", "runs/.data/x", "reports/x"}),
        ("clean-models", {"models/boston/1/x", "models/models.config"}),
        ("clean-cache", {"cache/engine/x"}),
    ],
)
def test_each_target_removes_one_kind_of_thing(tmp_path: Path, target: str, removed: set[str]) -> None:
    for name in WRITTEN + KEPT:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    subprocess.run(
        ["make", "--file", ROOT / "Makefile", target],
        cwd=tmp_path,
        env={**os.environ, "SPIKELESS_CACHE": str(tmp_path / "cache")},
        check=True,
        capture_output=True,
    )
    assert {name for name in WRITTEN if not (tmp_path / name).exists()} == removed
    assert all((tmp_path / name).exists() for name in KEPT)
    assert f"`make {target}`" in (ROOT / "docs" / "reference" / "installation.md").read_text()


def test_system_packages_are_those_of_the_documentation() -> None:
    done = subprocess.run(
        [ROOT / ".ci/system-packages", "--list"], capture_output=True, text=True, check=True
    )
    text = (ROOT / "docs" / "reference" / "installation.md").read_text()
    packages = done.stdout.split()
    assert len(packages) == 6
    assert all(f"`{package}`" in text for package in packages)


def test_commands_write_nothing_that_git_would_see() -> None:
    written = [name for name in WRITTEN if not name.startswith("cache/")]
    ignored = subprocess.run(
        ["git", "-c", "safe.directory=*", "check-ignore", *written], cwd=ROOT, capture_output=True, text=True
    )
    assert ignored.stdout.split() == written
