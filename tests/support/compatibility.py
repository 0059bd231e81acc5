"""The tables of the documentation that are made from code, tests and results.

In: a Markdown file with markers, ``<!-- NAME -->`` or ``<!-- NAME ARGUMENT -->`` to
``<!-- /NAME -->``. Out: the same with the tables between them, as `TABLES` makes them.
As a script it updates all files: ``python tests/support/compatibility.py``.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_scripts import imported
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from spikeless.engine import flags
from spikeless.engine.metrics import Metrics
from spikeless.sidecars.exporter import Exporter, ExporterSettings
from spikeless.store.follow import FollowSettings, StoreFollower

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "benchmarks" / "results"
DIFFERENCES = Path(__file__).with_name("differences.toml")
#: The documents that may have tables, beside those in docs/.
FRONT_PAGES = ("README.md", "README.zh-CN.md")
BLOCK = re.compile(r"(<!-- ([a-z][a-z -]*?)(?: (\d\S*))? -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def documents() -> list[Path]:
    """Every file that may have tables."""
    return [*(_ROOT / name for name in FRONT_PAGES), *sorted((_ROOT / "docs").rglob("*.md"))]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """A Markdown table; ``numbers`` aligns all columns but the first to the right."""
    line = ["---:" if numbers and column else "---" for column in range(len(header))]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(line) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines) + "\n"


# Differences and flags ----------------------------------------------------------------


def differences() -> list[dict[str, str]]:
    """The entries: behaviour, serving, embedded, reason and test."""
    entries: list[dict[str, str]] = tomllib.loads(DIFFERENCES.read_text())["difference"]
    return entries


def _differences_table() -> str:
    return _table(
        ["What", "TensorFlow Serving 2.20.0", "Embedded engine", "Why"],
        ([entry[key] for key in ("behaviour", "serving", "embedded", "reason")] for entry in differences()),
    )


# Metrics ------------------------------------------------------------------------------


def _metric_row(name: str, kind: str, labels: Iterable[str], text: str) -> list[str]:
    return [f"`{name}`", kind, ", ".join(f"`{label}`" for label in labels), text]


def _registered(registry: CollectorRegistry) -> str:
    rows = []
    # The registry only lists the labels of metrics that have values.
    for collector in registry._collector_to_names:
        found: Any = collector
        if hasattr(found, "_labelnames"):
            suffix = "_total" if found._type == "counter" else ""
            rows.append(
                _metric_row(found._name + suffix, found._type, found._labelnames, found._documentation)
            )
        elif hasattr(found, "_labels"):
            kind = "histogram" if found.kind == "histogram" else "counter"
            rows.append(_metric_row(found._name, kind, found._labels, found._text))
        else:
            rows += map(_family_row, found.collect())
    return _table(["Metric", "Type", "Labels", "What it is"], rows)


def _family_row(metric: Metric) -> list[str]:
    suffix = "_total" if metric.type == "counter" else ""
    return _metric_row(
        metric.name + suffix, metric.type, getattr(metric, "_labelnames", ()), metric.documentation
    )


def _exporter_metrics() -> str:
    exporter = Exporter(ExporterSettings("127.0.0.1:1", _ROOT / "models", pid=os.getpid()))
    return _table(["Metric", "Type", "Labels", "What it is"], map(_family_row, exporter.collect()))


# Variables of the stack ---------------------------------------------------------------


def stack_variables() -> dict[str, str]:
    """Variable -> its default in ``compose.yaml``."""
    text = (_ROOT / "compose.yaml").read_text()
    found = dict(re.findall(r"\$\{([A-Z_]+):-(\$\{\w+:-\}|[^}]*)\}", text))
    # Passed on as they are: build arguments, and variables without a value.
    for names in re.findall(r"args: \[([A-Z_, ]+)\]", text):
        found |= {name: found.get(name, "") for name in names.split(", ")}
    return found | {name: found.get(name, "") for name in re.findall(r"^ +([A-Z_]+):$", text, re.MULTILINE)}


def _stack_table() -> str:
    text = (_ROOT / "compose.yaml").read_text()
    said: dict[str, str] = {}
    for names, what in re.findall(r"^#   ([A-Z_]+(?:, [A-Z_]+)*) {2,}(.+)$", text, re.MULTILINE):
        said |= dict.fromkeys(names.split(", "), what)
    unexplained = stack_variables().keys() - said.keys()
    assert not unexplained, f"the head of compose.yaml does not explain {unexplained}"
    rows = []
    for name, default in sorted(stack_variables().items()):
        rows.append([f"`{name}`", f"`{default}`" if default else "", said[name]])
    return _table(["variable", "default", "what it does"], rows)


# Results ------------------------------------------------------------------------------

#: What pages show of a summary.
_SHOWN = (
    "steady p50",
    "steady p99.9",
    "reload p99.9",
    "requests over the SLO",
    "first request on the new version",
    "private memory, peak",
    "failed requests",
)


def _whole_tables(summary: str) -> Iterator[tuple[str, list[str], dict[str, list[str]]]]:
    """Each table of a summary: its heading, columns, and rows."""
    heading = ""
    for block in re.split(r"\n\n+", summary):
        if block.startswith("## "):
            heading = block[3:].strip()
        if block.startswith("| |"):
            lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
            yield heading, lines[0][1:], {line[0]: line[1:] for line in lines[2:]}


def _median(cell: str) -> str:
    """It stands before the range."""
    return re.sub(r" [(\[].*", "", cell)


def _tables(summary: str) -> Iterator[tuple[str, list[str], dict[str, list[str]]]]:
    """The same with the medians alone."""
    for heading, columns, rows in _whole_tables(summary):
        yield heading, columns, {name: [*map(_median, cells)] for name, cells in rows.items()}


def _results() -> str:
    index = (_RESULTS / "README.md").read_text()
    found = re.search(r"^\| what \|.*?(?=\n\n)", index, re.MULTILINE | re.DOTALL)
    assert found is not None
    parts = [re.sub(r"\]\((?!https?:)", "](../benchmarks/results/", found[0]) + "\n"]
    for summary in sorted(_RESULTS.glob("*/summary.md"), reverse=True):
        for heading, columns, rows in _tables(summary.read_text()):
            # One way to serve is no comparison; some tables are of steady load.
            if len(columns) < 2 or {*rows.get("reload p99.9", "-")} == {"-"}:
                continue
            title = summary.parent.name + (f": {heading}" if heading else "")
            table = _table(["", *columns], ([name, *rows[name]] for name in _SHOWN if name in rows), True)
            link = f"[All figures](../{summary.relative_to(_ROOT)}), with the range of the repeats."
            parts.append(f"### {title}\n\n{table}\n{link}\n")
    return "\n".join(parts)


_ENGLISH = ("", "p99.9, no reload", "p99.9 during reloads", "requests over 10 ms", "private memory, peak")
_CHINESE = ("", "无加载时的 p99.9", "加载期间的 p99.9", "超过 10 ms 的请求", "私有内存峰值")
_CHINESE_RUNGS = {
    "stock": "原样",
    "+ warmup": "+ 预热",
    "+ load/unload threads": "+ 加载/卸载线程",
    "+ mapped": "+ 参数映射",
    "+ optimised": "+ 图优化",
    "+ loads yield": "+ 加载让出处理器",
    "+ isolated": "+ 加载隔离",
}


def _ladder(result: str, header: Sequence[str], names: dict[str, str]) -> str:
    tables = _tables((_RESULTS / result / "summary.md").read_text())
    columns, rows = next((columns, rows) for _, columns, rows in tables if "reload p99.9" in rows)
    shown = ("steady p99.9", "reload p99.9", "requests over the SLO", "private memory, peak")
    return _table(
        header,
        (
            [names.get(rung, rung), *(rows[name][number] for name in shown)]
            for number, rung in enumerate(columns)
        ),
        True,
    )


#: The header, the verdicts, and what a share of the server's capacity is called.
_ENGLISH_GOAL = (
    ("table, requests/s", "processor", "p99", "p99.9", "private memory, peak", "reloads", "goal"),
    {"met": "met", "not met": "not met", "-": "-"},
    "{}% of what the server can do",
)
_CHINESE_GOAL = (
    ("嵌入表 / 每秒请求数", "处理器", "p99", "p99.9", "私有内存峰值", "加载次数", "目标"),
    {"met": "达到", "not met": "未达到", "-": "-"},
    "服务器能力的 {}%",
)


def _goal(rung: str, words: tuple[Sequence[str], dict[str, str], str]) -> str:
    """What a rung comes to on TensorFlow Serving, at each size and load."""
    header, verdicts, share = words
    rows = {}
    for summary in sorted(_RESULTS.glob("*-tensorflow-serving-*iB-*/summary.md")):
        text = summary.read_text()
        found = re.search(r"(\d+)([MG])iB-(load-)?(\d+)$", summary.parent.name)
        line = re.search(rf"^\| {re.escape(rung)} \| ((not )?met|-) \|.*", text, re.MULTILINE)
        machine = re.search(r"^- machine: (\w+)(?:\(R\))? (\w+)", text, re.MULTILINE)
        assert found is not None, f"{summary} is of no size and load"
        assert line is not None, f"{summary} has no goal for {rung}"
        assert machine is not None, f"{summary} is of no machine"
        size, unit, is_share, load = found.groups()
        _, verdict, p99, p999, _, memory, reloads = (cell.strip() for cell in line[0].strip("|").split("|"))
        processor = " ".join(machine.groups())
        rows[unit == "G", int(size), is_share is not None, int(load), processor] = [
            f"{size} {unit}iB, " + (share.format(load) if is_share else f"{int(load):,}"),
            processor,
            p99,
            p999,
            memory.partition(",")[0],
            reloads,
            verdicts[verdict],
        ]
    return _table(header, (rows[key] for key in sorted(rows)))


def _parts(result: str) -> str:
    """What parts of docker/isolate are worth: a result of ``bench-isolation``."""
    goal, figures, *_ = _whole_tables((_RESULTS / result / "summary.md").read_text())
    p99 = goal[1].index("p99")
    available = map(_median, figures[2]["publish to available"])
    rows = zip(goal[2], (cells[p99] for cells in goal[2].values()), available, strict=True)
    return _table(["parts of the library", "p99", "publish to available"], rows)


#: What the page on mapping shows of ``benchmarks/mapping.py``: the part, how the row
#: begins there, and what it is called here.
_MAPPING = (
    ("swap", "folded reloads", "swaps that count"),
    ("swap", "folded reload p99.9", "p99.9 during them, all folded"),
    ("swap", "folded control p99.9", "the same in as many windows without a swap"),
    ("swap", "folded excess p99.9", "what swaps add to it, and the 95 % interval"),
    ("load", "of it loading", "loading, s"),
    ("load", "page faults of the swap", "page faults of a swap on an idle server"),
    ("load", "processor time of the swap", "its processor time, with the status requests that time it, s"),
    ("load", "private memory before", "private memory, one version loaded, MiB"),
    ("load", "private memory, peak", "private memory, its peak through that swap, MiB"),
    ("swap", "private memory, peak", "private memory, its peak through all swaps under load"),
    ("load", "first request after the load", "first request after a load without warmup, ms"),
    ("steady", "", "p50 relative to stock in the same half second"),
    ("throughput", "", "throughput relative to stock in the same half second"),
)


def _mapping(result: str) -> str:
    """What mapping changes, at 512 MiB; of the two that compare turns, the last row."""
    parts: dict[str, tuple[list[str], dict[str, list[str]]]] = {}
    for heading, columns, rows in _whole_tables((_RESULTS / result / "summary.md").read_text()):
        size, _, part = heading.partition(", ")
        if size == "512MiB":
            # What was measured of swaps stands in two tables.
            parts.setdefault(part, (columns, {}))[1].update(rows)
    kinds, lines = parts["swap"][0], []
    for part, begins, called in _MAPPING:
        columns, rows = parts[part]
        row = [name for name in rows if name.startswith(begins)][-1]
        # The interval is the news of an excess; of others the median is enough here.
        cells = rows[row] if "excess" in row else map(_median, rows[row])
        values = dict(zip(columns, cells, strict=True))
        lines.append([called, *(values.get(kind, "") for kind in kinds)])
    return _table(["", *kinds], lines, numbers=True)


def _serving() -> str:
    """What ``benchmarks/serving.py`` measured: medians of the rounds."""
    with imported("serving") as serving:
        return serving_tables(serving, serving.read(_RESULTS / "serving.npz"))


def serving_tables(serving: Any, result: Any) -> str:
    """That of the closed loop, and where it was measured that of the open loop."""

    def median(rounds: Iterable[Any], percent: float) -> float:
        return float(np.median([serving.milliseconds(values, percent) for values in rounds]))

    def closed(way: str, clients: int) -> str:
        if (rounds := result.closed.get((way, clients))) is None:
            return ""
        rate = np.median([len(values) / result.facts["seconds"] for values in rounds])
        return f"{rate:,.0f} ({median(rounds, 50):.2f})"

    def opened(way: str, rate: float) -> str:
        if (rounds := result.open.get((way, rate))) is None:
            return ""
        return f"{median(rounds, 50):.2f} ({median(rounds, 99):.2f})"

    grpcio = (serving.GRPCIO, serving.SERVING_GRPCIO)
    ways = [
        way
        for way in (serving.GRPC, serving.WORKERS, serving.SERVING, *grpcio, serving.REST, serving.FLASK)
        if any(way == each for each, _ in result.closed)
    ]
    header = ["clients at once", *(f"{way}, calls/s (p50 ms)" for way in ways)]
    counts = sorted({clients for _, clients in result.closed})
    tables = _table(header, ([str(n), *(closed(way, n) for way in ways)] for n in counts), numbers=True)
    if not result.open:
        return tables
    ways = [
        way
        for way in (serving.GRPC, serving.WORKERS, serving.SERVING, serving.INSTANT)
        if any(way == each for each, _ in result.open)
    ]
    header = ["open loop, calls/s", *(f"{way}, p50 (p99) ms" for way in ways)]
    rates = sorted({rate for _, rate in result.open})
    rows = ([f"{rate:,g}", *(opened(way, rate) for way in ways)] for rate in rates)
    about = (
        f"In an open loop calls leave at random, over {serving.CONNECTIONS} connections, whether or not\n"
        "others are answered; latency counts from when a call was to leave. The load generator alone has\n"
        "a server that answers at once, in Python: no more than that is the generator's own part.\n"
    )
    return f"{tables}\n{about}\n{_table(header, rows, numbers=True)}"


def _engine_profile() -> str:
    """What ``benchmarks/engine_profile.py`` measured, as it shows it."""
    result = json.loads((_RESULTS / "engine_profile.json").read_text())
    link = "[Raw result](../../benchmarks/results/engine_profile.json)."
    with imported("engine_profile") as engine_profile:
        return f"{engine_profile.table(result)}\n\n{link}\n"


def _soak() -> str:
    """The newest soak on each engine: what was bounded, found, and held."""
    columns, rows = [], dict[str, list[str]]()
    for engine in ("tensorflow-serving", "embedded"):
        summary = max(_RESULTS.glob(f"*-{engine}-soak/summary.md"))
        text = summary.read_text()
        about = re.search(r"^Engine: (\S+) ([\d.]*\d)", text, re.MULTILINE)
        assert about is not None, f"{summary} names no engine"
        link = f"../../{summary.relative_to(_ROOT)}"
        columns.append(f"[{about[1]} {about[2]}]({link})")
        for line in text.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if line.startswith("| ") and cells[-1] in ("yes", "NO"):
                what, bound, found, held = cells
                rows.setdefault(what.replace("_", " "), []).append(
                    f"{found} (at most {bound})"
                    if bound.replace(",", "").isdigit() and bound != "0"
                    else found
                )
                assert held == "yes", f"{summary}: {what} was not held; say so in the text"
    return _table(["", *columns], ([what, *cells] for what, cells in rows.items()), numbers=True)


def _fleet() -> str:
    """What ``benchmarks/fleet.py`` measured last."""
    summary = max(_RESULTS.glob("*-fleet/summary.md"))
    _, about, table, bars, *_ = summary.read_text().split("\n\n")
    folder = f"../../{summary.parent.relative_to(_ROOT)}"
    return f"{about}\n\n{table}\n\n{bars}\n\n[Raw results]({folder}/fleet.json).\n"


def _peers() -> str:
    """The newest comparison of peers: its table, and where it comes from."""
    for summary in sorted(_RESULTS.glob("*-peers/summary.md"), reverse=True):
        text = summary.read_text()
        table = re.search(r"^\| \| steady p50 \|.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
        assert table is not None, f"{summary} has no table"
        about = next(line for line in text.splitlines()[1:] if line)
        folder = f"../../{summary.parent.relative_to(_ROOT)}"
        picture = f"![p99.9 of each peer, without and with new versions]({folder}/peers.svg)"
        return f"{about}\n\n{table[0]}\n\n{picture}\n\n[All of it]({folder}/summary.md).\n"
    return "No result is checked in yet.\n"


#: Name -> what makes the table from the argument.
TABLES: dict[str, Callable[[str], str]] = {
    "compatibility": lambda _: _differences_table(),
    "server flags": lambda _: flags.reference(),
    "engine metrics": lambda _: _registered(Metrics()._registry),
    "exporter metrics": lambda _: _exporter_metrics(),
    "follow metrics": lambda _: _registered(
        StoreFollower("memory://none", _ROOT / "models", None, FollowSettings()).registry
    ),
    "stack variables": lambda _: _stack_table(),
    "results": lambda _: _results(),
    "peers": lambda _: _peers(),
    "serving": lambda _: _serving(),
    "engine profile": lambda _: _engine_profile(),
    "soak": lambda _: _soak(),
    "fleet": lambda _: _fleet(),
    "ladder": lambda result: _ladder(result, _ENGLISH, {}),
    "ladder in chinese": lambda result: _ladder(result, _CHINESE, _CHINESE_RUNGS),
    "mapping": _mapping,
    "parts": _parts,
    "goal": lambda _: _goal("+ isolated", _ENGLISH_GOAL),
    "goal in chinese": lambda _: _goal("+ isolated", _CHINESE_GOAL),
}


def updated(text: str) -> str:
    """The text with the tables between their markers."""
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2]](found[3] or "") + found[4], text)


if __name__ == "__main__":
    for document in documents():
        text = document.read_text()
        if updated(text) != text:
            document.write_text(updated(text))
            print(document.relative_to(_ROOT))
