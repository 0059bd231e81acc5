"""The benchmark's parts on data whose right answer is known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_runs import SETTINGS, made_up_run, reload_of, with_failures, write_requests

from spikeless import bench
from spikeless.bench.analysis import percentile
from spikeless.bench.replayed import choose, read_requests
from spikeless.bench.run_file import ServerFacts, empty_samples
from spikeless.bench.watch import StateChange
from spikeless.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from spikeless.formats import tfrecord
from spikeless.formats.protos import predict_pb2, prediction_log_pb2
from spikeless.openloop.columns import RequestColumns
from spikeless.openloop.connection import parse_target
from spikeless.openloop.schedule import Schedule

# Schedule


def test_poisson_arrivals_have_the_rate_and_its_spread() -> None:
    offsets = Schedule(rate=1000, seconds=100).offsets()
    assert abs(len(offsets) - 100_000) < 5 * 100_000**0.5
    gaps = np.diff(offsets)
    assert (gaps >= 0).all()
    assert offsets[0] >= 0
    assert offsets[-1] < 100
    # The gaps of a Poisson process are exponential: mean and standard deviation are
    # equal.
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.05)


def test_schedules_repeat_with_their_seed() -> None:
    assert np.array_equal(Schedule(50, 10, seed=3).offsets(), Schedule(50, 10, seed=3).offsets())
    assert not np.array_equal(
        Schedule(50, 10, seed=3).offsets()[:20], Schedule(50, 10, seed=4).offsets()[:20]
    )


def test_bursts_have_the_mean_rate_and_are_five_times_denser() -> None:
    offsets = Schedule(rate=1000, seconds=50, arrivals="bursts").offsets()
    assert (np.diff(offsets) >= 0).all()
    assert abs(len(offsets) - 50_000) < 5 * 50_000**0.5
    in_burst = np.count_nonzero(offsets % 1 < 0.1)
    assert in_burst / len(offsets) == pytest.approx(0.5, abs=0.02)
    part = Schedule(rate=1000, seconds=0.05, arrivals="bursts").offsets()
    assert len(part) == pytest.approx(250, abs=80)
    assert part.max() < 0.05


def test_constant_arrivals() -> None:
    assert Schedule(4, 1.5, "constant").offsets().tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 0}, "must be positive"),
        ({"rate": float("nan")}, "must be positive"),
        ({"seconds": -1}, "must be positive"),
        ({"rate": 1e9, "seconds": 1e9}, "more than"),
        ({"arrivals": "waves"}, "choose one of poisson, constant, bursts"),
    ],
)
def test_impossible_schedules(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Schedule(**{"rate": 1, "seconds": 1, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warm_seconds": 11}, "no steady window"),
        ({"publish_at": 21}, "no steady window"),
        ({"processes": 0}, "1 process or more"),
        ({"slo_ms": 0}, "SLO must be positive"),
        ({"published_models": ("boston",)}, "boston is the model that is loaded"),
    ],
)
def test_impossible_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        dataclasses.replace(SETTINGS, **fields)


@pytest.mark.parametrize("target", ["", "8500", "localhost", "http://127.0.0.1:8500", "host:port"])
def test_what_is_no_address(target: str) -> None:
    with pytest.raises(InvalidArgument, match="give host:port"):
        parse_target(target)


# Columns


def test_latency_counts_from_the_intended_start() -> None:
    columns = RequestColumns(np.array([0.0, 1.0, 2.0]), np.array([0, 1, 0]))
    columns.sent(1, 1.5)
    columns.answered(1, 1.75, code=0, version=9)
    ended = columns.ended()
    assert ended["intended"].tolist() == [1.0], "requests without an end are left out"
    assert ended["lag"].tolist() == [0.5]
    assert ended["latency"].tolist() == [0.75]
    assert ended["version"].tolist() == [9]
    assert ended["request"].tolist() == [1]


def test_a_stall_delays_every_request_that_was_due() -> None:
    """Coordinated omission: a client that waits sees one slow request; users 120."""
    intended = Schedule(1000, 10, "constant").offsets()
    columns = RequestColumns(intended, np.zeros(len(intended)))
    stall = (5.0, 5.12)
    for index, start in enumerate(intended):
        columns.sent(index, start)
        answer = stall[1] if stall[0] <= start < stall[1] else start + 0.0005
        columns.answered(index, answer, 0)
    open_loop = columns.ended()["latency"]

    closed_loop, now = [], 0.0
    while now < 10:
        end = max(now + 0.001, stall[1]) if stall[0] <= now < stall[1] else now + 0.001
        closed_loop.append(end - now)
        now = end

    assert np.count_nonzero(open_loop > 0.0015) == 119
    assert np.count_nonzero(np.array(closed_loop) > 0.002) == 1
    assert percentile(open_loop, 0.99) > 0.019
    assert percentile(np.array(closed_loop), 0.99) < 0.002


# Percentiles and windows


def test_percentiles_are_values_that_were_measured() -> None:
    values = np.arange(1.0, 1001.0, dtype=np.float64)
    assert [percentile(values, share) for share in (0.5, 0.99, 0.999, 1.0)] == [500, 990, 999, 1000]
    assert percentile(np.array([7.0]), 0.999) == 7
    assert np.isnan(percentile(np.array([]), 0.5))


def test_a_swap_without_a_spike() -> None:
    summary = bench.analyse(made_up_run())
    assert (summary.steady.begin, summary.steady.end) == (2, 10)
    assert summary.steady.requests == 1600
    assert summary.steady.max == pytest.approx(1), "the slow start is not in the steady window"
    assert (reload_of(summary).begin, reload_of(summary).end) == pytest.approx((10, 12.4))
    assert reload_of(summary).requests == 480
    assert summary.ratio == pytest.approx(1)
    assert (summary.width_ms, summary.over_slo) == (0, 0)
    assert (summary.old_version, summary.new_version) == (1, 2)
    assert summary.first_ms == pytest.approx(1)
    assert summary.swap_seconds == pytest.approx(1.2)
    assert summary.served == {1: 2240, 2: 1760}
    assert summary.codes == {"OK": 4000}
    assert summary.failed == 0
    assert (summary.memory_before, summary.memory_peak, summary.memory_after) == (
        100 << 20,
        180 << 20,
        110 << 20,
    )
    assert not summary.steady.contaminated
    assert not reload_of(summary).contaminated


def test_the_spike_has_height_and_width() -> None:
    summary = bench.analyse(made_up_run("warmup", 100))
    assert summary.height_ms == pytest.approx(101)
    assert summary.first_ms == pytest.approx(101)
    # Requests are 5 ms apart and over the SLO of 10 ms while more than 9 ms of the
    # stall are left.
    assert summary.over_slo == 19
    assert summary.width_ms == pytest.approx(90)
    assert summary.ratio == pytest.approx(101)
    assert summary.steady.max == pytest.approx(1)


def test_failures_count_by_code() -> None:
    summary = bench.analyse(with_failures(made_up_run(), 3))
    assert summary.codes == {"OK": 3997, "UNAVAILABLE": 3}
    assert summary.failed == 3
    assert summary.steady.failed == 3
    assert reload_of(summary).failed == 0


def test_without_publishing_all_is_steady() -> None:
    summary = bench.analyse(made_up_run(publishes=(), states=()))
    assert summary.reload is None
    assert summary.ratio is None
    assert summary.steady.end == 20
    assert summary.memory_before == 110 << 20


def test_an_old_version_that_stays_is_noted() -> None:
    states = (StateChange(-1.0, 1, "AVAILABLE"), StateChange(11.2, 2, "AVAILABLE"))
    summary = bench.analyse(made_up_run(states=states))
    assert reload_of(summary).end == 20
    assert any("was not seen to end" in note for note in summary.notes)


def test_a_version_that_is_no_longer_listed_has_ended() -> None:
    states = (
        StateChange(-1.0, 1, "AVAILABLE"),
        StateChange(11.2, 2, "AVAILABLE"),
        StateChange(11.5, 1, "GONE"),
    )
    assert reload_of(bench.analyse(made_up_run(states=states))).end == pytest.approx(12.5)


def test_a_version_that_never_came_is_noted() -> None:
    summary = bench.analyse(made_up_run(states=(StateChange(-1.0, 1, "AVAILABLE"),)))
    assert summary.new_version is None
    assert any("no new version" in note for note in summary.notes)
    assert (summary.reload, summary.width_ms, summary.over_slo, summary.memory_peak) == (None, None, 0, None)


def test_contaminated_windows_are_named() -> None:
    run = made_up_run()
    late = {**run.requests, "lag": np.where(run.requests["intended"] < 10, 0.006, 0.0)}
    summary = bench.analyse(dataclasses.replace(run, requests=late))
    assert "left more than 5 ms late" in summary.steady.contaminated[0]
    assert not reload_of(summary).contaminated

    stolen = {**run.samples, "cpu_steal": run.samples["cpu_total"] // 20}
    summary = bench.analyse(dataclasses.replace(run, samples=stolen))
    assert "the hypervisor took" in summary.steady.contaminated[0]
    assert reload_of(summary).steal == pytest.approx(0.05, abs=0.01)


def test_a_run_without_steady_requests() -> None:
    run = made_up_run()
    late = {name: values[run.requests["intended"] >= 15] for name, values in run.requests.items()}
    with pytest.raises(InvalidArgument, match="no request in its steady window"):
        bench.analyse(dataclasses.replace(run, requests=late))


def test_reloads_of_another_model_have_its_states() -> None:
    run = made_up_run("others", 100)
    (publish,) = run.facts.publishes
    publishes = [dataclasses.replace(publish, model="other")]
    states = [*run.facts.states]
    # The loaded model has the same versions, and nothing happens to it.
    states = [dataclasses.replace(change, model="other") for change in states]
    states.append(StateChange(-1.0, 1, "AVAILABLE"))
    run = dataclasses.replace(run, facts=dataclasses.replace(run.facts, publishes=publishes, states=states))
    summary = bench.analyse(run)
    (reload,) = summary.reloads
    assert (reload.old_version, reload.new_version) == (1, 2)
    assert (reload.window.begin, reload.window.end) == pytest.approx((10, 12.4))
    assert reload.first_ms is None, "requests are answered by the other model"
    assert reload.window.max == pytest.approx(101)
    mine = dataclasses.replace(run.facts, publishes=[publish])
    assert bench.analyse(dataclasses.replace(run, facts=mine)).reloads[0].incomplete


# Raw results


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    run = with_failures(made_up_run("warmup", 30, notes=("a note",)), 2)
    run.save(tmp_path / "run.npz")
    again = bench.read_run(tmp_path / "run.npz")
    assert json.dumps(dataclasses.asdict(again.facts)) == json.dumps(dataclasses.asdict(run.facts))
    for name, values in run.requests.items():
        assert np.array_equal(again.requests[name], values), name
    for name, values in run.samples.items():
        assert np.array_equal(again.samples[name], values), name
    assert bench.analyse(again) == bench.analyse(run)
    assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]


def test_a_result_describes_itself(tmp_path: Path) -> None:
    made_up_run().save(tmp_path / "run.npz")
    with np.load(tmp_path / "run.npz", allow_pickle=False) as file:
        metadata = json.loads(file["metadata"].tobytes())
    assert metadata["schema"] == 2
    assert metadata["server"]["allocator_proof"] == "libjemalloc.so.2"
    assert metadata["settings"]["rate"] == 200
    assert metadata["machine"]["cpu"] == "a processor"


def test_unreadable_results(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="cannot be read"):
        bench.read_run(tmp_path / "nowhere.npz")
    garbage = tmp_path / "garbage.npz"
    garbage.write_bytes(b"no zip")
    with pytest.raises(DataLoss, match=r"garbage.npz is no raw result .*: give a \*.npz file that it wrote"):
        bench.read_run(garbage)
    made_up_run().save(tmp_path / "run.npz")
    whole = (tmp_path / "run.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataLoss, match="no raw result"):
        bench.read_run(tmp_path / "half.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(DataLoss, match="no raw result"):
        bench.read_run(tmp_path / "other.npz")
    with np.load(tmp_path / "run.npz") as file:
        arrays = dict(file)
    newer = arrays["metadata"].tobytes().replace(b'"schema": 2', b'"schema": 9')
    np.savez(tmp_path / "newer.npz", **arrays | {"metadata": np.frombuffer(newer, np.uint8)})
    with pytest.raises(InvalidArgument, match="schema 9"):
        bench.read_run(tmp_path / "newer.npz")
    del arrays["latency"]
    np.savez(tmp_path / "incomplete.npz", **arrays)
    with pytest.raises(DataLoss, match="incomplete"):
        bench.read_run(tmp_path / "incomplete.npz")


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("metadata", np.full(100_000, ord("["), np.uint8)),
        ("metadata", np.frombuffer(b'{"schema": 2, "settings": []}', np.uint8)),
        ("latency", np.array("text")),
        ("latency", np.array(1.0)),
        ("latency", np.ones((3, 3))),
    ],
)
def test_results_of_strange_content(tmp_path: Path, column: str, values: np.ndarray[Any, Any]) -> None:
    made_up_run().save(tmp_path / "run.npz")
    with np.load(tmp_path / "run.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "strange.npz", **arrays | {column: values})
    with pytest.raises(DataLoss, match=r"strange\.npz"):
        bench.read_run(tmp_path / "strange.npz")


def test_workers_are_merged_by_intended_start() -> None:
    run = made_up_run()
    parts = [
        dataclasses.replace(
            run,
            requests={name: values[index::3] for name, values in run.requests.items()},
            samples=empty_samples(),
        )
        for index in range(3)
    ]
    merged = bench.merge(parts[::-1])
    for name, values in run.requests.items():
        assert np.array_equal(merged.requests[name], values), name
    with pytest.raises(InvalidArgument, match="different runs"):
        bench.merge([run, made_up_run(started="2026-01-02T04:00:00.000+00:00")])


def test_result_paths_are_file_names() -> None:
    run = made_up_run("no warmup / glibc")
    assert bench.result_path(Path("raw"), run) == Path("raw/no-warmup-glibc-20260102T030405Z.npz")


# What a server takes at once


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("tensorflow_model_server", "--port=1", "--grpc_max_threads=8"), "takes 8 calls at once"),
        (("spikeless", "serve", "--grpc_max_threads", "16"), "takes 16 calls at once"),
        (("spikeless", "serve"), "calls at once and refuses more"),
        ((), "flags of 127.0.0.1:8500 cannot be seen"),
    ],
)
def test_a_server_that_may_refuse_load_is_named(command: tuple[str, ...], message: str) -> None:
    said = bench.refusal(ServerFacts("127.0.0.1:8500", command=command), rate=10_000)
    assert said is not None
    assert message in said
    assert "--grpc_max_threads=4096" in said


def test_the_servers_that_are_started_take_the_load() -> None:
    command = ("spikeless", "serve", "--grpc_max_threads=8", *bench.SERVER_FLAGS)
    assert bench.refusal(ServerFacts("127.0.0.1:8500", command=command), rate=1000) is None


# Requests


def test_requests_are_addressed_to_the_model_and_follow_its_versions(tmp_path: Path) -> None:
    requests = read_requests(write_requests(tmp_path / "w", 1, 8), "boston")
    assert [request.kind.name for request in requests] == ["Predict", "Predict"]
    message = predict_pb2.PredictRequest.FromString(requests[1].message)
    assert message.model_spec.name == "boston"
    assert message.model_spec.WhichOneof("version_choice") is None
    assert [dim.size for dim in message.inputs["x"].tensor_shape.dim] == [8, 4]
    answer = predict_pb2.PredictResponse()
    answer.model_spec.version.value = 12
    assert requests[0].kind.served_version(answer.SerializeToString()) == 12


def test_requests_are_drawn_by_their_batch_size(tmp_path: Path) -> None:
    requests = read_requests(write_requests(tmp_path / "w", 1, 8, 8, 32), "boston")
    assert [request.rows for request in requests] == [1, 8, 8, 32]
    assert choose(requests, 6, "", 1).tolist() == [0, 1, 2, 3, 0, 1]
    numbers = choose(requests, 10_000, "1:60,8:40", 1)
    counts = np.bincount(numbers, minlength=4)
    assert counts[0] == pytest.approx(6000, abs=300)
    assert abs(counts[1] - counts[2]) <= 1, "requests of one size take turns"
    assert counts[3] == 0
    assert np.array_equal(numbers, choose(requests, 10_000, "1:60,8:40", 1))
    with pytest.raises(InvalidArgument, match="no request has batch size 4, only 1, 8, 32"):
        choose(requests, 10, "1:1,4:1", 1)


@pytest.mark.parametrize("text", ["1", "1:0", "0:1", "1:1,", "a:b", "1:-1", "1:nan"])
def test_what_is_no_distribution(text: str) -> None:
    with pytest.raises(InvalidArgument, match="is no distribution of batch sizes"):
        dataclasses.replace(SETTINGS, batch_sizes=text)


def test_every_kind_of_request_is_replayed(tmp_path: Path) -> None:
    records = []
    for kind in ("classify_log", "regress_log", "multi_inference_log"):
        log = prediction_log_pb2.PredictionLog()
        getattr(log, kind).request.SetInParent()
        records.append(log.SerializeToString())
    tfrecord.write(tmp_path / "w", records)
    methods = [request.kind.name for request in read_requests(tmp_path / "w", "boston")]
    assert methods == ["Classify", "Regress", "MultiInference"]


def test_unusable_requests(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_requests(tmp_path / "nowhere", "boston")
    tfrecord.write(tmp_path / "empty", [])
    with pytest.raises(InvalidArgument, match="holds no requests"):
        read_requests(tmp_path / "empty", "boston")
    tfrecord.write(tmp_path / "text", [b"\xff\xff\xff"])
    with pytest.raises(InvalidArgument, match=r"record 1 is no PredictionLog"):
        read_requests(tmp_path / "text", "boston")
    log = prediction_log_pb2.PredictionLog()
    log.session_run_log.request.SetInParent()
    tfrecord.write(tmp_path / "session", [log.SerializeToString()])
    with pytest.raises(InvalidArgument, match=r"record 1 is of kind session_run_log: only predict_log"):
        read_requests(tmp_path / "session", "boston")


def test_a_publisher_command_that_fails() -> None:
    assert bench.publisher("echo 'version 2'")() == "version 2"
    with pytest.raises(FailedPrecondition, match="exited with 1"):
        bench.publisher("false")()
    with pytest.raises(FailedPrecondition, match="cannot be run"):
        bench.publisher("/nowhere/publish")()
