"""HdrHistogram logs: what a reader of them gets is what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench_runs import made_up_run
from click.testing import CliRunner
from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogReader

from spikeless.bench.hdr import write_hdr
from spikeless.cli import cli


def read(path: Path, tag: str | None) -> tuple[HdrHistogram, int]:
    """The histogram of the intervals with this tag, and how many there are."""
    whole = HdrHistogram(1, 3_600_000_000_000, 3)
    reader = HistogramLogReader(str(path), whole)
    count = 0
    while (interval := reader.get_next_interval_histogram()) is not None:
        if interval.get_tag() == tag:
            whole.add(interval)
            count += 1
    return whole, count


def test_every_request_is_in_the_log(tmp_path: Path) -> None:
    run = made_up_run("a\nswap", 100)
    write_hdr(run, tmp_path / "run.hlog")
    text = (tmp_path / "run.hlog").read_text()
    assert "#[StartTime: 1767323045.678 (seconds since epoch)" in text
    assert "scenario a swap]" in text
    quiet, seconds = read(tmp_path / "run.hlog", None)
    reload, reloading = read(tmp_path / "run.hlog", "reload")
    # The reload is from 10 to 12.4 s: two seconds are whole, the third is divided.
    assert (seconds, reloading) == (18, 3)
    assert (quiet.get_total_count(), reload.get_total_count()) == (4000 - 480, 480)
    latency = run.requests["latency"]
    assert reload.get_max_value() / 1e9 == pytest.approx(latency[200:].max(), rel=1e-3)
    for share in (50, 90, 100):
        inside = latency[(run.requests["intended"] >= 10) & (run.requests["intended"] < 12.4)]
        expected = np.quantile(inside, share / 100, method="inverted_cdf")
        assert reload.get_value_at_percentile(share) / 1e9 == pytest.approx(expected, rel=1e-2)


def test_the_command_writes_it_beside_the_result(tmp_path: Path) -> None:
    for name in ("a", "b"):
        made_up_run(name, 5).save(tmp_path / f"{name}.npz")
    done = CliRunner().invoke(cli, ["bench", "hdr", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert done.output.split() == [str(tmp_path / "a.hlog"), str(tmp_path / "b.hlog")]
    assert read(tmp_path / "b.hlog", None)[0].get_total_count() == 4000 - 480
