"""What the documentation says of the embedded engine is what code and tests say."""

from __future__ import annotations

import re

import compatibility
import pytest
from places import ROOT


@pytest.mark.parametrize("file", ["README.md", "docs/server-flags.md"])
def test_tables_are_up_to_date(file: str) -> None:
    text = (ROOT / file).read_text()
    assert compatibility.BLOCK.search(text), f"{file} has lost its markers"
    assert compatibility.updated(text) == text, f"run: python tests/support/compatibility.py {file}"


@pytest.mark.parametrize("entry", compatibility.differences(), ids=lambda entry: entry["behaviour"])
def test_every_difference_is_held_by_a_test(entry: dict[str, str]) -> None:
    assert set(entry) == {"behaviour", "serving", "embedded", "reason", "test"}
    file, _, name = entry["test"].partition("::")
    source = (ROOT / "tests" / "server" / file).read_text()
    assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"there is no {entry['test']}"
