"""The README tells the truth: its commands run, its files and links exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from spikeless.cli import COMMANDS

README = (ROOT / "README.md").read_text()
#: What a block of commands may need of a clone.
FOLDERS = ("training", "warmup", "benchmarks")
_BLOCK = re.compile(r"(<!-- not run here: [^>]+ -->\n)?```sh\n(.*?)```", re.DOTALL)


def blocks() -> list[str]:
    return [text for excused, text in _BLOCK.findall(README) if not excused]


def test_the_commands_run(tmp_path: Path) -> None:
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert blocks()
    for block in blocks():
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "models/boston/2/saved_model.pb").exists()
    assert (tmp_path / "report/index.html").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_mentioned_and_has_help(name: str) -> None:
    assert f"spikeless {name}" in README
    done = subprocess.run(
        [sys.executable, "-m", "spikeless", name, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_top_level_folders_are_explained() -> None:
    layout = README.partition("## Layout")[2]
    for folder in (path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")):
        tracked = subprocess.run(
            ["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert not tracked.stdout or f"{folder}/" in layout, folder


def test_the_layers_are_those_that_are_checked() -> None:
    layout = README.partition("## Layout")[2]
    quoted = re.search(r"^layers = \[\n.*?^\]\n", layout, re.MULTILINE | re.DOTALL)
    assert quoted is not None
    assert quoted[0] in (ROOT / "pyproject.toml").read_text()
    explained = re.findall(r"^\| `(\w+)` \|", layout.partition("| extra |")[0], re.MULTILINE)
    assert explained == re.findall(r"\w+", quoted[0].partition("[")[2])
