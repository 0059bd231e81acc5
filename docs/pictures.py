"""Draw ``images/spike.svg``, the picture of a swap without and with a warmup file.

In: two runs of a checked-in demo, the one with the smaller spike of those without a
warmup file. Out: the picture, one point for each request.
As a script it writes the file: ``python docs/pictures.py``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from spikeless import bench

_DOCS = Path(__file__).parent
RESULT = _DOCS.parent / "benchmarks" / "results" / "2026-11-23-embedded-demo"
PICTURE = _DOCS / "images" / "spike.svg"

#: Seconds around the moment of publishing, and milliseconds, that are drawn.
_BEFORE, _AFTER, _HIGHEST = 3.0, 5.0, 100.0
_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 400, 220, 60, 62, 50
_STYLE = """\
  text { font: 13px system-ui, sans-serif; fill: #3c4650 }
  .title { font-size: 16px; font-weight: 600 }
  path { stroke-linecap: round }
  .fast { stroke: #4a8296; stroke-width: 3 } .slow { stroke: #c8202f; stroke-width: 6 }
  .grid { stroke: #d8dee4 } .publish { stroke: #7a3fd1; stroke-width: 2 }
  .plot { fill: #fbfcfd; stroke: #c4ccd4 } .page { fill: #ffffff }
"""


def spike() -> str:
    """The picture: latency over time, the moment of publishing at zero."""
    width = _LEFT + 2 * _WIDTH + _GAP + 20
    height = _TOP + _HEIGHT + 68
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="Latency of each request around a swap: a spike without a warmup file, none with one">',
        f"<style>\n{_STYLE}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
    ]
    for number, (name, title) in enumerate(
        (("no-warmup-2", "without a warmup file"), ("warmup-1", "with one"))
    ):
        parts += _panel(bench.read_run(RESULT / f"{name}.npz"), title, _LEFT + number * (_WIDTH + _GAP))
    for line, text in enumerate(
        (
            "Seconds after publishing version 2. A point is a request, its latency in ms since it was due.",
            "Red: over the SLO of 10 ms. 300 requests/s, embedded engine, two shared cores.",
        )
    ):
        parts.append(f'<text x="{_LEFT}" y="{height - 26 + 18 * line}">{text}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(run: bench.Run, title: str, left: float) -> list[str]:
    due = run.requests["intended"] - run.facts.publishes[0].begin
    latency = 1000 * run.requests["latency"]

    def x(second: float) -> float:
        return left + _WIDTH * (second + _BEFORE) / (_BEFORE + _AFTER)

    def y(milliseconds: float) -> float:
        return _TOP + _HEIGHT * (1 - milliseconds / _HIGHEST)

    parts = [
        f'<text class="title" x="{left}" y="26">{title}</text>',
        f'<rect class="plot" x="{left}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}"/>',
    ]
    for mark in range(0, int(_HIGHEST) + 1, 25):
        parts += [
            f'<line class="grid" x1="{left}" x2="{left + _WIDTH}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>',
            f'<text x="{left - 8}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark}</text>',
        ]
    for second in range(-int(_BEFORE), int(_AFTER) + 1):
        parts.append(
            f'<text x="{x(second):.1f}" y="{_TOP + _HEIGHT + 17}" text-anchor="middle">{second}</text>'
        )
    parts += [
        f'<line class="publish" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{_TOP}" y2="{_TOP + _HEIGHT}"/>',
        f'<text x="{x(0) + 5:.1f}" y="{_TOP - 8}">version 2 published</text>',
    ]
    drawn = (due > -_BEFORE) & (due < _AFTER)
    over = latency > run.facts.settings.slo_ms
    for kind, chosen in (("fast", drawn & ~over), ("slow", drawn & over)):
        points = zip(due[chosen], np.minimum(latency[chosen], _HIGHEST), strict=True)
        # A line without length, with a round end, is a point.
        path = "".join(f"M{x(second):.1f} {y(top):.1f}h0" for second, top in points)
        parts.append(f'<path class="{kind}" d="{path}"/>')
    return parts


if __name__ == "__main__":
    PICTURE.write_text(spike())
