"""The tables of the mapping benchmark, on runs that are known exactly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import benchmark_scripts
import numpy as np
from bench_runs import MACHINE, made_up_run

MIB = 1 << 20


summary = benchmark_scripts.fixture("mapping_summary")


def _write(directory: Path, part: str, label: str, kind: str, **measured: Any) -> None:
    content = {
        "scenario": f"mapping-{part}-{label}-{kind}",
        "started": "2026-01-02T03:04:05.678+00:00",
        "commit": "0123456789ab",
        "machine": dataclasses.asdict(MACHINE),
        "server": {"engine": "embedded", "engine_version": "0.1.0", "allocator": "glibc"},
        "measured": measured,
    }
    (directory / f"mapping-{part}-{label}-{kind}-1.json").write_text(json.dumps(content))


def _load(directory: Path, label: str, kind: str, seconds: float, peak_mib: int, first: float) -> None:
    process = dict.fromkeys(
        ("rss_anon", "minor_faults", "major_faults", "user_ticks", "system_ticks", "ticks_per_second"), 1
    )
    _write(
        directory,
        "load",
        label,
        kind,
        available_seconds=seconds,
        load_seconds=seconds / 2,
        before=process,
        after=process,
        peak_rss_anon=peak_mib * MIB,
        request_seconds=[first, *[0.001] * 19],
    )


def _bars(text: str) -> dict[str, list[str]]:
    """The cells of each bar's row; rows called "the same" go with the row above."""
    rows: dict[str, list[str]] = {}
    above = ""
    for line in text.partition("## What mapping is held to")[2].splitlines()[4:]:
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        key = f"{above}, own" if "the same, over a server" in name else name
        above = name
        rows[key] = cells
    return rows


def test_each_bar(summary: Any, tmp_path: Path) -> None:
    for label, seconds in (("512MiB", 0.5), ("8192MiB", 1.0)):
        _load(tmp_path, label, "stock", 20 * seconds, 2000, first=0.020)
        _load(tmp_path, label, "mapped", seconds, 80, first=0.025)
        _load(tmp_path, label, "bare", seconds, 70, first=0.020)
    _write(tmp_path, "steady", "512MiB", "all", p50_ms={"stock": [1.0, 2.0, 4.0], "mapped": [1.02, 2.0, 4.2]})
    rates = {"stock": [1000.0, 500.0], "mapped": [900.0, 450.0]}
    _write(tmp_path, "throughput", "512MiB", "all", requests_per_second=rates)
    for part, kind, spikes in (("swap", "stock", [300.0]), ("swap", "mapped", [2.0] * 6)):
        run = made_up_run(f"mapping-{part}-512MiB-{kind}", *spikes)
        run.save(tmp_path / f"mapping-{part}-512MiB-{kind}-1.npz")
    for kind, growth in (("stock", 400), ("mapped", 60)):
        run = made_up_run(f"mapping-soak-512MiB-{kind}")
        run.samples["rss_anon"][:] = np.linspace(100 * MIB, (100 + growth) * MIB, len(run.samples["t"]))
        run.save(tmp_path / f"mapping-soak-512MiB-{kind}-1.npz")
    squeezed = made_up_run("mapping-squeeze-512MiB-stock", notes=("does not fit", "2 GiB"))
    squeezed.save(tmp_path / "mapping-squeeze-512MiB-stock-1.npz")

    bars = _bars(summary.render(tmp_path))

    through = "512MiB: private memory through a load, mapped, the whole process"
    assert bars[through][1:] == ["15.6%", "**missed**"]
    assert bars[f"{through}, own"][1:] == ["2.0%", "holds"]
    assert bars[through.replace("mapped", "stock")][-1] == "for comparison"
    assert bars[through.replace("512", "8192")][1:] == ["1.0%", "holds"]
    assert bars["512MiB: first request after a load without warmup, mapped"][1:] == ["1.25 x", "**missed**"]
    size = bars["publish to AVAILABLE, 8192MiB against 512MiB, mapped"]
    assert size[1:] == ["2.00 x (1.000 against 0.500 s)", "**missed**"]
    assert bars["512MiB: steady p50, mapped"][1:] == ["1.020 x", "holds"]
    assert bars["512MiB: throughput, mapped"][1:] == ["0.900 x", "**missed**"]
    reloads = "512MiB: private memory through reloads with warmup under load, mapped, the whole process"
    assert bars[reloads][1:] == ["35.2%", "**missed**"]
    assert bars["512MiB: p99.9 during reloads, stock"][-1] == "**not shown**"
    assert "6 reloads" in bars["512MiB: p99.9 during reloads, mapped"][1]
    assert bars["512MiB: growth of private memory in 20 s of sparse look-ups, mapped"][1:] == [
        "11.7%",
        "**missed**",
    ]
    (little,) = [name for name in bars if "little memory" in name]
    assert "stock (does not fit; 2 GiB)" in little
    assert bars[little][-1] == "for comparison"


def test_no_bar_without_its_results(summary: Any, tmp_path: Path) -> None:
    _load(tmp_path, "64MiB", "mapped", 0.5, 80, first=0.02)
    assert [*_bars(summary.render(tmp_path))] == [
        "64MiB: private memory through a load, mapped, the whole process"
    ]


def test_requests_at_once(summary: Any) -> None:
    run = made_up_run("mapping-soak-64MiB-mapped", 1000.0, rate=100)
    # All requests of the stall's second wait for its end.
    assert 100 <= summary._at_once(run) <= 102
