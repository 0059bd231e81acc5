"""A judgement as text, as Markdown for a pull request, and as JUnit XML for CI.

In: a `Judgement`. Out: the same table each time: limit, value, interval, verdict.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spikeless.bench.gate import Check, GateOutcome, Judgement
from spikeless.bench.report.table import NOTHING, milliseconds

_COLOURS = {GateOutcome.HELD: "green", GateOutcome.BROKEN: "red", GateOutcome.UNCLEAR: "yellow"}
_COLUMNS = ("", "limit", "value", "95% interval", "verdict")


def sentence(judgement: Judgement) -> str:
    """The outcome in one line."""
    used = judgement.reloads - len(judgement.left_out)
    outcome = judgement.outcome.value.capitalize()
    return f"{outcome}: {judgement.scenario}, {used} of {judgement.reloads} reloads."


def show_judgement(judgement: Judgement, console: Console) -> None:
    """Print the table, why a limit is not held, and the outcome."""
    table = Table(box=box.SIMPLE)
    for number, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if number in (0, 4) else "right")
    for check in judgement.checks:
        *cells, verdict = _cells(check)
        table.add_row(*map(escape, cells), f"[{_COLOURS[check.outcome]}]{verdict}[/]")
    console.print(table)
    for line in _reasons(judgement):
        console.print(escape(line), soft_wrap=True, highlight=False)
    last = f"[bold {_COLOURS[judgement.outcome]}]{escape(sentence(judgement))}[/]"
    console.print(last, soft_wrap=True, highlight=False)


def judgement_markdown(judgement: Judgement) -> str:
    """The same for the comment of a pull request."""
    rows = [_COLUMNS, ("---", "---:", "---:", "---:", "---"), *map(_cells, judgement.checks)]
    lines = [f"**{sentence(judgement)}**", ""]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    reasons = [f"- {line}" for line in _reasons(judgement)]
    return "\n".join([*lines, *(["", *reasons] if reasons else []), ""])


def judgement_junit(judgement: Judgement) -> bytes:
    """The same as JUnit XML: a broken limit is a failure, an unclear one an error."""
    outcomes = [check.outcome for check in judgement.checks]
    counts = {
        "tests": len(outcomes),
        "failures": outcomes.count(GateOutcome.BROKEN),
        "errors": outcomes.count(GateOutcome.UNCLEAR),
    }
    attributes = {name: str(count) for name, count in counts.items()}
    suites = ElementTree.Element("testsuites", attributes)
    name = f"spikeless bench gate: {judgement.scenario}"
    suite = ElementTree.SubElement(suites, "testsuite", {"name": name, "skipped": "0", **attributes})
    for check in judgement.checks:
        case = ElementTree.SubElement(
            suite, "testcase", {"name": check.name, "classname": judgement.scenario, "time": "0"}
        )
        _, limit, value, interval, verdict = _cells(check)
        told = f"{verdict}: limit {limit}, value {value}, 95% interval {interval}"
        if check.outcome == GateOutcome.HELD:
            ElementTree.SubElement(case, "system-out").text = _printable(told)
            continue
        tag = "failure" if check.outcome == GateOutcome.BROKEN else "error"
        message = f"{told}; {check.why}" if check.why else told
        ElementTree.SubElement(case, tag, {"type": verdict, "message": _printable(message)})
    ElementTree.indent(suites)
    content: bytes = ElementTree.tostring(suites, "utf-8", xml_declaration=True)
    return content


def _cells(check: Check) -> Sequence[str]:
    interval = (
        NOTHING
        if check.low is None or check.high is None or not check.unit
        else f"{_number(check.low, check.unit)} to {_number(check.high, check.unit)}"
    )
    return (
        check.name,
        _number(check.limit, check.unit),
        NOTHING if check.value is None else _number(check.value, check.unit),
        interval,
        check.outcome.value,
    )


def _number(value: float, unit: str) -> str:
    if unit == "ms":
        return milliseconds(value)
    return f"{value:.2f}x" if unit else f"{value:,.0f}"


def _reasons(judgement: Judgement) -> list[str]:
    return [f"{check.name}: {check.why}" for check in judgement.checks if check.why]


def _printable(text: str) -> str:
    """Without the control characters that XML cannot hold, which messages may have."""
    return "".join(char if char.isprintable() else " " for char in text)
