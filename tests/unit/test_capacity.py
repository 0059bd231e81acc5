"""The search for what a server can do, on servers whose capacity is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from bench_runs import made_up_run, with_failures

from spikeless.bench.capacity import FIRST_RATE, NARROW, Probe, bracket, judge_probe, within_slo
from spikeless.errors import FailedPrecondition


def probes(capacity: float) -> list[float]:
    """The rates that are tried on a server of this capacity; the result comes last."""
    tried: list[float] = []

    def probe(rate: float) -> Probe:
        tried.append(rate)
        return Probe(rate, 1.0 if rate <= capacity else 500.0, 0)

    found = bracket(probe, 10_000).rate
    return [*tried, found]


@pytest.mark.parametrize("capacity", [50, 70, 399, 400, 1234, 9_999])
def test_the_bracket_closes_around_the_capacity(capacity: float) -> None:
    *tried, found = probes(capacity)
    assert found <= capacity <= found * (1 + NARROW)
    assert tried[0] == FIRST_RATE
    assert len(tried) < 16
    assert max(tried) <= 10_000


def test_servers_without_a_capacity() -> None:
    with pytest.raises(
        FailedPrecondition, match=r"50/s did not keep up \(500.0 ms at the end\); give --rate"
    ):
        probes(10)
    with pytest.raises(FailedPrecondition, match="still keeps up with 10000/s"):
        probes(1e9)


def test_a_backlog_or_a_failure_is_not_kept_up_with() -> None:
    run = made_up_run()
    assert judge_probe(run).backlog_ms == pytest.approx(1.0)
    assert judge_probe(run).kept_up
    growing = np.maximum(0.001, run.requests["intended"] / 20)
    behind = dataclasses.replace(run, requests={**run.requests, "latency": growing})
    assert not judge_probe(behind).kept_up
    assert "200/s did not keep up" in str(judge_probe(behind))
    failing = judge_probe(with_failures(run, 2))
    assert not failing.kept_up
    assert "2 failed" in str(failing)


def test_an_slo_is_a_limit_of_p99() -> None:
    run = made_up_run("peer", 60.0)  # The spike hits 12 of 4,000 requests, 20 begin slowly.
    assert within_slo(151.0)(run).kept_up
    latency = run.requests["latency"].copy()
    latency[2000:2041] = 0.2
    slow = dataclasses.replace(run, requests={**run.requests, "latency": latency})
    assert within_slo(200.0)(slow).kept_up
    assert not within_slo(199.0)(slow).kept_up
    assert within_slo(199.0)(slow).p99_ms == pytest.approx(200)
    assert not within_slo(1e6)(with_failures(run, 1)).kept_up


def test_a_wider_bracket_takes_fewer_probes() -> None:
    def probe(rate: float) -> Probe:
        return Probe(rate, 1.0 if rate <= 390 else 500.0, 0)

    rough, fine = bracket(probe, 10_000, narrow=0.5), bracket(probe, 10_000)
    assert len(rough.probes) < len(fine.probes)
    assert rough.rate <= 390 <= rough.rate * 1.5
