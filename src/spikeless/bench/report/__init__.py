"""Raw results become a page that a person reads, and the same table in Markdown."""

from spikeless.bench.report.page import (
    floor_text,
    provenance,
    render_html,
    render_markdown,
    warnings,
    write,
)
from spikeless.bench.report.pictures import Panel
from spikeless.bench.report.table import Row, Scenario, group, table

__all__ = [
    "Panel",
    "Row",
    "Scenario",
    "floor_text",
    "group",
    "provenance",
    "render_html",
    "render_markdown",
    "table",
    "warnings",
    "write",
]
