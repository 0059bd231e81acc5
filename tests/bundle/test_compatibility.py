"""What the README says of the two engines' differences is what the tests show."""

from __future__ import annotations

import re

import compatibility
import pytest
from places import ROOT


def test_the_table_in_the_readme_is_up_to_date() -> None:
    text = (ROOT / "README.md").read_text()
    assert compatibility.BLOCK.search(text), "README.md has lost its compatibility markers"
    assert compatibility.updated(text) == text, "run: python tests/support/compatibility.py README.md"


@pytest.mark.parametrize("entry", compatibility.differences(), ids=lambda entry: entry["behaviour"])
def test_every_difference_is_held_by_a_test(entry: dict[str, str]) -> None:
    assert set(entry) == {"behaviour", "serving", "embedded", "reason", "test"}
    file, _, name = entry["test"].partition("::")
    source = (ROOT / "tests" / "server" / file).read_text()
    assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"there is no {entry['test']}"
