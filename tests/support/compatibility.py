"""The tables of the documentation on what the embedded engine takes and does.

The compatibility table comes from ``differences.toml``, the table of flags from their
declarations. As a script it updates the tables between their markers in a file:
``python tests/support/compatibility.py README.md docs/server-flags.md``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from spikeless.engine import flags

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DIFFERENCES = Path(__file__).with_name("differences.toml")
BLOCK = re.compile(r"(<!-- (compatibility|server flags) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def differences() -> list[dict[str, str]]:
    """The entries: behaviour, serving, embedded, reason and test."""
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
    """The text with the tables between their markers."""
    tables = {"compatibility": table, "server flags": flags.reference}
    return BLOCK.sub(lambda found: found[1] + tables[found[2]]() + found[3], text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(updated(file.read_text()))
