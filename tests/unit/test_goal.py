"""The goal of the ladder: met or not, and by how much."""

from __future__ import annotations

import dataclasses

import pytest
from bench_runs import made_up_run, with_failures

from spikeless import bench
from spikeless.bench import report

GIB = 1 << 30


def scenario(*stalls: float, failures: int = 0) -> report.Scenario:
    run = made_up_run("rung", *stalls)
    (one,) = report.group([with_failures(run, failures) if failures else run])
    return one


def with_memory(one: report.Scenario, peak: int | None) -> report.Scenario:
    summaries = [dataclasses.replace(summary, memory_peak=peak) for summary in one.summaries]
    return dataclasses.replace(one, summaries=summaries)


def test_reloads_that_cost_nothing_meet_the_goal() -> None:
    quiet = scenario(*[0] * 6)
    assert report.met(quiet, None) is True
    assert [round(quiet.fold.ratio[figure].value, 1) for figure in ("p99", "p99.9")] == [1, 1]
    text = report.render_goal([quiet], None)
    assert "| rung | met |" in text
    assert "at most 1.1 x" in text


def test_a_spike_does_not() -> None:
    spiky = scenario(*[50] * 6)
    assert report.met(spiky, None) is False
    assert spiky.fold.ratio["p99.9"].low > 1.1
    reload, control = spiky.fold.reload["p99.9"].value, spiky.fold.control["p99.9"].value
    assert spiky.fold.ratio["p99.9"].value == pytest.approx(reload / control)
    assert "| rung | not met |" in report.render_goal([spiky], None)


def test_a_failed_request_breaks_it() -> None:
    assert report.met(scenario(*[0] * 6, failures=1), None) is False


def test_private_memory_counts_from_a_gibibyte_on() -> None:
    quiet = scenario(*[0] * 6)
    assert report.met(with_memory(quiet, GIB), GIB - 1) is True
    assert report.met(with_memory(quiet, GIB), GIB) is False
    assert report.met(with_memory(quiet, GIB // 10), GIB) is True
    assert report.met(with_memory(quiet, None), GIB) is False, "unknown is not met"
    assert "102 MiB, 10.0% of the parameters" in report.render_goal([with_memory(quiet, GIB // 10)], GIB)


def test_few_reloads_say_nothing() -> None:
    few = scenario(0, 0)
    assert report.met(few, None) is None
    assert "nothing can be said" in report.render_goal([few], None)
    assert "| rung | - | - | - | 0 |" in report.render_goal([few, scenario(*[0] * 6)], None)


def test_the_engine_is_named_with_its_note() -> None:
    run = made_up_run("rung", 0)
    server = dataclasses.replace(run.facts.server, engine_note="made by hand")
    noted = bench.Run(dataclasses.replace(run.facts, server=server), run.requests, run.samples)
    assert dict(report.provenance(report.group([noted])))["engine"] == "embedded 0.1.0, made by hand"
