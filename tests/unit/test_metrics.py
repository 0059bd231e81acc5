"""What Prometheus reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spikeless.engine.loader import ModelLoader
from spikeless.engine.metrics import DEFAULT_PATH, Metrics, read_monitoring_path
from spikeless.errors import Code, DataLoss, InvalidArgument, NotFound, SpikelessError
from spikeless.formats.states import State, VersionStatus


def test_the_path_comes_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "monitoring.config"
    for text, expected in {
        'prometheus_config { enable: true, path: "/here" }': "/here",
        "prometheus_config { enable: true }": DEFAULT_PATH,
        'prometheus_config { path: "/here" }': "",
        "": "",
    }.items():
        file.write_text(text)
        assert read_monitoring_path(file) == expected
    file.write_text("prometheus { }")
    with pytest.raises(InvalidArgument, match="Invalid protobuf file"):
        read_monitoring_path(file)
    with pytest.raises(NotFound, match="cannot read"):
        read_monitoring_path(tmp_path / "nothing")


def lines(metrics: Metrics) -> set[str]:
    return set(metrics.page().decode().splitlines())


def test_calls() -> None:
    metrics = Metrics()
    metrics.started("GRPC")
    assert 'spikeless_calls_in_progress{entrypoint="GRPC"} 1.0' in lines(metrics)
    metrics.ended("boston", 3, "Predict", "GRPC", Code.OK, 0.0005)
    metrics.started("GRPC")
    metrics.ended("boston", 3, "Predict", "GRPC", Code.INVALID_ARGUMENT, 0.1)
    metrics.started("GRPC")
    metrics.ended("", None, "Predict", "GRPC", Code.NOT_FOUND, 0.1)
    metrics.examples("boston", 5)
    metrics.ran("boston", "Predict", 0.0004)
    labels = 'API="Predict",entrypoint="GRPC"'
    version = f'{labels},model_name="boston",status="OK",version="3"'
    expected = {
        ':tensorflow:serving:request_count{model_name="boston",status="OK"} 1.0',
        ':tensorflow:serving:request_count{model_name="boston",status="INVALID_ARGUMENT"} 1.0',
        ':tensorflow:serving:request_count{model_name="",status="NOT_FOUND"} 1.0',
        # Microseconds, and only of calls that succeeded.
        f':tensorflow:serving:request_latency_sum{{{labels},model_name="boston"}} 500.0',
        f':tensorflow:serving:request_latency_count{{{labels},model_name="boston"}} 1.0',
        # The bounds are written with six digits, and hold what is not above them.
        f':tensorflow:serving:request_latency_bucket{{{labels},le="340.122",model_name="boston"}} 0.0',
        f':tensorflow:serving:request_latency_bucket{{{labels},le="612.22",model_name="boston"}} 1.0',
        f':tensorflow:serving:request_latency_bucket{{{labels},le="+Inf",model_name="boston"}} 1.0',
        ':tensorflow:serving:runtime_latency_sum{API="Predict",model_name="boston",runtime="TF1"} 400.0',
        ':tensorflow:serving:request_example_count_total{model="boston"} 5.0',
        f"spikeless_call_latency_seconds_sum{{{version}}} 0.0005",
        'spikeless_calls_in_progress{entrypoint="GRPC"} 0.0',
    }
    assert expected <= lines(metrics), expected - lines(metrics)
    assert not any("_created" in line for line in lines(metrics))


def test_versions_come_and_go() -> None:
    metrics = Metrics()
    metrics.version_changed("boston", VersionStatus(1, State.LOADING))
    labels = 'model_name="boston",state="{}",version="1"'
    assert f"spikeless_version_state{{{labels.format('LOADING')}}} 1.0" in lines(metrics)
    path = Path("/models/boston/1")
    metrics.load_failed(path)
    metrics.restored("boston", 1, path, 0.25)
    metrics.warmed("boston", 1, path, 0.5, 7)
    metrics.version_changed("boston", VersionStatus(1, State.AVAILABLE))
    metrics.started("REST")
    metrics.ended("boston", 1, "Predict", "REST", Code.OK, 0.1)
    one = 'model_name="boston",version="1"'
    expected = {
        f"spikeless_version_state{{{labels.format('LOADING')}}} 0.0",
        f"spikeless_version_state{{{labels.format('AVAILABLE')}}} 1.0",
        f"spikeless_version_load_seconds{{{one}}} 0.25",
        f"spikeless_version_warmup_seconds{{{one}}} 0.5",
        f"spikeless_version_warmup_records{{{one}}} 7.0",
        ':tensorflow:cc:saved_model:load_attempt_count{model_path="/models/boston/1",status="fail"} 1.0',
        ':tensorflow:cc:saved_model:load_attempt_count{model_path="/models/boston/1",status="success"} 1.0',
        ':tensorflow:cc:saved_model:load_latency{model_path="/models/boston/1"} 250000.0',
        ':tensorflow:serving:model_warmup_latency_sum{model_path="/models/boston/1",status="OK"} 500000.0',
    }
    assert expected <= lines(metrics), expected - lines(metrics)
    metrics.version_changed("boston", VersionStatus(1, State.END))
    gone = ('version="1"', "/models/boston/1")
    assert not any(text in line for line in lines(metrics) for text in gone), "its series are gone"
    metrics.version_changed("boston", VersionStatus(2, State.END, DataLoss("truncated")))
    assert 'spikeless_load_failures_total{model_name="boston",status="DATA_LOSS"} 1.0' in lines(metrics)


def test_loads_and_runs(saved_models: Path, tmp_path: Path) -> None:
    metrics = Metrics()
    loader = ModelLoader(observer=metrics)
    with pytest.raises(SpikelessError):
        loader("times", 2, tmp_path)
    path = saved_models / "times_one"
    model = loader("times", 1, path)
    try:
        model.predict_arrays("serving_default", {"x": np.ones(1, np.float32)})
    finally:
        model.close()
    expected = {
        f':tensorflow:cc:saved_model:load_attempt_count{{model_path="{tmp_path}",status="fail"}} 1.0',
        f':tensorflow:cc:saved_model:load_attempt_count{{model_path="{path}",status="success"}} 1.0',
        ':tensorflow:serving:runtime_latency_count{API="Predict",model_name="times",runtime="TF1"} 1.0',
        'spikeless_version_warmup_records{model_name="times",version="1"} 0.0',
    }
    assert expected <= lines(metrics), expected - lines(metrics)


def test_memory_is_that_of_the_process() -> None:
    (private,) = (line for line in lines(Metrics()) if line.startswith("spikeless_memory_private_bytes "))
    assert float(private.split()[1]) > 1e6
