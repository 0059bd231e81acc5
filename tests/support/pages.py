"""Documents as programs: the commands in a page, run in order.

In: a Markdown file. Out: its blocks of ``sh`` and ``python``, run in a folder as a
reader would. A comment in the line above a block says what is special about it:

``<!-- not run here: REASON -->``    skip it; the reason names the test that runs it
``<!-- keeps running: TEXT -->``     go on when its output has TEXT, end it at the end
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from spikeless.launch import free_port

_BLOCK = re.compile(
    r"(?:<!-- (not run here|keeps running): ([^>]+) -->\n)?```(sh|python)\n(.*?)```", re.DOTALL
)
#: Ports that pages name, each a free one when they are run.
_PORTS = ("8500", "8501", "8510")
_BLOCK_SECONDS = 280
_START_SECONDS = 120


@dataclass(frozen=True)
class Block:
    """A block of commands."""

    #: ``sh`` or ``python``.
    language: str
    text: str
    #: Why it is not run.
    excuse: str = ""
    #: What it prints when it is ready, when it goes on running.
    ready: str = ""

    @property
    def command(self) -> list[str]:
        if self.language == "python":
            return [sys.executable, "-c", self.text]
        return ["bash", "-euo", "pipefail", "-c", self.text]


def blocks(page: str) -> list[Block]:
    """Every block of a page, in order."""
    found = []
    for kind, what, language, text in _BLOCK.findall(page):
        excuse, ready = (what, "") if kind == "not run here" else ("", what)
        found.append(Block(language, text, excuse, ready))
    return found


def run(page: str, folder: Path) -> None:
    """Run the blocks of a page in a folder, with this environment's commands.

    Of a busy machine, the latencies of two versions tell nothing.
    """
    page = re.sub(r"(spikeless promote .*)(--servers )", r"\1--max-p99-ratio=1e6 \2", page)
    for port in _PORTS:
        page = re.sub(rf"\b{port}\b", str(free_port()), page)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with ExitStack() as stack:
        for number, block in enumerate(block for block in blocks(page) if not block.excuse):
            if block.ready:
                log = folder / f".block-{number}.log"
                stack.enter_context(_running(block, folder, environment, log))
                continue
            done = subprocess.run(
                block.command,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=_BLOCK_SECONDS,
                check=False,
            )
            assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"


@contextmanager
def _running(block: Block, folder: Path, environment: dict[str, str], log: Path) -> Iterator[None]:
    """The block in the background, from when it is ready to SIGTERM, which ends it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            # One command, in the shell's place, so that the signal reaches it.
            ["bash", "-euo", "pipefail", "-c", f"exec {block.text}"],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while block.ready not in log.read_text(errors="replace"):
            shown = f"{block.text}\n{log.read_text(errors='replace')}"
            assert process.poll() is None, f"it ended: {shown}"
            assert time.monotonic() < deadline, f"it did not print {block.ready!r}: {shown}"
            time.sleep(0.05)
        yield
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, log.read_text(errors="replace")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
