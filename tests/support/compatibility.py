"""The README's compatibility table, from ``differences.toml``.

As a script it brings a file up to date between its two markers:
``python tests/support/compatibility.py README.md``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DIFFERENCES = Path(__file__).with_name("differences.toml")
BLOCK = re.compile(r"(<!-- compatibility -->\n).*?(<!-- /compatibility -->)", re.DOTALL)


def differences() -> list[dict[str, str]]:
    """The entries of ``differences.toml``, each with behaviour, serving, embedded, reason and test."""
    entries: list[dict[str, str]] = tomllib.loads(DIFFERENCES.read_text())["difference"]
    return entries


def table() -> str:
    """A markdown table with a row for each difference."""
    rows = ["| What | TensorFlow Serving 2.20.0 | Embedded engine | Why |", "|---|---|---|---|"]
    for entry in differences():
        cells = (entry[key].replace("|", "\\|") for key in ("behaviour", "serving", "embedded", "reason"))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def updated(text: str) -> str:
    """The text with the table between its markers."""
    return BLOCK.sub(lambda found: found[1] + table() + found[2], text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(updated(file.read_text()))
