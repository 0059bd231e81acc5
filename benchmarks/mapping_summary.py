"""The table of what ``benchmarks/mapping.py`` measured, and what mapping is held to.

In: a directory of its results. Out: Markdown. Each cell is the median of the repeats, with their extremes in
brackets.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from spikeless import bench, report
from spikeless.bench.record import Run

STOCK, MAPPED, TUNED, BARE = "stock", "mapped", "tuned", "bare"
MIB = 1 << 20
#: What mapping is held to.
PRIVATE_SHARE, SIZE_FACTOR, P50_FACTOR, THROUGHPUT_SHARE, FIRST_FACTOR, RELOAD_FACTOR = (
    0.10,
    1.5,
    1.03,
    0.03,
    1.2,
    1.5,
)

Values = list[float]
#: part, size label, kind -> what each repeat measured.
Measured = Mapping[tuple[str, str], Mapping[str, list[Any]]]


def render(directory: Path) -> str:
    """Everything in ``directory``, by size and part, and at the end the bars."""
    measured, facts = _read(directory)
    lines = [f"# {directory.name}", "", *facts, ""]
    for (part, label), kinds in sorted(measured.items(), key=_order):
        lines += [f"## {label}, {part}", "", *_TABLES[part](kinds, label), ""]
    return "\n".join([*lines, "## What mapping is held to", "", *_bars(measured)]) + "\n"


def _read(directory: Path) -> tuple[Measured, list[str]]:
    measured: dict[tuple[str, str], dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    machines, commits, engines, days = set(), set(), set(), set()
    for path in sorted([*directory.glob("mapping-*.json"), *directory.glob("mapping-*.npz")]):
        content: Any
        if path.suffix == ".npz":
            content = run = bench.load(path)
            scenario, machine, server = run.facts.scenario, run.facts.machine, run.facts.server
            machines.add(f"{machine.cpu}, {machine.cpus} CPUs, {machine.kernel}, {machine.system}")
            engines.add(f"{server.engine} {server.engine_version}, {server.allocator}")
            commits.add(run.facts.commit)
            days.add(run.facts.started[:10])
        else:
            whole = json.loads(path.read_text())
            scenario, content, machine = whole["scenario"], whole["measured"], whole["machine"]
            machines.add("{cpu}, {cpus} CPUs, {kernel}, {system}".format(**machine))
            engines.add("{engine} {engine_version}, {allocator}".format(**whole["server"]))
            commits.add(whole["commit"])
            days.add(whole["started"][:10])
        _, part, label, kind = scenario.split("-")
        measured[part, label][kind].append(content)
    facts = {"date": days, "machine": machines, "engine": engines, "commit": commits}
    return measured, [f"- {name}: {'; '.join(sorted(values))}" for name, values in facts.items()]


def _bytes(label: str) -> int:
    return int(label.removesuffix("MiB")) * MIB


def _order(item: tuple[tuple[str, str], Any]) -> tuple[int, int]:
    (part, label), _ = item
    return _bytes(label), list(_TABLES).index(part)


# Tables.


def _table(
    kinds: Mapping[str, list[Any]], rows: Sequence[tuple[str, str, Callable[[Any], float]]]
) -> list[str]:
    present = [kind for kind in (STOCK, MAPPED, TUNED, BARE) if kind in kinds]
    lines = ["| | " + " | ".join(present) + " |", "|---|" + "---:|" * len(present)]
    for name, form, get in rows:
        cells = [_spread([get(one) for one in kinds[kind]], form) for kind in present]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _spread(values: Values, form: str) -> str:
    middle, low, high = (
        form.format(value) for value in (statistics.median(values), min(values), max(values))
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def _load_table(kinds: Mapping[str, list[Any]], label: str) -> list[str]:
    def change(name: str, *more: str) -> Callable[[Any], float]:
        return lambda one: sum(one["after"][key] - one["before"][key] for key in (name, *more))

    def seconds(one: Any) -> float:
        return change("user_ticks", "system_ticks")(one) / float(one["after"]["ticks_per_second"])

    return _table(
        kinds,
        [
            ("publish to AVAILABLE, s (a look a second)", "{:.2f}", lambda one: one["available_seconds"]),
            ("of it loading, s", "{:.3f}", lambda one: one["load_seconds"]),
            ("processor time of the swap, s", "{:.2f}", seconds),
            ("page faults of the swap", "{:,.0f}", change("minor_faults", "major_faults")),
            ("of them from disk", "{:,.0f}", change("major_faults")),
            ("private memory before, MiB", "{:,.0f}", lambda one: one["before"]["rss_anon"] / MIB),
            ("private memory, peak, MiB", "{:,.0f}", lambda one: one["peak_rss_anon"] / MIB),
            ("first request after the load, ms", "{:.2f}", _first),
            ("requests after it, p50, ms", "{:.2f}", lambda one: _middle(one["request_seconds"][5:])),
        ],
    )  # fmt: skip


def _first(one: Any) -> float:
    return float(one["request_seconds"][0]) * 1e3


def _middle(seconds: Values) -> float:
    return statistics.median(seconds) * 1e3


def _steady_table(kinds: Mapping[str, list[Any]], label: str) -> list[str]:
    return _turns_table(kinds, "p50_ms", "p50 of one client, ms", "{:.3f}")


def _throughput_table(kinds: Mapping[str, list[Any]], label: str) -> list[str]:
    return _turns_table(kinds, "requests_per_second", "requests/s over all connections", "{:,.0f}")


def _turns_table(kinds: Mapping[str, list[Any]], name: str, what: str, form: str) -> list[str]:
    present = list(kinds["all"][0][name])
    values = [[*chain(*(one[name][kind] for one in kinds["all"]))] for kind in present]
    ratios = [_ratios(kinds["all"], name, kind) for kind in present]
    return [
        "| | " + " | ".join(present) + " |",
        "|---|" + "---:|" * len(present),
        f"| {what}, of all turns | " + " | ".join(_spread(cell, form) for cell in values) + " |",
        "| by stock's in the same turn | " + " | ".join(_spread(cell, "{:.3f}") for cell in ratios) + " |",
    ]


def _ratios(repeats: Sequence[Any], name: str, kind: str) -> Values:
    """The kind's value by stock's, turn for turn."""
    return [
        value / stock
        for one in repeats
        for value, stock in zip(one[name][kind], one[name][STOCK], strict=True)
    ]


def _run_table(kinds: Mapping[str, list[Run]], label: str) -> list[str]:
    runs = [run for kind in (STOCK, MAPPED, TUNED) for run in kinds.get(kind, [])]
    named = [
        replace(run, facts=replace(run.facts, scenario=run.facts.scenario.rpartition("-")[2])) for run in runs
    ]
    return report.render_markdown(report.group(named)).splitlines()


def _soak_table(kinds: Mapping[str, list[Run]], label: str) -> list[str]:
    def private(moment: float) -> Callable[[Run], float]:
        return lambda run: run.samples["rss_anon"][int(moment * (len(run.samples["rss_anon"]) - 1))] / MIB

    return _table(
        kinds,
        [
            ("requests, all of them sparse look-ups", "{:,.0f}", lambda run: len(run.requests["latency"])),
            ("private memory at the start, MiB", "{:,.0f}", private(0.0)),
            ("private memory half way, MiB", "{:,.0f}", private(0.5)),
            ("private memory at the end, MiB", "{:,.0f}", private(1.0)),
            ("private memory, peak, MiB", "{:,.0f}", lambda run: run.samples["rss_anon"].max() / MIB),
        ],
    )


_TABLES: dict[str, Callable[[Mapping[str, list[Any]], str], list[str]]] = {
    "load": _load_table,
    "swap": _run_table,
    "steady": _steady_table,
    "throughput": _throughput_table,
    "soak": _soak_table,
    "squeeze": _run_table,
}


# Bars.


def _bars(measured: Measured) -> list[str]:
    lines = ["| | bar | measured | |", "|---|---|---|---|"]

    def bar(what: str, most: str, value: str, holds: bool | None) -> None:
        verdict = {True: "holds", False: "**missed**", None: "for comparison"}[holds]
        lines.append(f"| {what} | {most} | {value} | {verdict} |")

    loads = {label: kinds for (part, label), kinds in sorted(measured.items(), key=_order) if part == "load"}
    for label, kinds in loads.items():
        if not {STOCK, MAPPED, BARE} <= set(kinds):
            continue
        size = _bytes(label)
        peak = {kind: statistics.median(one["peak_rss_anon"] for one in kinds[kind]) for kind in kinds}
        most = f"{PRIVATE_SHARE:.0%} of the parameters"
        whole, own = peak[MAPPED] / size, (peak[MAPPED] - peak[BARE]) / size
        bar(
            f"{label}: private memory through a swap, the whole process",
            most,
            f"{whole:.1%}",
            whole <= PRIVATE_SHARE,
        )
        bar(
            f"{label}: the same, over a server of a model without parameters",
            most,
            f"{own:.1%}",
            own <= PRIVATE_SHARE,
        )
        firsts = {kind: statistics.median(map(_first, kinds[kind])) for kind in (STOCK, MAPPED)}
        times = firsts[MAPPED] / firsts[STOCK]
        bar(
            f"{label}: first request after the load",
            f"{FIRST_FACTOR} x stock",
            f"{times:.2f} x",
            times <= FIRST_FACTOR,
        )
    if len(loads) > 1:
        small, large = next(iter(loads)), list(loads)[-1]
        available = {
            label: statistics.median(one["available_seconds"] for one in loads[label][MAPPED])
            for label in (small, large)
        }
        times = available[large] / available[small]
        bar(
            f"publish to AVAILABLE, {large} against {small}",
            f"{SIZE_FACTOR} x",
            f"{times:.2f} x",
            times <= SIZE_FACTOR,
        )
    for (part, label), kinds in sorted(measured.items(), key=_order):
        if part in ("steady", "throughput"):
            for kind in (MAPPED, TUNED):
                if part == "steady":
                    times = statistics.median(_ratios(kinds["all"], "p50_ms", kind))
                    most, holds = f"{P50_FACTOR} x stock", times <= P50_FACTOR
                else:
                    times = statistics.median(_ratios(kinds["all"], "requests_per_second", kind))
                    most, holds = f"{1 - THROUGHPUT_SHARE} x stock or more", times >= 1 - THROUGHPUT_SHARE
                what = "steady p50" if part == "steady" else part
                bar(f"{label}: {what}, {kind}", most, f"{times:.3f} x", holds)
        if part == "swap":
            scenarios = {
                scenario.name.rpartition("-")[2]: scenario
                for scenario in report.group([run for runs in kinds.values() for run in runs])
            }
            for kind, scenario in scenarios.items():
                fold = scenario.fold
                if fold.enough:
                    reload, control = fold.reload["p99.9"], fold.control["p99.9"]
                    times = reload.value / control.value
                    words = f"{times:.1f} x ({reload.value:.1f} against {control.value:.1f} ms, "
                    words += f"{len(fold.pairs)} reloads)"
                    bar(
                        f"{label}: p99.9 during reloads, {kind}",
                        f"{RELOAD_FACTOR} x that of windows without",
                        words,
                        None if kind == STOCK else times <= RELOAD_FACTOR,
                    )
    return lines
