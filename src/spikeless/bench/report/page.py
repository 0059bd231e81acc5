"""The report: one HTML page that needs no network, and its numbers as Markdown.

In: the raw results of `spikeless bench run`. Out: ``index.html`` and ``summary.md`` in
a directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2

from spikeless import __version__
from spikeless.bench import run_file
from spikeless.bench.analysis import RULES
from spikeless.bench.folding import FOLD_RULES, Fold
from spikeless.bench.report.pictures import Panel, draw
from spikeless.bench.report.table import Scenario, estimate, group, milliseconds, table
from spikeless.disk.atomic import write_atomically

#: At most this many of the reloads that were left out are named.
_NAMED = 5


def write(results: Sequence[str | os.PathLike[str]], directory: str | os.PathLike[str]) -> Path:
    """Write the report on these raw results; returns the path of the page.

    Raises:
        InvalidArgument: there are no results, or a run has no steady window.
        NotFound, DataLoss: a result cannot be read.
    """
    scenarios = group([run_file.read_run(path) for path in results])
    out = Path(directory)
    html, markdown = render_html(scenarios), render_markdown(scenarios)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "summary.md", markdown.encode())
    write_atomically(out / "index.html", html.encode())
    return out / "index.html"


def render_markdown(scenarios: Sequence[Scenario]) -> str:
    """The table, with the facts of the measurement below it."""
    lines = [
        "| | " + " | ".join(_escape(scenario.name) for scenario in scenarios) + " |",
        "|---|" + "---:|" * len(scenarios),
    ]
    lines += [f"| {row.label} | " + " | ".join(map(_escape, row.cells)) + " |" for row in table(scenarios)]
    lines += ["", *(f"- {name}: {_escape(value)}" for name, value in provenance(scenarios)), ""]
    lines += [f"- {remark}" for remark in (*warnings(scenarios), *_rules(scenarios))]
    lines.append("")
    return "\n".join(lines)


def render_html(scenarios: Sequence[Scenario]) -> str:
    """The page, with all scripts and styles inside."""
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spikeless.bench.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    facts = scenarios[0].runs[0].facts
    panels = [draw(scenario) for scenario in scenarios]
    page = environment.get_template("report.html.j2").render(
        title=_title(panels[0]),
        facts=facts,
        settings=facts.settings,
        panels=panels,
        rows=table(scenarios),
        provenance=provenance(scenarios),
        warnings=warnings(scenarios),
        rules=_rules(scenarios),
        repeats=max(len(scenario.runs) for scenario in scenarios),
        milliseconds=milliseconds,
        estimate=estimate,
        version=__version__,
    )
    # The library goes in last: templating five megabytes of script takes time.
    return page.replace("/* plotly */", get_plotlyjs(), 1)


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
        ("engine", values(lambda f: f"{f.server.engine} {f.server.engine_version}")),
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


def _server(server: run_file.ServerFacts) -> str:
    return f"`{' '.join(server.command)}`, {server.allocator}" if server.command else "started elsewhere"


def _load(settings: run_file.Settings) -> str:
    swaps = settings.publish_moments
    published = (
        f"{len(swaps)} versions published, one every {settings.publish_every:g} s, " if len(swaps) > 1 else ""
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


def warnings(scenarios: Sequence[Scenario]) -> list[str]:
    """Caveats: what makes a number doubtful."""
    found = []
    for scenario in scenarios:
        for number, summary in enumerate(scenario.summaries, start=1):
            where = f"{scenario.name}, run {number}" if len(scenario.runs) > 1 else scenario.name
            found += [f"{where}: {note}" for note in summary.notes]
            for name, window in (("steady", summary.steady), ("reload", summary.reload)):
                if window is not None:
                    found += [f"{where}, {name} window contaminated: {why}." for why in window.contaminated]
        if scenario.fold.left_out and sum(len(summary.reloads) for summary in scenario.summaries) > 1:
            found.append(f"{scenario.name}: {_left_out(scenario.fold)}")
    machines = {run.facts.machine for scenario in scenarios for run in scenario.runs}
    if len(machines) > 1:
        found.append("These runs are from different machines: do not compare them.")
    return found


def _left_out(fold: Fold) -> str:
    named, more = fold.left_out[:_NAMED], len(fold.left_out) - _NAMED
    text = "; ".join(named) + (f"; and {more} more" if more > 0 else "")
    total = len(fold.pairs) + len(fold.left_out)
    rest = "" if fold.enough else " (too few are left to have any)"
    return f"{len(fold.left_out)} of {total} reloads are left out of the folded figures{rest}: {text}."


def _rules(scenarios: Sequence[Scenario]) -> list[str]:
    return [RULES, FOLD_RULES] if any(scenario.fold.enough for scenario in scenarios) else [RULES]


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _title(panel: Panel) -> str:
    name, summary = panel.run.facts.settings.model_name, panel.summary
    if summary.reload is None:
        return f"{name} under load"
    if summary.new_version is None:
        return f"Publishing {name} under load"
    if len(summary.reloads) > 1:
        return f"Swapping {name} {len(summary.reloads)} times under load"
    return f"Swapping {name} {summary.old_version} \N{RIGHTWARDS ARROW} {summary.new_version} under load"
