"""The metrics of several processes as those of one server.

In: the text for Prometheus of each process. Out: one text, with the same names. Counts
and distributions are added up, and what ended processes had counted stays in them, for
a counter that went back would look like a restart. Of gauges, those that workers share
are the largest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

#: Gauges of what each process has for itself.
_ADDED = ("spikeless_calls_in_progress", "spikeless_memory_private_bytes")
#: A counter of what the workers hear of from the process that leads them.
_SHARED = "spikeless_load_failures_total"
_PRIVATE = "spikeless_memory_private_bytes"


class Pages:
    """Adds pages up, and keeps what is counted in those of ended processes."""

    def __init__(self) -> None:
        self._ended: dict[str, float] = {}

    def end(self, page: str) -> None:
        """Keep what the last page of a process that has ended counts."""
        types = _types(page)
        for series, value in _samples(page):
            if not _is_gauge(series, types):
                self._ended[series] = self._ended.get(series, 0.0) + value

    def forget(self, *labels: str) -> None:
        """Drop the series of ended processes that have all of these labels."""
        self._ended = {
            series: value
            for series, value in self._ended.items()
            if not all(label in series for label in labels)
        }

    def total(self, pages: Iterable[str], private_bytes: int = 0) -> str:
        """One page; ``private_bytes`` are those of the process that leads."""
        pages = list(pages)
        types = {name: kind for page in pages for name, kind in _types(page).items()}
        values: dict[str, float] = {}
        for series, value in (sample for page in pages for sample in _samples(page)):
            if series not in values:
                values[series] = value
            elif _is_gauge(series, types) and not series.startswith(_ADDED):
                values[series] = max(values[series], value)
            else:
                values[series] += value
        if _PRIVATE in values:
            values[_PRIVATE] += private_bytes
        known = {_name(series) for series in values}
        for series, value in self._ended.items():
            if _name(series) in known:
                values[series] = values.get(series, 0.0) + value
        return _text(pages, values)


def _text(pages: Iterable[str], values: dict[str, float]) -> str:
    """The lines of the pages, each series once, below the head of its metric."""
    from prometheus_client.utils import floatToGoString

    written: Any = floatToGoString
    heads: dict[str, list[str]] = {}
    for page in pages:
        for line in page.splitlines():
            if line.startswith("# "):
                lines = heads.setdefault(line.split(maxsplit=3)[2], [])
                if line not in lines:
                    lines.append(line)
    blocks: dict[str, list[str]] = {name: [] for name in heads}
    for series, value in values.items():
        metric = _metric(_name(series), heads)
        blocks.setdefault(metric, []).append(f"{series} {written(value)}")
    lines = [line for name, block in blocks.items() for line in (*heads.get(name, ()), *block)]
    return "\n".join(lines) + "\n"


def _metric(name: str, heads: dict[str, list[str]]) -> str:
    for suffix in ("", "_bucket", "_sum", "_count"):
        if name.endswith(suffix) and (metric := name[: len(name) - len(suffix)]) in heads:
            return metric
    return name


def _name(series: str) -> str:
    return series.partition("{")[0]


def _samples(page: str) -> Iterable[tuple[str, float]]:
    for line in page.splitlines():
        if line and not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            yield series, float(value)


def _types(page: str) -> dict[str, str]:
    words = (line.split() for line in page.splitlines() if line.startswith("# TYPE "))
    return {name: kind for _, _, name, kind in words}


def _is_gauge(series: str, types: dict[str, str]) -> bool:
    name = _name(series)
    return types.get(name) == "gauge" or name == _SHARED
