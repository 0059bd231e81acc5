"""Raw results become a page that a person reads, and the same table in Markdown."""

from spikeless.bench.report.comparison import ResultComparison, compare
from spikeless.bench.report.goal import GOAL, met, render_goal
from spikeless.bench.report.notes import Note, notes
from spikeless.bench.report.page import (
    floor_text,
    provenance,
    render_html,
    render_markdown,
    write,
)
from spikeless.bench.report.pictures import Panel
from spikeless.bench.report.table import Row, Scenario, group, table
from spikeless.bench.report.terminal import show
from spikeless.bench.report.verdict import Verdict, judge

__all__ = [
    "GOAL",
    "Note",
    "Panel",
    "ResultComparison",
    "Row",
    "Scenario",
    "Verdict",
    "compare",
    "floor_text",
    "group",
    "judge",
    "met",
    "notes",
    "provenance",
    "render_goal",
    "render_html",
    "render_markdown",
    "show",
    "table",
    "write",
]
