"""What happens to versions, and the windows, figures and words that come of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from bench_runs import SETTINGS, made_up_run

from spikeless import bench
from spikeless.bench import report
from spikeless.bench.events import CHANGES, EVENTS
from spikeless.bench.gate import GateOutcome, Limits, judge
from spikeless.bench.run_file import Publish, Run
from spikeless.bench.watch import StateChange
from spikeless.errors import Code, FailedPrecondition, InvalidArgument


def changed(run: Run, event: str, **facts: Any) -> Run:
    settings = dataclasses.replace(run.facts.settings, event=event, **facts.pop("settings", {}))
    return dataclasses.replace(run, facts=dataclasses.replace(run.facts, settings=settings, **facts))


def storm(*, left: str = "END") -> Run:
    """Three versions in two seconds, of which the second one is skipped.

    The third one is AVAILABLE at 13 s. The first ends at 13.4 s, or is `left` in
    another state.
    """
    return changed(
        made_up_run("storm", 100),
        "storm",
        settings={"publishes": 3, "publish_every": 1.0},
        publishes=[Publish(10.0 + n, 10.01 + n, f"models/boston/{2 + n}") for n in range(3)],
        states=[
            StateChange(-1.0, 1, "AVAILABLE"),
            StateChange(11.2, 2, "AVAILABLE"),
            StateChange(13.0, 4, "AVAILABLE"),
            StateChange(13.2, 2, "END"),
            StateChange(13.4, 1, left),
        ],
    )


def test_a_storm_is_one_event_until_only_the_newest_version_is_left() -> None:
    summary = bench.analyse(storm())
    (reload,) = summary.reloads
    assert reload.what == "storm v2 to v4"
    assert (reload.old_version, reload.new_version) == (1, 4)
    assert (reload.window.begin, reload.window.end) == pytest.approx((10, 14.4))
    assert (reload.swap_seconds, reload.ended) == pytest.approx((3.0, 3.4))
    assert reload.clean
    assert reload.control is not None
    assert reload.control.end - reload.control.begin == pytest.approx(4.4)
    assert (summary.published, summary.loaded) == (3, 2)
    assert summary.height_ms == pytest.approx(101)


def test_a_storm_whose_old_versions_stay_is_incomplete() -> None:
    (reload,) = bench.analyse(storm(left="UNLOADING")).reloads
    assert reload.ended is None
    assert not reload.clean
    assert reload.window.end == 20


def test_versions_that_are_published_at_once_are_one_event() -> None:
    """It ends with the last of them; the model that is loaded keeps its version."""
    ends = {"paris": 11.0, "rome": 12.0}
    states = [StateChange(-1.0, 1, "AVAILABLE")]
    for model, end in ends.items():
        states += [
            StateChange(-1.0, 1, "AVAILABLE", model=model),
            StateChange(end - 0.5, 2, "AVAILABLE", model=model),
            StateChange(end, 1, "END", model=model),
        ]
    run = changed(
        made_up_run("at once"),
        "publish-all",
        settings={"published_models": tuple(ends)},
        publishes=[Publish(10.0 + n / 100, 10.01, "", model) for n, model in enumerate(ends)],
        states=states,
    )
    (reload,) = bench.analyse(run).reloads
    assert reload.what == "publish paris, rome"
    assert (reload.window.begin, reload.window.end) == pytest.approx((10, 13))
    assert reload.swap_seconds == pytest.approx(1.5)
    assert reload.clean
    late = [change for change in states if (change.model, change.state) != ("rome", "END")]
    (reload,) = bench.analyse(changed(run, "publish-all", states=late)).reloads
    assert not reload.clean, "one of them did not end"


def unload(*, ended: bool = True) -> Run:
    """Version 1 is unloaded at 10 s, beside version 2; it ends at 10.3 s."""
    states = [StateChange(-1.0, 1, "AVAILABLE"), StateChange(-1.0, 2, "AVAILABLE")]
    if ended:
        states += [StateChange(10.2, 1, "UNLOADING"), StateChange(10.3, 1, "END")]
    publishes = [Publish(10.0, 10.01, "models/boston/1")]
    return changed(made_up_run("unload"), "unload", publishes=publishes, states=states)


def test_an_unload_alone_has_no_new_version() -> None:
    summary = bench.analyse(unload())
    (reload,) = summary.reloads
    assert reload.what == "unload v1"
    assert (reload.old_version, reload.new_version) == (1, None)
    assert (reload.window.begin, reload.window.end) == pytest.approx((10, 11.3))
    assert reload.clean
    assert summary.reload is not None, "it counts, although there is no new version"
    assert summary.memory_peak == 180 << 20
    (reload,) = bench.analyse(unload(ended=False)).reloads
    assert not reload.happened
    assert "was not seen to end" in reload.incomplete[0]


def start() -> Run:
    """Nobody listens until 2 s; then answers take 50 ms until 3 s, and 1 ms after."""
    run = made_up_run("start")
    intended = run.requests["intended"]
    latency = np.select([intended < 2, intended < 3], [1e-4, 0.05], 0.001)
    code = np.where(intended < 2, Code.UNAVAILABLE, Code.OK).astype(np.uint8)
    code[-3:] = Code.INTERNAL
    run = dataclasses.replace(run, requests={**run.requests, "latency": latency, "code": code})
    settings = {"publish_at": None, "warm_seconds": 0.0}
    return changed(run, "start", settings=settings, publishes=(), states=())


def test_a_start_counts_from_the_exec_to_the_first_answers() -> None:
    summary = bench.analyse(start())
    assert summary.startup is not None
    assert summary.startup.answered == pytest.approx(2.05)
    assert summary.startup.within_slo == pytest.approx(3.001)
    assert summary.codes == {"OK": 3590 - 3, "INTERNAL": 3}, "what came before the first answer is no failure"
    assert summary.steady.begin == pytest.approx(3.001)
    rows = {row.label: row.cells for row in report.table(report.group([start()]))}
    assert rows["to the first answer"] == ["2.05 s"]
    assert rows["to the first answer within the SLO"] == ["3.00 s"]
    verdict = report.judge(report.group([start()]))
    assert (verdict.held, verdict.title) == ([None], "Started")
    assert "the first answer came after 2.05 s, and the first within 10 ms after 3.00 s" in verdict.sentence
    slow = start()
    slow.requests["latency"][:] = 1.0
    with pytest.raises(InvalidArgument, match="no answer within 10 ms"):
        bench.analyse(slow)


def test_every_event_is_told_in_its_own_words() -> None:
    for run, sentence, title in (
        (unload(), "While a version was unloaded, 99.9%", "boston under load, a version unloaded"),
        (storm(), "While 3 versions were swapped in a storm", "3 versions swapped in a storm"),
    ):
        scenarios = report.group([run])
        assert report.judge(scenarios).sentence.startswith(sentence)
        assert title in report.render_html(scenarios)
    storms = {row.label: row.cells for row in report.table(report.group([storm()]))}
    assert storms["versions published"] == ["3"]
    assert storms["versions that loaded"] == ["2"]
    assert storms["versions that answered"] == ["2"]
    assert "versions published" not in {row.label for row in report.table(report.group([unload()]))}


def test_a_gate_judges_any_event_and_compares_only_alike_ones() -> None:
    limits = Limits({"p99.9": 20.0})
    assert judge([storm()] * 5, limits).checks[0].outcome is GateOutcome.BROKEN
    with pytest.raises(FailedPrecondition, match=r"200/s constant storm.*another load|another load"):
        judge([storm()] * 5, limits, [changed(unload(), "unload", scenario="storm")] * 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"event": "restart"}, "unknown event 'restart': choose one of publish, publish-all, storm, unload"),
        ({"event": "storm"}, "a storm has 2 versions or more"),
        ({"event": "publish-all"}, "name the models"),
        ({"event": "unload", "published_models": ("rome",)}, "the model that is loaded with requests"),
    ],
)
def test_impossible_events(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        dataclasses.replace(SETTINGS, **fields)


def test_every_event_but_the_start_is_a_choice() -> None:
    assert set(EVENTS) - set(CHANGES) == {"start"}
