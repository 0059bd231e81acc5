"""The commit of a working tree, for records of what was trained or measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

_TIMEOUT_SECONDS = 10


def commit(directory: Path, digits: int = 40) -> str | None:
    """The commit of the tree around `directory`; None outside git, or without git.

    It ends with ``-dirty`` when tracked files differ from it.
    """
    command = ["git", "describe", "--always", "--dirty", f"--abbrev={digits}", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, check=True, timeout=_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
