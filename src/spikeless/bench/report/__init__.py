"""Raw results to a page that a person reads, and to the same tables in Markdown."""

from spikeless.bench.report.page import (
    Panel,
    Row,
    Scenario,
    floor_text,
    group,
    provenance,
    render_html,
    render_markdown,
    table,
    warnings,
    write,
)

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
