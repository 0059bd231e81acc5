"""What makes a candidate worse than the stable version: measurements and metrics."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from spikeless.errors import InvalidArgument, Unavailable
from spikeless.repository.journal import Latencies
from spikeless.rollout import server_metrics
from spikeless.rollout.probes import Comparison, ComparisonSettings, Measured
from spikeless.rollout.server_metrics import Traffic
from spikeless.rollout.soak import SoakSettings


def measured(latencies: Sequence[float], errors: int = 0) -> Measured:
    return Measured(len(latencies) + errors, errors, "first error" if errors else "", list(latencies))


def test_percentiles_are_those_of_the_nearest_rank() -> None:
    some = measured([number / 1000 for number in range(1, 101)])
    assert (some.percentile(0.5), some.percentile(0.99), some.percentile(1.0)) == (0.05, 0.099, 0.1)
    assert math.isnan(measured([]).percentile(0.5))
    assert measured([]).summary().p99_ms is None
    assert some.summary() == Latencies(requests=100, errors=0, p50_ms=50.0, p99_ms=99.0)
    assert str(measured([0.001], 1)) == "1 errors in 2 requests, p50 1.0 ms, p99 1.0 ms"


def test_a_candidate_may_not_fail_more_often_than_the_stable_version() -> None:
    good, bad = measured([0.001] * 10), measured([0.001] * 9, 1)
    assert Comparison(good, good).error_problem() == ""
    assert Comparison(bad, bad).error_problem() == ""
    assert Comparison(good, bad).error_problem() == ""
    problem = Comparison(bad, good).error_problem()
    assert problem == "1 of 10 requests failed, 0 of 10 with the stable version: first error"


def test_a_candidate_may_not_be_slower_than_the_limits_allow() -> None:
    limits = ComparisonSettings(max_p99_ratio=1.5, slack=0.005)
    for own, other, slow in ((0.010, 0.010, False), (0.0149, 0.010, False), (0.016, 0.010, True)):
        problem = Comparison(measured([own]), measured([other])).latency_problem(limits)
        assert bool(problem) == slow, (own, other)
    assert Comparison(measured([0.0059]), measured([0.001])).latency_problem(limits) == "", "within the slack"
    problem = Comparison(measured([0.2]), measured([0.1])).latency_problem(limits)
    assert "p99 is 200.0 ms, with the stable version 100.0 ms; the limit is 150.0 ms" in problem


PAGE = """\
# TYPE :tensorflow:serving:request_count counter
:tensorflow:serving:request_count{model_name="m",status="OK"} 90
:tensorflow:serving:request_count{model_name="m",status="INTERNAL"} 10
:tensorflow:serving:request_count{model_name="m-canary",status="OK"} 5
# TYPE :tensorflow:serving:request_latency histogram
:tensorflow:serving:request_latency_bucket{model_name="m",API="Predict",entrypoint="GRPC",le="10"} 1
:tensorflow:serving:request_latency_bucket{model_name="m",API="Predict",entrypoint="GRPC",le="+Inf"} 90
:tensorflow:serving:request_latency_sum{model_name="m",API="Predict",entrypoint="GRPC"} 9e6
:tensorflow:serving:request_latency_count{model_name="m",API="Predict",entrypoint="GRPC"} 90
"""


def test_metrics_are_read_by_their_names() -> None:
    found = server_metrics.parse(PAGE, "here")
    assert found == {"m": Traffic(100, 10, {10.0: 1, math.inf: 90}), "m-canary": Traffic(5, 0)}
    assert found["m"].error_rate == 0.1
    later = Traffic(150, 12)
    assert later.since(found["m"]) == Traffic(50, 2)
    assert found["m"].since(later) == found["m"], "the server was restarted: all of it is new"
    assert Traffic().error_rate == 0.0
    with pytest.raises(InvalidArgument, match="here cannot be read as metrics"):
        server_metrics.parse('a{b="c} 1', "here")


def test_metrics_are_fetched_or_their_absence_explained() -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PAGE.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert server_metrics.read(f"http://127.0.0.1:{server.server_port}/")["m"].requests == 100
        server.shutdown()
    with pytest.raises(Unavailable, match="--monitoring_config_file"):
        server_metrics.read("http://127.0.0.1:1/")
    with pytest.raises(InvalidArgument, match="no http address"):
        server_metrics.read("file:///etc/passwd")
    with pytest.raises(InvalidArgument, match="--metrics"):
        SoakSettings(metrics="127.0.0.1:8501")


def test_latencies_come_from_the_buckets() -> None:
    name = ":tensorflow:serving:request_latency"
    lines = [f"# TYPE {name} histogram"]
    for entry, counts in (("Predict", (90, 99, 100)), ("REST", (0, 1, 100))):
        lines += [
            f'{name}_bucket{{model_name="m",entrypoint="{entry}",le="{bound}"}} {count}'
            for bound, count in zip(("1000", "5000", "+Inf"), counts, strict=True)
        ]
    count = ":tensorflow:serving:request_count"
    lines += [f"# TYPE {count} counter", f'{count}{{model_name="m",status="OK"}} 200']
    traffic = server_metrics.parse("\n".join(lines) + "\n", "a page")["m"]
    assert traffic.percentile_ms(0.45) == 1
    assert traffic.percentile_ms(0.5) == 5
    assert traffic.percentile_ms(0.99) == float("inf")
    assert Traffic().percentile_ms(0.99) is None
    assert traffic.since(traffic).percentile_ms(0.99) is None
    earlier = Traffic(100, buckets={1000.0: 0.0, 5000.0: 1.0, float("inf"): 100.0})
    assert traffic.since(earlier).percentile_ms(0.9) == 1
