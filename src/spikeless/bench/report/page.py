"""The report: one HTML page that needs no network, and its numbers as Markdown.

In: the raw results of `spikeless bench run`. Out: ``index.html`` and ``summary.md`` in
a directory.
"""

from __future__ import annotations

import base64
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jinja2

from spikeless import __version__
from spikeless.bench import run_file
from spikeless.bench.analysis import RULES
from spikeless.bench.events import EVENTS, PUBLISH
from spikeless.bench.folding import FOLD_RULES, INTERVAL_RULE
from spikeless.bench.report.comparison import ResultComparison
from spikeless.bench.report.notes import notes
from spikeless.bench.report.pictures import Panel, draw, draw_ladder
from spikeless.bench.report.table import Row, Scenario, estimate, group, table
from spikeless.bench.report.verdict import judge
from spikeless.disk.atomic import write_atomically


def write(
    results: Sequence[str | os.PathLike[str]],
    directory: str | os.PathLike[str],
    comparison: ResultComparison | None = None,
) -> Path:
    """Write the report on these raw results; returns the path of the page.

    With a `comparison` of them it says what changed.

    Raises:
        InvalidArgument: there are no results, or a run has no steady window.
        NotFound, DataLoss: a result cannot be read.
    """
    scenarios = comparison.scenarios if comparison else group([run_file.read_run(path) for path in results])
    out = Path(directory)
    sources = [Path(os.path.relpath(path, out)).as_posix() for path in results]
    html, markdown = render_html(scenarios, comparison, sources), render_markdown(scenarios, comparison)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "summary.md", markdown.encode())
    write_atomically(out / "index.html", html.encode())
    return out / "index.html"


def render_markdown(scenarios: Sequence[Scenario], comparison: ResultComparison | None = None) -> str:
    """Verdict and table, with every other figure and fact folded below.

    It can be the comment of a pull request as it is.
    """
    verdict = judge(scenarios)
    names = [scenario.name for scenario in scenarios]
    main = _markdown_table(names, [row for row in table(scenarios) if not row.advanced])
    rest = _markdown_table(names, [row for row in table(scenarios) if row.advanced])
    if comparison is not None:
        main, rest = _markdown_table(comparison.columns, comparison.rows), [*main, "", *rest]
    lines = [f"**{verdict.title}.** {verdict.sentence}", "", *main, ""]
    lines += [f"- {note.text}" for note in notes(scenarios)]
    lines += ["", "<details><summary>All figures, and what was measured</summary>", "", *rest, ""]
    lines += [f"- {name}: {_escape(value)}" for name, value in provenance(scenarios)]
    lines += [f"- {detail}" for note in notes(scenarios) for detail in note.details]
    lines += [f"- {rule}" for rule in _rules(scenarios)]
    return "\n".join([*lines, "", "</details>", ""])


def _markdown_table(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    return [
        "| | " + " | ".join(map(_escape, names)) + " |",
        "|---|" + "---:|" * len(names),
        *(f"| {row.label} | " + " | ".join(map(_escape, row.cells)) + " |" for row in rows),
    ]


def render_html(
    scenarios: Sequence[Scenario], comparison: ResultComparison | None = None, sources: Sequence[str] = ()
) -> str:
    """The page, with all scripts and styles inside.

    `sources` are the addresses of the raw results as seen from the page.
    """
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spikeless.bench.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = lambda text: text.replace(" ms", "\u00a0ms")
    facts = scenarios[0].runs[0].facts
    panels = [draw(scenario) for scenario in scenarios]
    verdict = judge(scenarios)
    rows = table(scenarios)
    remarks = notes(scenarios)
    page = environment.get_template("report.html.j2").render(
        title=_title(panels[0]) if comparison is None else f"{comparison.before} and {comparison.after}",
        verdict=verdict,
        facts=facts,
        engine=engine_text(facts.server),
        settings=facts.settings,
        panels=panels,
        scenarios=scenarios,
        ladder=draw_ladder(scenarios, verdict) if len(scenarios) > len(_SIDES) else None,
        sides=_SIDES[: len(scenarios)],
        groups=_grouped(row for row in rows if not row.advanced),
        advanced=_grouped(row for row in rows if row.advanced),
        cells={row.label: row.cells for row in rows},
        comparison=comparison,
        changes=_grouped(comparison.rows) if comparison else (),
        provenance=provenance(scenarios),
        serious=[note for note in remarks if note.serious],
        notes=[note for note in remarks if not note.serious],
        rules=_rules(scenarios),
        repeats=max(len(scenario.runs) for scenario in scenarios),
        estimate=estimate,
        sources=sources,
        markdown=base64.b64encode(render_markdown(scenarios, comparison).encode()).decode(),
        version=__version__,
    )
    # The library goes in last: templating five megabytes of script takes time.
    return page.replace("/* plotly */", get_plotlyjs(), 1)


#: The charts show at most two scenarios, side by side; of more, the reader chooses.
_SIDES = (0, 1)


def _grouped(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    return [(name, list(found)) for name, found in itertools.groupby(rows, lambda row: row.group)]


def provenance(scenarios: Sequence[Scenario]) -> list[tuple[str, str]]:
    """What was measured where: names and values, with each value where runs differ."""
    every = [run.facts for scenario in scenarios for run in scenario.runs]

    def values(get: Callable[[run_file.Facts], str]) -> str:
        return "; ".join(dict.fromkeys(get(facts) for facts in every))

    return [
        ("started", f"{every[0].started}, {len(every)} run{'s' if len(every) > 1 else ''}"),
        (
            "machine",
            values(lambda f: f"{f.machine.cpu}, {f.machine.cpus} CPUs, {f.machine.memory / 2**30:.0f} GiB"),
        ),
        ("system", values(lambda f: f"{f.machine.system}, {f.machine.kernel}, {f.machine.architecture}")),
        ("engine", values(lambda f: engine_text(f.server))),
        ("allocator", values(lambda f: f"{f.server.allocator} ({f.server.allocator_proof})")),
        ("load", values(lambda f: _load(f.settings))),
        ("seed of the arrivals", values(lambda f: f"{f.settings.seed}")),
        ("generator's floor", values(lambda f: floor_text(f.floor))),
        (
            "source",
            values(lambda f: f"Spikeless {__version__}, commit {f.commit}, Python {f.machine.python}"),
        ),
        *((f"server, {scenario.name}", _server(scenario.runs[0].facts.server)) for scenario in scenarios),
    ]


def engine_text(server: run_file.ServerFacts) -> str:
    """Which engine it is, its version, and what was noted of it."""
    note = f", {server.engine_note}" if server.engine_note else ""
    return f"{server.engine} {server.engine_version}{note}"


def _server(server: run_file.ServerFacts) -> str:
    return f"`{' '.join(server.command)}`, {server.allocator}" if server.command else "started elsewhere"


def _load(settings: run_file.Settings) -> str:
    moments = settings.publish_moments
    event = "" if settings.event == PUBLISH else f" ({settings.event})"
    published = (
        f"{len(moments)} versions published{event}, one every {settings.publish_every:g} s, "
        if len(moments) > 1 or event
        else ""
    )
    return (
        f"open loop, {settings.rate:g} requests/s for {settings.seconds:g} s, {published}"
        f"{settings.arrivals} arrivals, "
        f"{settings.processes} process{'es' if settings.processes > 1 else ''}, "
        f"SLO {settings.slo_ms:g} ms"
    )


def floor_text(floor: run_file.Floor | None) -> str:
    """The generator's floor in one line."""
    if floor is None:
        return "not measured"
    return (
        f"p50 {floor.p50:.2f}, p99 {floor.p99:.2f}, p99.9 {floor.p99_9:.2f}, max {floor.max:.2f} ms at "
        f"{floor.rate:g}/s ({floor.requests:,} requests to a server that answers at once)"
    )


def _rules(scenarios: Sequence[Scenario]) -> list[str]:
    rules = [RULES]
    if any(scenario.interval for scenario in scenarios):
        rules.append(INTERVAL_RULE)
    if any(scenario.fold.enough for scenario in scenarios):
        rules.append(FOLD_RULES)
    return rules


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _title(panel: Panel) -> str:
    name, summary = panel.run.facts.settings.model_name, panel.summary
    if summary.reload is None:
        return f"Publishing {name} under load" if summary.reloads else f"{name} under load"
    event = panel.run.facts.settings.event
    if event != PUBLISH:
        versions = "a version" if summary.published == 1 else f"{summary.published} versions"
        return f"{name} under load, {versions} {EVENTS[event].done}"
    if len(summary.reloads) > 1:
        return f"Swapping {name} {len(summary.reloads)} times under load"
    return f"Swapping {name} {summary.old_version} \N{RIGHTWARDS ARROW} {summary.new_version} under load"
