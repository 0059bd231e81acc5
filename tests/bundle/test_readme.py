"""The front pages tell the truth, and the two of them the same."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import pytest
from places import ROOT

from spikeless.cli import COMMANDS

README = (ROOT / "README.md").read_text()
CHINESE = (ROOT / "README.zh-CN.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
#: What a block of commands may need of a clone.
FOLDERS = ("training", "warmup", "benchmarks")


def test_the_commands_run(tmp_path: Path) -> None:
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    pages.run(README, tmp_path)
    assert (tmp_path / "models/boston/1/saved_model.pb").exists()
    assert (tmp_path / "reports/first/index.html").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_mentioned_and_has_help(name: str) -> None:
    assert re.search(rf"`(?:spikeless )?{name}`|spikeless {name}\b", README)
    done = subprocess.run(
        [sys.executable, "-m", "spikeless", name, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


@pytest.mark.parametrize("text", [README, CHINESE], ids=["English", "Chinese"])
def test_a_front_page_is_short_and_its_links_lead_somewhere(text: str) -> None:
    assert len(text.splitlines()) <= 150
    for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#]+)(#([^)]+))?\)", text):
        assert (ROOT / target).exists(), target
        headings = re.findall(r"^#+ (.+)$", (ROOT / target).read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, anchor


def test_the_chinese_front_page_is_the_english_one() -> None:
    """The same commands and output, figures and rows, links but that to the other."""
    assert pages.blocks(CHINESE) == pages.blocks(README)
    for pattern in (
        r"```text\n.*?```",  # what commands print
        r"^#+ ",
        r"^\|",
        r"(?<=\| )[\d.,]+(?: [mM]i?[sB])?(?= \|)",  # figures in tables
        r"\]\((?!README)([^)]+)\)",
        r"`(?:spikeless|make) [^`]+`",
    ):
        english, chinese = (re.findall(pattern, text, re.MULTILINE | re.DOTALL) for text in (README, CHINESE))
        assert chinese == english


def test_top_level_folders_are_explained() -> None:
    layout = ARCHITECTURE.partition("## Layout")[2]
    for folder in (path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")):
        tracked = subprocess.run(
            ["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert not tracked.stdout or f"{folder}/" in layout, folder


def test_the_layers_are_those_that_are_checked() -> None:
    layout = ARCHITECTURE.partition("## Layout")[2]
    quoted = re.search(r"^layers = \[\n.*?^\]\n", layout, re.MULTILINE | re.DOTALL)
    assert quoted is not None
    assert quoted[0] in (ROOT / "pyproject.toml").read_text()
    explained = re.findall(r"^\| `(\w+)` \|", layout, re.MULTILINE)
    assert explained == re.findall(r"\w+", quoted[0].partition("[")[2])
