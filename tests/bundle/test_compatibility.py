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


def _numbers(text: str) -> set[str]:
    """Those that stand alone: no versions, dates or parts of names."""
    return set(re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w-]|\.\d)", re.sub(r"(?<=\d),(?=\d)", "", text)))


def test_figures_in_links_to_results_are_in_these_results() -> None:
    """``[171 ms and 5.23 ms](…/summary.md)``: how text outside of tables stays true."""
    held = 0
    for document in compatibility.documents():
        typed = compatibility.BLOCK.sub("", document.read_text())
        links = re.findall(r"\[((?:[^][]|\[[^][]*\])*)\]\(([^)\s]*benchmarks/results/[^)#\s]*)", typed)
        for text, target in links:
            figures = _numbers(text)
            if not figures:
                continue
            unknown = figures - _numbers((document.parent / target).read_text())
            assert not unknown, f"{document}: {target} does not have {unknown} of “{text}”"
            held += len(figures)
    assert held > 20


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
