"""The documentation tells the truth: its commands run."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import pytest
from machines import wait_for
from places import ROOT

from spikeless.cli.bench.gate import gate_command

DOCS = ROOT / "docs"
#: tests/bundle/test_containers.py runs this page on a container engine.
DOCKER = DOCS / "how-to" / "docker.md"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), ROOT / "docker" / "README.md"]
#: Front pages are run by test_readme.py.
RUNNABLE = [
    document
    for document in DOCUMENTS
    if document != DOCKER
    and not document.name.startswith("README")
    and any(not block.excuse for block in pages.blocks(document.read_text()))
]
#: How late an idle processor may come back.
LATENCY = Path("/dev/cpu_dma_latency")
#: What commands may need of a clone.
FOLDERS = ("training", "warmup", "benchmarks")


def name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


@pytest.fixture
def clone(tmp_path: Path, boston_run: Path) -> Path:
    """A clone in which the demo model was trained."""
    for folder in FOLDERS:
        (tmp_path / folder).symlink_to(ROOT / folder)
    shutil.copytree(boston_run, tmp_path / "runs" / boston_run.name)
    return tmp_path


@pytest.mark.parametrize("document", RUNNABLE, ids=name)
def test_the_commands_run(document: Path, clone: Path) -> None:
    pages.run(document.read_text(), clone)


def test_commands_that_are_not_run_here_name_the_test_that_runs_them() -> None:
    for document in DOCUMENTS:
        for block in pages.blocks(document.read_text()):
            named = re.findall(r"tests/\w+(?:/\w+\.py)?", block.excuse)
            assert bool(named) == bool(block.excuse), f"{name(document)}: {block.excuse}"
            assert all((ROOT / path).exists() for path in named), f"{name(document)}: {block.excuse}"


def allowed_latency() -> int:
    with LATENCY.open("rb", buffering=0) as device:
        return int.from_bytes(device.read(4), sys.byteorder)


@pytest.mark.skipif(not os.access(LATENCY, os.R_OK | os.W_OK), reason="for root, on a machine of its own")
def test_idle_processors_poll_as_long_as_the_command_runs() -> None:
    page = (DOCS / "how-to" / "measure.md").read_text()
    (text,) = (block.text for block in pages.blocks(page) if str(LATENCY) in block.text)
    sudo, python, *arguments = shlex.split(text)
    assert (sudo, python) == ("sudo", "python3")
    before = allowed_latency()
    if before == 0:
        pytest.skip("something keeps the processors awake already")
    with subprocess.Popen([sys.executable, *arguments]) as process:
        try:
            wait_for(lambda: allowed_latency() == 0, "idle processors poll")
        finally:
            process.terminate()
    assert allowed_latency() == before


def test_every_page_says_whom_it_helps() -> None:
    for page in DOCS.rglob("*.md"):
        if page.name != "index.md":
            text = page.read_text()
            assert text.startswith("# "), page
            assert re.match(r"For (?:whoever|models) ", text.split("\n\n")[1]), page


def test_the_picture_of_the_spike_is_of_the_checked_in_result() -> None:
    pictures = runpy.run_path(str(DOCS / "pictures.py"))
    assert pictures["PICTURE"].read_text() == pictures["spike"](), "run: python docs/pictures.py"


@pytest.mark.parametrize(("number", "schema"), [(0, "github-workflows"), (1, "gitlab-ci")])
def test_pipelines_fit_the_schema_of_their_service(number: int, schema: str, tmp_path: Path) -> None:
    page = (DOCS / "how-to" / "ci-check.md").read_text()
    file = tmp_path / "pipeline.yml"
    file.write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[number])
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    options = re.findall(r"--[a-z-]+", re.sub(r"pip install.*", "", file.read_text()))
    known = {name for parameter in gate_command.params for name in parameter.opts}
    assert set(options) <= known, "the gate has every option that it is given"
