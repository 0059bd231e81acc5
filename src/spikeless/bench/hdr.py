"""The latencies of a run as an HdrHistogram log, for the tools that read those.

In: a `Run`. Out: a text file in the format of HdrHistogram's logs, version 1.2
(G. Tene, https://hdrhistogram.github.io/HdrHistogram/), with a histogram for each
second. Values are nanoseconds from the intended start, exact to three digits, so that
nothing has to be corrected for coordinated omission. Requests of a reload window have
the tag ``reload``; failed requests count, as everywhere.
"""

from __future__ import annotations

import datetime
import os

import numpy as np
from hdrh.histogram import HdrHistogram

from spikeless.bench.analysis import Summary, analyse
from spikeless.bench.run_file import Run
from spikeless.disk.atomic import write_atomically

SUFFIX = ".hlog"
RELOAD_TAG = "reload"
#: What a histogram can hold, in nanoseconds: 1 us to an hour.
_LOWEST, _HIGHEST, _DIGITS = 1_000, 3_600_000_000_000, 3
#: The log's column of maxima is in milliseconds.
_NANOSECONDS = 1_000_000.0


def write_hdr(run: Run, path: str | os.PathLike[str]) -> None:
    """Write the log, whole or not at all.

    Raises:
        InvalidArgument: the run has no steady window (see `analyse`).
    """
    start = datetime.datetime.fromisoformat(run.facts.started)
    lines = [
        f"#[Logged by spikeless bench, scenario {' '.join(run.facts.scenario.split())}]",
        "#[Histogram log format version 1.2]",
        f"#[StartTime: {start.timestamp():.3f} (seconds since epoch), {run.facts.started}]",
        '"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"',
    ]
    intended = run.requests["intended"]
    values = np.clip(np.round(run.requests["latency"] * 1e9), _LOWEST, _HIGHEST).astype(np.int64)
    in_reload = _in_reload(run, analyse(run))
    seconds = np.floor(intended).astype(np.int64)
    for second in np.unique(seconds):
        for reloading in (False, True):
            mine = values[(seconds == second) & (in_reload == reloading)]
            if not len(mine):
                continue
            histogram = HdrHistogram(_LOWEST, _HIGHEST, _DIGITS)
            for value, count in zip(*np.unique(mine, return_counts=True), strict=True):
                histogram.record_value(int(value), int(count))
            tag = f"Tag={RELOAD_TAG}," if reloading else ""
            highest = histogram.get_max_value() / _NANOSECONDS
            lines.append(f"{tag}{second:.3f},1.000,{highest:.6f},{histogram.encode().decode()}")
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def _in_reload(run: Run, summary: Summary) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    intended = run.requests["intended"]
    inside = np.zeros(len(intended), bool)
    for reload in summary.reloads:
        inside |= (intended >= reload.window.begin) & (intended < reload.window.end)
    return inside
