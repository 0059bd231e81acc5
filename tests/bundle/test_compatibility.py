"""What the documentation's tables say is what code, tests and results say."""

from __future__ import annotations

import re

import compatibility
import pytest
from places import ROOT


def test_tables_are_up_to_date() -> None:
    found = set()
    for document in compatibility.documents():
        text = document.read_text()
        found |= {name for _, name, _, _ in compatibility.BLOCK.findall(text)}
        assert compatibility.updated(text) == text, f"{document}: run python tests/support/compatibility.py"
    assert found == set(compatibility.TABLES), "a document has lost its markers"


@pytest.mark.parametrize("entry", compatibility.differences(), ids=lambda entry: entry["behaviour"])
def test_every_difference_is_held_by_a_test(entry: dict[str, str]) -> None:
    assert set(entry) == {"behaviour", "serving", "embedded", "reason", "test"}
    file, _, name = entry["test"].partition("::")
    source = (ROOT / "tests" / "server" / file).read_text()
    assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"there is no {entry['test']}"


def test_environment_variables_are_documented() -> None:
    """Each that the package or the entrypoint reads, and none that neither does."""
    page = (ROOT / "docs" / "reference" / "environment.md").read_text().partition("## Of the stack")[0]
    package, images = page.split("## Of the images")
    read = set()
    for file in [*(ROOT / "src").rglob("*.py"), *(ROOT / "training").glob("*.py")]:
        text = file.read_text()
        read |= set(re.findall(r'\bos\.environ(?:\.get|\.setdefault)\(\s*"([A-Z_]+)"', text))
        read |= set(re.findall(r'^[A-Z_]+_VARIABLE = "([A-Z_]+)"', text, re.MULTILINE))
    assert set(re.findall(r"^\| `([A-Z_]+)`", package, re.MULTILINE)) == read
    entrypoint = (ROOT / "docker" / "entrypoint").read_text()
    serving = (ROOT / "src" / "spikeless" / "serving-flags.bash").read_text()
    read = set(re.findall(r"\$\{([A-Z_]+):?[-=+]", entrypoint + serving)) - {"TMPDIR"}
    assert set(re.findall(r"^\| `([A-Z_]+)`", images, re.MULTILINE)) == read
