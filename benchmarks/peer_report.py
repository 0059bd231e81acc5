"""The table and the chart of a comparison of peers, from its raw results.

In: a directory that `bench_peers` wrote. Out: ``summary.md`` and ``peers.svg`` in it.
Figures are medians of the rounds, of failed requests the most.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peer_servers import PEERS

from spikeless import bench

#: Row of the table -> how many digits it has.
FIGURES = {
    "steady p50": 1,
    "steady p99": 1,
    "steady p99.9": 1,
    "reload p99.9": 1,
    "slowest during reloads": 0,
    "failed requests": 0,
    "rate at the SLO": 0,
    "new file to served": 1,
    "private memory, steady": 0,
    "private memory, peak": 0,
    "processor time of a swap": 1,
}
UNITS = {
    "rate at the SLO": "/s",
    "new file to served": " s",
    "private memory, steady": " MiB",
    "private memory, peak": " MiB",
    "processor time of a swap": " s",
    "failed requests": "",
}


@dataclass(frozen=True)
class Result:
    """One peer in all rounds."""

    name: str
    title: str
    way: str
    version: str
    runs: Sequence[bench.Run]
    #: Of each round, by `FIGURES`; None: unknown.
    rounds: Sequence[dict[str, float | None]]

    def known(self, key: str) -> list[float]:
        """A figure in the rounds in which it is known, ascending."""
        return sorted(value for one in self.rounds if (value := one[key]) is not None)

    def middle(self, key: str) -> float | None:
        """Its median; of failed requests the most."""
        known = self.known(key)
        if not known:
            return None
        return known[-1] if key == "failed requests" else statistics.median(known)


def read(directory: Path) -> list[Result]:
    """The peers of a result, in the order of the table."""
    found = []
    for name, peer in PEERS.items():
        files = sorted(directory.glob(f"{name}-*.npz"))
        runs = [bench.read_run(file) for file in files]
        facts = [json.loads(file.with_suffix(".json").read_text()) for file in files]
        if not runs:
            continue
        rounds = [_figures(run, one) for run, one in zip(runs, facts, strict=True)]
        found.append(Result(name, peer.title, facts[0]["way"], facts[0]["version"], runs, rounds))
    return found


def _figures(run: bench.Run, facts: dict[str, Any]) -> dict[str, float | None]:
    summary = bench.analyse(run)
    t, memory, processor = np.array(facts["samples"]).T
    steady, reloads = summary.steady, summary.reloads
    quiet = (t >= steady.begin) & (t < steady.end)

    def used(begin: float, end: float) -> float:
        return float(np.interp(end, t, processor) - np.interp(begin, t, processor))

    busy = used(steady.begin, steady.end) / (steady.end - steady.begin)
    swaps = [
        used(swap.window.begin, swap.window.end) - busy * (swap.window.end - swap.window.begin)
        for swap in reloads
        if swap.new_version is not None
    ]
    during = summary.reload
    return {
        "steady p50": steady.p50,
        "steady p99": steady.p99,
        "steady p99.9": steady.p99_9,
        "reload p99.9": during.p99_9 if during else None,
        "slowest during reloads": during.max if during else None,
        "failed requests": float(summary.failed),
        "rate at the SLO": facts["search"]["rate"] if "search" in facts else None,
        "new file to served": summary.swap_seconds,
        "private memory, steady": float(np.median(memory[quiet])) / 2**20 if quiet.any() else None,
        "private memory, peak": float(memory.max()) / 2**20 if len(memory) else None,
        "processor time of a swap": statistics.median(swaps) if swaps else None,
    }


def table(results: Sequence[Result], cell: Callable[[Result, str], str]) -> str:
    """One row for each peer, in Markdown."""
    lines = ["| | " + " | ".join(FIGURES) + " |", "|---" + "|---:" * len(FIGURES) + "|"]
    for result in results:
        lines.append(f"| {result.title} | " + " | ".join(cell(result, key) for key in FIGURES) + " |")
    return "\n".join(lines) + "\n"


def _median(result: Result, key: str) -> str:
    value = result.middle(key)
    return "-" if value is None else _number(key, value) + UNITS.get(key, " ms")


def _range(result: Result, key: str) -> str:
    lowest, *others = [_number(key, value) for value in result.known(key)] or ["-"]
    return f"{lowest} to {others[-1]}" if others and others[-1] != lowest else lowest


def _number(key: str, value: float) -> str:
    return f"{value:,.{FIGURES[key]}f}"


def write(directory: Path) -> str:
    """Write the summary and the chart; returns the summary."""
    results = read(directory)
    about = json.loads((directory / "peers.json").read_text())
    plan, machine = about["plan"], results[0].runs[0].facts.machine
    several = about["rounds"] > 1
    lines = [
        "# New versions on other servers",
        "",
        f"{machine.describe()}, commit {results[0].runs[0].facts.commit}. A model of "
        f"{plan['size'] / 2**20:g} MiB; {plan['rate']:g} requests/s over HTTP for {plan['steady']:g} s "
        f"without and then with {plan['swaps']} new versions, one every {plan['swaps_apart']:g} s; "
        f"{about['rounds']} round(s): medians, and of failed requests the most. The rate at the SLO is "
        f"the greatest at which p99 was at most {plan['slo_ms']:g} ms.",
        "",
        table(results, _median),
        *(["The lowest and the highest of the rounds:", "", table(results, _range)] if several else []),
        "![p99.9 of each peer](peers.svg)",
        "",
        "| | version | how a version is changed |",
        "|---|---|---|",
        *(f"| {result.title} | {result.version} | {result.way} |" for result in results),
        "",
    ]
    if about["not_measured"]:
        lines += ["Not measured, or not in each round:", ""]
        lines += [
            f"- {PEERS[name].title}: {why.removesuffix('; its log ends:')}"
            for name, why in about["not_measured"].items()
        ]
        lines.append("")
    notes = [f"- {result.title}: {note}" for result in results for note in _notes(result)]
    if notes:
        lines += ["Notes:", "", *notes, ""]
    summary = "\n".join(lines)
    (directory / "summary.md").write_text(summary)
    chart(results, directory / "peers.svg")
    return summary


def _notes(result: Result) -> list[str]:
    found = []
    for number, run in enumerate(result.runs, start=1):
        summary = bench.analyse(run)
        told = [*summary.notes, *(f"steady: {why}." for why in summary.steady.contaminated)]
        found += [f"round {number}: {note}" for note in told]
    return found


def chart(results: Sequence[Result], file: Path) -> None:
    """p99.9 without and during reloads, as bars on a logarithmic scale."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "spikeless"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(results) + 1.2), layout="constrained")
    places = np.arange(len(results))
    for offset, key, label, color in (
        (-0.2, "steady p99.9", "without a new version", "#9aa7b2"),
        (0.2, "reload p99.9", "while versions change", "#c0392b"),
    ):
        values = [result.middle(key) or np.nan for result in results]
        bars = axes.barh(places + offset, values, 0.38, label=label, color=color)
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.set_yticks(places, [result.title for result in results])
    axes.invert_yaxis()
    axes.set_xlabel("p99.9 in ms")
    axes.legend(loc="lower right", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
