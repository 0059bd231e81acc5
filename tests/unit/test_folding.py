"""Folded reloads: windows, controls and intervals on data with known answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from bench_runs import SETTINGS, control_of, made_up_run, reload_of

from spikeless import bench
from spikeless.bench import folding, ladder
from spikeless.bench.analysis import latencies, percentile
from spikeless.bench.watch import StateChange
from spikeless.errors import InvalidArgument


def folded(*runs: bench.Run) -> bench.Fold:
    return bench.fold(runs, [bench.analyse(run) for run in runs])


def with_lag(run: bench.Run, begin: float, end: float) -> bench.Run:
    """The same, but the requests from `begin` to `end` left late."""
    intended = run.requests["intended"]
    lag = np.where((intended >= begin) & (intended < end), 0.006, run.requests["lag"])
    return dataclasses.replace(run, requests={**run.requests, "lag": lag})


# The series


def test_one_swap_is_a_series() -> None:
    assert SETTINGS.publish_moments == (10,)
    assert dataclasses.replace(SETTINGS, publish_at=None).publish_moments == ()
    series = dataclasses.replace(SETTINGS, publish_at=5.0, publishes=4, publish_every=2.5)
    assert series.publish_moments == (5, 7.5, 10, 12.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"publishes": 0}, "publish 1 version or more"),
        ({"publish_every": 0}, "positive time between them"),
        ({"publishes": 3, "publish_every": 5.5}, "the last of 3 versions would be published at 21 s"),
    ],
)
def test_impossible_series(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        dataclasses.replace(SETTINGS, **fields)


def test_every_swap_has_its_window_and_a_control_in_the_quiet_time_before() -> None:
    summary = bench.analyse(made_up_run("series", 100, 40, 80))
    assert [(swap.old_version, swap.new_version) for swap in summary.reloads] == [(1, 2), (2, 3), (3, 4)]
    windows = [(swap.window.begin, swap.window.end) for swap in summary.reloads]
    assert np.allclose(windows, [(10, 12.4), (30, 32.4), (50, 52.4)])
    # Quiet from 2 (warm), 12.4 and 32.4 on: their middles are 6, 21.2 and 41.2.
    controls = [(control_of(swap).begin, control_of(swap).end) for swap in summary.reloads]
    assert np.allclose(controls, [(4.8, 7.2), (20, 22.4), (40, 42.4)])
    assert [swap.window.max for swap in summary.reloads] == pytest.approx([101, 41, 81])
    assert [control_of(swap).max for swap in summary.reloads] == pytest.approx([1, 1, 1])
    assert [swap.over_slo for swap in summary.reloads] == [19, 7, 15]
    assert [swap.first_ms for swap in summary.reloads] == pytest.approx([101, 41, 81])

    assert (summary.old_version, summary.new_version) == (1, 4)
    assert reload_of(summary).requests == 3 * 480
    assert summary.height_ms == pytest.approx(101)
    assert summary.first_ms == pytest.approx(81), "the median"
    assert summary.over_slo == 15
    assert summary.swap_seconds == pytest.approx(1.2)
    assert (summary.steady.begin, summary.steady.end) == (2, 10)


def test_contaminated_reloads_are_not_in_the_figures_of_a_run() -> None:
    summary = bench.analyse(with_lag(made_up_run("series", 100, 400, 80), 30, 31))
    assert [swap.clean for swap in summary.reloads] == [True, False, True]
    assert summary.height_ms == pytest.approx(101)
    assert reload_of(summary).requests == 2 * 480
    assert not reload_of(summary).contaminated


def test_a_reload_that_is_not_over_when_the_next_begins() -> None:
    run = made_up_run("series", 0, 0, 0)
    states = [change for change in run.facts.states if (change.version, change.state) != (2, "END")]
    states.append(StateChange(50.1, 2, "END"))
    run = dataclasses.replace(
        run, facts=dataclasses.replace(run.facts, states=sorted(states, key=lambda c: c.t))
    )
    summary = bench.analyse(run)
    assert summary.reloads[1].window.end == 50, "the next publishing"
    assert summary.reloads[2].control is None, "there was no quiet time"
    assert any("Reload 2: the old version was not seen to end" in note for note in summary.notes)
    fold = folded(run)
    assert not fold.enough
    assert "reload 2: the old version was not seen to end" in fold.left_out[0]
    assert "reload 3: the quiet time before it is shorter" in fold.left_out[1]
    assert ladder.usable(run) == (
        "1 of 3 reloads can be used; for 2 the quiet time before was too short: "
        "give --publish-every more than 40.0s"
    )


def test_publishing_after_the_load_is_no_reload() -> None:
    run = made_up_run("series", 0, 0)
    late = [run.facts.publishes[0], bench.Publish(45.0, 45.1)]
    summary = bench.analyse(dataclasses.replace(run, facts=dataclasses.replace(run.facts, publishes=late)))
    assert summary.reloads[1].window.requests == 0
    assert [swap.clean for swap in summary.reloads] == [True, False]


# Folding


def test_folded_figures_are_those_of_all_requests_together() -> None:
    runs = [made_up_run("series", 100, 40, 80), made_up_run("series", 60, 20)]
    fold = folded(*runs)
    assert [number for number, _ in fold.pairs] == [0, 0, 0, 1, 1]
    assert not fold.left_out
    together = np.concatenate([latencies(runs[number], swap.window) for number, swap in fold.pairs])
    assert len(together) == 5 * 480
    for share, name in folding.FIGURES.items():
        assert fold.reload[name].value == percentile(together, share)
        assert fold.control[name].value == pytest.approx(1)
        assert fold.excess[name].value == pytest.approx(fold.reload[name].value - 1)
    assert fold.seconds == pytest.approx(2.4)


def test_what_is_in_every_reload_is_certain_and_what_is_in_one_is_not() -> None:
    every = folded(made_up_run("series", *[50] * 6))
    for figures in (every.reload, every.control, every.excess):
        for estimate in figures.values():
            assert estimate.low == pytest.approx(estimate.value)
            assert estimate.high == pytest.approx(estimate.value)
    one = folded(made_up_run("series", 50, 0, 0, 0, 0, 0))
    assert one.reload["max"].value == pytest.approx(51)
    # A third of the draws (5/6 to the sixth) are without it.
    assert one.reload["max"].low == pytest.approx(1)
    assert one.reload["max"].high == pytest.approx(51)
    assert one.excess["max"].low == pytest.approx(0)


def test_intervals_are_drawn_by_reload() -> None:
    """Drawing single requests, 480 of each, would make the median almost certain."""
    runs = []
    for level in (2.0, 4.0, 6.0, 8.0, 9.0):
        run = made_up_run("level", started=f"2026-01-02T03:0{level:.0f}:00.000+00:00")
        inside = (run.requests["intended"] >= 10) & (run.requests["intended"] < 12.4)
        latency = np.where(inside, level / 1e3, run.requests["latency"])
        runs.append(dataclasses.replace(run, requests={**run.requests, "latency": latency}))
    fold = folded(*runs)
    assert fold.reload["p50"].value == pytest.approx(6)
    assert (fold.reload["p50"].low, fold.reload["p50"].high) == pytest.approx((2, 9))
    assert folded(*runs) == fold, "the draws are seeded"


def test_figures_of_a_draw_are_those_of_its_requests() -> None:
    random = np.random.default_rng(7)
    windows = [random.exponential(1 + number, size) for number, size in enumerate((3, 500, 0, 41, 1000))]
    counts = folding._draws(len(windows))[:50]
    figures = folding._quantiles(windows, counts)
    for count, row in zip(counts, figures, strict=True):
        drawn = np.concatenate([np.tile(window, times) for window, times in zip(windows, count, strict=True)])
        assert row.tolist() == [percentile(drawn, share) for share in folding.FIGURES]


# What is left out


def test_a_reload_is_left_out_with_its_control() -> None:
    run = made_up_run("series", 10, 200, 30, 40, 20, 20)
    late_reload = folded(with_lag(run, 30, 31))
    assert late_reload.left_out == ["run 1, reload 2: window: 41.7% of the requests left more than 5 ms late"]
    assert [swap.new_version for _, swap in late_reload.pairs] == [2, 4, 5, 6, 7]
    assert late_reload.reload["max"].value == pytest.approx(41)
    late_control = folded(with_lag(run, 20, 21))
    assert late_control.left_out == [
        "run 1, reload 2: control: 41.7% of the requests left more than 5 ms late"
    ]
    assert not folded(with_lag(run, 24, 29)).left_out, "neither window nor control"


def test_stolen_time_is_judged_window_by_window() -> None:
    run = made_up_run("series", 0, 0, 0)
    t = run.samples["t"]
    # 200 ticks a second; 10 of them stolen from 30 to 31 s.
    steal = np.clip((t - 30) * 10, 0, 10).astype(np.int64)
    run = dataclasses.replace(run, samples={**run.samples, "cpu_steal": steal})
    fold = folded(run)
    assert fold.left_out == ["run 1, reload 2: window: the hypervisor took 2.2% of the processors' time"]
    assert len(fold.pairs) == 2


def test_windows_without_requests_do_not_count() -> None:
    run = made_up_run("series", 0, 0, 0)
    kept = (run.requests["intended"] < 20) | (run.requests["intended"] >= 23)
    run = dataclasses.replace(run, requests={name: values[kept] for name, values in run.requests.items()})
    assert folded(run).left_out == ["run 1, reload 2: control: no request"]


def test_fewer_than_five_reloads_cannot_be_folded() -> None:
    fold = folded(made_up_run("four", *[50] * 4))
    assert len(fold.pairs) == 4
    assert not fold.enough
    assert fold.reload == {}
    assert folded(made_up_run("five", *[50] * 5)).enough
    assert folded(made_up_run("none", publishes=(), states=())).pairs == []
