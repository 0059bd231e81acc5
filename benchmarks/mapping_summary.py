"""The table of what ``benchmarks/mapping.py`` measured, and what mapping is held to.

In: a directory of its results. Out: Markdown. Each cell is the median of the repeats,
with their extremes in brackets.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from spikeless import bench
from spikeless.bench import report
from spikeless.bench.analysis import analyse
from spikeless.bench.run_file import Run
from spikeless.bench.rungs import KINDS

#: What the others are compared with, and the model without parameters.
STOCK, BARE = "stock", "bare"
#: Kinds that change what a model serves from.
_CHANGED = tuple(kind for kind in KINDS if kind != STOCK)
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

#: The note of a squeezed run that says how many there were.
DISK_FAULTS = "page faults waited for the disk"

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
            content = run = bench.read_run(path)
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
    present = _present(kinds, *KINDS, BARE)
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
            ("publish to AVAILABLE, s (polled every second)", "{:.2f}", lambda one: one["available_seconds"]),
            ("of it loading, s", "{:.3f}", lambda one: one["load_seconds"]),
            ("processor time of the swap, with the status requests, s", "{:.2f}", seconds),
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
        "| relative to stock in the same turn | "
        + " | ".join(_spread(cell, "{:.3f}") for cell in ratios)
        + " |",
    ]


def _ratios(repeats: Sequence[Any], name: str, kind: str) -> Values:
    """The kind's value relative to stock's, turn for turn."""
    return [
        value / stock
        for one in repeats
        for value, stock in zip(one[name][kind], one[name][STOCK], strict=True)
    ]


def _run_table(kinds: Mapping[str, list[Run]], label: str) -> list[str]:
    runs = [run for kind in KINDS for run in kinds.get(kind, [])]
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
            ("of them at once, most", "{:,.0f}", _at_once),
            ("private memory at the start, MiB", "{:,.0f}", private(0.0)),
            ("private memory half way, MiB", "{:,.0f}", private(0.5)),
            ("private memory at the end, MiB", "{:,.0f}", private(1.0)),
            ("private memory, peak, MiB", "{:,.0f}", lambda run: run.samples["rss_anon"].max() / MIB),
        ],
    )


def _at_once(run: Run) -> float:
    """The most requests that were under way at any moment."""
    starts = run.requests["intended"] + run.requests["lag"]
    ends = run.requests["intended"] + run.requests["latency"]
    moments = np.concatenate([starts, ends])
    changes = np.repeat([1, -1], [len(starts), len(ends)])
    return float(np.cumsum(changes[np.argsort(moments, kind="stable")]).max())


_TABLES: dict[str, Callable[[Mapping[str, list[Any]], str], list[str]]] = {
    "load": _load_table,
    "swap": _run_table,
    "steady": _steady_table,
    "throughput": _throughput_table,
    "soak": _soak_table,
    "squeeze": _run_table,
}


# Bars.


@dataclass(frozen=True)
class _Bar:
    """One thing that mapping is held to, and whether it holds."""

    what: str
    bar: str
    measured: str
    verdict: str


_COMPARISON, _NOT_SHOWN = "for comparison", "**not shown**"


def _verdict(holds: bool, kind: str) -> str:
    """Nothing is asked of the stock model."""
    return _COMPARISON if kind == STOCK else "holds" if holds else "**missed**"


def _bars(measured: Measured) -> list[str]:
    bars: list[_Bar] = []
    for (part, label), kinds in sorted(measured.items(), key=_order):
        if part in _BARS:
            bare = measured.get(("load", label), {}).get(BARE, [])
            bars += [replace(bar, what=f"{label}: {bar.what}") for bar in _BARS[part](kinds, label, bare)]
    bars += _size_bars(measured)
    return [
        "| | bar | measured | |",
        "|---|---|---|---|",
        *(f"| {bar.what} | {bar.bar} | {bar.measured} | {bar.verdict} |" for bar in bars),
    ]


def _present(kinds: Mapping[str, Any], *wanted: str) -> list[str]:
    return [kind for kind in wanted if kind in kinds]


def _load_bars(kinds: Mapping[str, list[Any]], label: str, bare: list[Any]) -> Iterator[_Bar]:
    for kind in _present(kinds, *KINDS):
        peak = statistics.median(one["peak_rss_anon"] for one in kinds[kind])
        yield from _private_bars(f"through a load, {kind}", kind, peak, label, bare)
    if STOCK in kinds:
        stock = statistics.median(map(_first, kinds[STOCK]))
        for kind in _present(kinds, *_CHANGED):
            times = statistics.median(map(_first, kinds[kind])) / stock
            yield _Bar(
                f"first request after a load without warmup, {kind}",
                f"{FIRST_FACTOR} x stock",
                f"{times:.2f} x",
                _verdict(times <= FIRST_FACTOR, kind),
            )


def _private_bars(what: str, kind: str, peak: float, label: str, bare: list[Any]) -> Iterator[_Bar]:
    """The whole process, and what it has beyond a server without parameters."""
    most = f"{PRIVATE_SHARE:.0%} of the parameters"
    shares = {f"private memory {what}, the whole process": peak / _bytes(label)}
    if bare:
        own = statistics.median(one["peak_rss_anon"] for one in bare)
        words = f"the same, over a server of a model without parameters ({own / MIB:.0f} MiB)"
        shares[words] = (peak - own) / _bytes(label)
    for words, share in shares.items():
        yield _Bar(words, most, f"{share:.1%}", _verdict(share <= PRIVATE_SHARE, kind))


def _swap_bars(kinds: Mapping[str, list[Run]], label: str, bare: list[Any]) -> Iterator[_Bar]:
    for kind in _present(kinds, *KINDS):
        runs = kinds[kind]
        peak = statistics.median(float(run.samples["rss_anon"].max()) for run in runs)
        yield from _private_bars(f"through reloads with warmup under load, {kind}", kind, peak, label, bare)
    scenarios = report.group([run for runs in kinds.values() for run in runs])
    for scenario in scenarios:
        kind = scenario.name.rpartition("-")[2]
        what, most = f"p99.9 during reloads, {kind}", f"{RELOAD_FACTOR} x that of windows without"
        if not scenario.fold.enough:
            yield _Bar(what, most, "too few clean reloads to say", _NOT_SHOWN)
            continue
        reload, control = scenario.fold.reload["p99.9"], scenario.fold.control["p99.9"]
        times = reload.value / control.value
        words = f"{times:.2f} x ({reload.value:.1f} against {control.value:.1f} ms, "
        excess = scenario.fold.excess["p99.9"]
        words += f"{len(scenario.fold.pairs)} reloads; excess {excess.low:.1f} to {excess.high:.1f} ms)"
        yield _Bar(what, most, words, _verdict(times <= RELOAD_FACTOR, kind))


def _steady_bars(kinds: Mapping[str, list[Any]], label: str, bare: list[Any]) -> Iterator[_Bar]:
    bar = f"{P50_FACTOR} x stock"
    return _turn_bars(kinds, "p50_ms", "steady p50", bar, lambda times: times <= P50_FACTOR)


def _throughput_bars(kinds: Mapping[str, list[Any]], label: str, bare: list[Any]) -> Iterator[_Bar]:
    least = 1 - THROUGHPUT_SHARE
    bar = f"{least} x stock or more"
    return _turn_bars(kinds, "requests_per_second", "throughput", bar, lambda times: times >= least)


def _turn_bars(
    kinds: Mapping[str, list[Any]], name: str, what: str, bar: str, holds: Callable[[float], bool]
) -> Iterator[_Bar]:
    """The median of the ratios to stock in the same turn."""
    for kind in _present(kinds["all"][0][name], *_CHANGED):
        times = statistics.median(_ratios(kinds["all"], name, kind))
        yield _Bar(f"{what}, {kind}", bar, f"{times:.3f} x", _verdict(holds(times), kind))


def _soak_bars(kinds: Mapping[str, list[Run]], label: str, bare: list[Any]) -> Iterator[_Bar]:
    for kind in _present(kinds, *KINDS):
        runs = kinds[kind]
        growth = statistics.median(_growth(run) for run in runs) / _bytes(label)
        seconds = min(run.facts.settings.seconds for run in runs)
        yield _Bar(
            f"growth of private memory in {seconds:.0f} s of sparse look-ups, {kind}",
            f"{PRIVATE_SHARE:.0%} of the parameters",
            f"{growth:.1%}",
            _verdict(growth <= PRIVATE_SHARE, kind),
        )


def _growth(run: Run) -> float:
    """Bytes of private memory at the peak beyond those at the start."""
    private = run.samples["rss_anon"]
    return float(private.max() - private[0])


def _squeeze_bars(kinds: Mapping[str, list[Run]], label: str, bare: list[Any]) -> Iterator[_Bar]:
    for kind in _present(kinds, *KINDS):
        runs = kinds[kind]
        values = [analyse(run).steady.p99_9 for run in runs]
        notes = dict.fromkeys(note for run in runs for note in run.facts.notes)
        limits = "; ".join(note for note in notes if DISK_FAULTS not in note)
        what = f"steady p99.9 with random rows and little memory, {kind} ({limits})"
        yield _Bar(what, "none", f"{_spread(values, '{:.1f}')} ms", _COMPARISON)


def _size_bars(measured: Measured) -> Iterator[_Bar]:
    """How the time to load grows from the smallest model to the largest."""
    labels = sorted({label for part, label in measured if part == "load"}, key=_bytes)
    if len(labels) < 2:
        return
    small, large = (measured["load", label] for label in (labels[0], labels[-1]))
    for kind in KINDS:
        for name, what in (("available_seconds", "publish to AVAILABLE"), ("load_seconds", "of it loading")):
            if kind in small and kind in large:
                few, many = (statistics.median(one[name] for one in kinds[kind]) for kinds in (small, large))
                yield _Bar(
                    f"{what}, {labels[-1]} against {labels[0]}, {kind}",
                    f"{SIZE_FACTOR} x",
                    f"{many / few:.2f} x ({many:.3f} against {few:.3f} s)",
                    _verdict(many / few <= SIZE_FACTOR, kind),
                )


_BARS: dict[str, Callable[[Mapping[str, list[Any]], str, list[Any]], Iterator[_Bar]]] = {
    "load": _load_bars,
    "swap": _swap_bars,
    "steady": _steady_bars,
    "throughput": _throughput_bars,
    "soak": _soak_bars,
    "squeeze": _squeeze_bars,
}
