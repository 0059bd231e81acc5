"""The instrument against a server whose stalls are known exactly.

What is known is the server's own log, on the same clock, so that a slow machine changes
what happens but not whether it is reported.
"""

from __future__ import annotations

from typing import Any

import benchmark_scripts
import numpy as np
import pytest

from spikeless import bench
from spikeless.errors import Code

RATE = 200.0
HEIGHTS = (0.1, 0.4)

pytestmark = pytest.mark.xdist_group("instrument")  # one proof of each kind serves all of these tests

instrument = benchmark_scripts.fixture("instrument")


@pytest.fixture(scope="module", params=(1, 2), ids=("one process", "master and workers"))
def proof(instrument: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    plan = instrument.Plan(HEIGHTS, apart=1.0, swaps_apart=3.0, warm=1.0, named_ms=50.0)
    return instrument.prove(plan, RATE, request.param, tmp_path_factory.mktemp("proof"))


def test_every_request_that_was_hit_is_named(proof: Any) -> None:
    run = proof.run
    assert set(run.requests["code"]) == {Code.OK}
    assert len(run.requests["code"]) == len(run.facts.settings.schedule.offsets())
    assert sorted(run.requests["request"]) == list(range(len(run.requests["request"]))), "each sent once"
    # The instrument counts from before the request leaves until after it is answered.
    held = np.array([proof.log[number].seconds for number in run.requests["request"].tolist()])
    assert (run.requests["latency"] >= held).all()
    for seen in proof.seen:
        assert seen.missed == 0
        assert seen.held == 1 or seen.stall.everyone
    assert sum(seen.held for seen in proof.seen if seen.stall.everyone) > 10


def test_height_and_width_are_those_of_the_server(proof: Any) -> None:
    for seen in proof.seen:
        assert seen.height_ms >= seen.stall.seconds * 1e3, "a stall begins with a request"
        assert seen.reported_ms >= seen.height_ms
    summary = bench.analyse(proof.run)
    during = [seen for seen in proof.seen if seen.stall.swap is not None]
    assert len(summary.reloads) == len(during)
    for reload, seen in zip(summary.reloads, during, strict=True):
        # A generator that is this late may send what is held after the window.
        if reload.incomplete or proof.run.requests["lag"].max() > 0.1:
            continue
        assert reload.new_version == seen.stall.swap + 2
        assert reload.window.max >= seen.height_ms
        assert reload.over_slo >= seen.held
        assert reload.width_ms >= 0


def test_a_closed_loop_misses_most_of_a_stall(proof: Any) -> None:
    assert len(proof.closed) > 50
    whole = [seen for seen in proof.seen if seen.stall.everyone]
    for seen in whole:
        assert seen.closed_held <= 1, "it waits for the one that is held"
    assert sum(seen.held for seen in whole) > 10 * sum(seen.closed_held for seen in whole)
    for seen in proof.seen:
        if not seen.stall.everyone:
            assert seen.closed_held == 0, "others are not held with one request"


def test_what_is_close(instrument: Any) -> None:
    stall = instrument.Stall(1.0, 0.1, True)

    def seen(height: float, width: float) -> Any:
        return instrument.Seen(stall, 9, 0, 100.0, height, 5.0, width, 1, 100.0)

    assert seen(109.0, 5.9).close
    assert not seen(111.0, 5.0).close
    assert not seen(100.0, 6.2).close
