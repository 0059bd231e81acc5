"""The report's numbers and words; how it looks is tested in a browser."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from bench_runs import MACHINE, made_up_run, with_failures

from spikeless.bench import Run, report
from spikeless.errors import InvalidArgument, NotFound


def rows(*runs: Run) -> dict[str, list[str]]:
    return {row.label: list(row.cells) for row in report.table(report.group(runs))}


def test_scenarios_stand_side_by_side_in_the_order_of_their_start() -> None:
    first = made_up_run("no warmup", 100)
    second = made_up_run("warmup", started="2026-01-02T03:10:00.000+00:00")
    assert [scenario.name for scenario in report.group([second, first])] == ["no warmup", "warmup"]
    cells = rows(second, first)
    assert cells["reload max"] == ["101 ms", "1.00 ms"]
    assert cells["steady p99.9"] == ["1.00 ms", "1.00 ms"]
    assert cells["spike width"] == ["90.0 ms", "0.00 ms"]
    assert cells["requests over the SLO"] == ["19", "0"]
    assert cells["failed requests"] == ["0", "0"]
    assert cells["served by"] == ["v1: 2,240, v2: 1,760"] * 2
    assert cells["private memory, peak"] == ["180 MiB", "180 MiB"]


def test_repeats_give_median_and_spread_and_the_median_run_is_drawn() -> None:
    runs = [made_up_run("warmup", height) for height in (40, 400, 80)]
    assert rows(*runs)["reload max"] == ["81.0 ms (41.0 to 401)"]
    (scenario,) = report.group(runs)
    assert scenario.summaries[scenario.shown].height_ms == pytest.approx(81)


def test_contaminated_repeats_are_left_out_and_named() -> None:
    dirty = made_up_run("warmup", 500)
    dirty = dataclasses.replace(dirty, requests={**dirty.requests, "lag": dirty.requests["lag"] + 0.01})
    runs = [made_up_run("warmup", 40), dirty]
    assert rows(*runs)["reload max"] == ["41.0 ms"]
    assert any("run 2, reload window contaminated" in text for text in report.warnings(report.group(runs)))
    assert rows(dirty)["reload max"] == ["501 ms"], "without a clean run it is all there is"


def test_several_reloads_are_folded() -> None:
    cells = rows(made_up_run("series", 50, 50, 50), made_up_run("single", 50))
    assert cells["folded reloads"] == ["3 of 3", "1 of 1"]
    assert cells["folded reload max"] == ["51.0 ms [51.0, 51.0]", "-"]
    assert cells["folded control max"] == ["1.00 ms [1.00, 1.00]", "-"]
    assert cells["folded excess max"] == ["50.0 ms [50.0, 50.0]", "-"]
    assert "folded reloads" not in rows(made_up_run("single", 50))
    text = report.render_markdown(report.group([made_up_run("series", 50, 50)]))
    assert "2 versions published, one every 20 s" in text
    assert "95% intervals from 2,000 draws of whole reloads" in text


def test_reloads_that_are_left_out_are_named() -> None:
    run = made_up_run("series", *[0] * 8)
    late = {**run.requests, "lag": np.where(run.requests["intended"] > 20, 0.006, 0.0)}
    (warning,) = [
        text
        for text in report.warnings(report.group([dataclasses.replace(run, requests=late)]))
        if "folded" in text
    ]
    assert "7 of 8 reloads are left out of the folded figures (too few are left to have any)" in warning
    assert "run 1, reload 2: window: 100.0% of the requests left more than 5 ms late" in warning
    assert warning.endswith("; and 2 more.")


def test_failures_are_named_by_code() -> None:
    assert rows(with_failures(made_up_run(), 3))["errors"] == ["3 UNAVAILABLE"]
    assert rows(made_up_run())["errors"] == ["none"]


def test_runs_of_different_machines_are_not_to_be_compared() -> None:
    other = dataclasses.replace(MACHINE, cpu="another processor")
    runs = [made_up_run(), made_up_run("other", machine=other)]
    assert any("different machines" in text for text in report.warnings(report.group(runs)))


def test_markdown_states_what_was_measured() -> None:
    text = report.render_markdown(report.group([made_up_run("a|b")]))
    assert text.startswith("| | a\\|b |\n|---|---:|\n")
    assert "- engine: embedded 0.1.0" in text
    assert "- allocator: jemalloc (libjemalloc.so.2)" in text
    assert "- generator's floor: p50 0.30, p99 0.60, p99.9 1.50" in text
    assert "commit 0123456789ab" in text
    assert "A window counts as contaminated when" in text


def test_names_cannot_break_out_of_the_page() -> None:
    name = "</script><script>alert(1)</script>"
    page = report.render_html(report.group([made_up_run(name)]))
    assert "<script>alert(1)" not in page


def test_pages_load_nothing() -> None:
    page = report.render_html(report.group([made_up_run()]))
    own = page[: page.index("<script>")] + page[page.rindex("<script>") :]
    assert "http://" not in own
    assert "https://" not in own


def test_a_run_without_publishing_is_reported() -> None:
    cells = rows(made_up_run(publishes=(), states=(), floor=None))
    assert cells["reload max"] == ["-"]
    assert "boston under load" in report.render_html(report.group([made_up_run(publishes=(), states=())]))


def test_nothing_is_written_on_bad_input(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        report.write([tmp_path / "nowhere.npz"], tmp_path / "out")
    with pytest.raises(InvalidArgument, match="no results"):
        report.write([], tmp_path / "out")
    assert not (tmp_path / "out").exists()
