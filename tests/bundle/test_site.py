"""The documentation as a site: it builds strictly and needs no network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

import spikeless
from spikeless.cli import COMMANDS

# One process builds it, once.
pytestmark = pytest.mark.xdist_group("site")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_needs_nothing_from_the_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:link|script|img|iframe|source)\b[^>]*?(?:src|href)=\"([^\"]+)\"", page.read_text()
        )
        assert loaded
        assert not [address for address in loaded if re.match(r"(?:https?:)?//", address)], page


def test_the_site_has_every_command_and_public_name(site: Path) -> None:
    commands = (site / "reference" / "commands.html").read_text()
    for command in COMMANDS:
        assert f"spikeless {command} " in commands, command
    python = (ROOT / "docs" / "reference" / "python.md").read_text()
    for public in spikeless.__all__:
        assert public == "__version__" or re.search(rf"\bspikeless\.(?:\w+\.)*{public}\b", python), public
