"""Made-up benchmark runs, with exactly known latencies."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from spikeless.bench import Facts, Floor, Publish, Run, ServerFacts, Settings
from spikeless.bench.analysis import Reload, Summary, Window
from spikeless.bench.machine import Machine
from spikeless.bench.watch import StateChange
from spikeless.errors import Code
from spikeless.formats import tfrecord
from spikeless.formats.protos import prediction_log_pb2
from spikeless.formats.tensors import to_proto
from spikeless.openloop.columns import COLUMNS
from spikeless.repository import publishing

SETTINGS = Settings(
    "boston", "requests", rate=200, seconds=20, arrivals="constant", publish_at=10, warm_seconds=2
)
MACHINE = Machine("Debian 12", "Linux 6.1", "x86_64", "a processor", 2, 8 << 30, "3.11.7")


def made_up_run(scenario: str = "warmup", *spikes_ms: float, rate: float = 200, **facts: Any) -> Run:
    """A run with 20 s for each spike (one of 0 ms by default) at constant arrivals.

    Requests take 1 ms (the first 20 after the start 150 ms). In each 20 s the next
    version is published at 10 s and AVAILABLE at 11.2 s; the old one ends at 11.4 s.
    The server stalls for the spike's length from 11.2 s on, and every request that is
    due meanwhile waits for the stall's end.
    """
    spikes = spikes_ms or (0.0,)
    seconds = SETTINGS.seconds * len(spikes)
    settings = dataclasses.replace(
        SETTINGS, rate=rate, seconds=seconds, publishes=len(spikes), publish_every=SETTINGS.seconds
    )
    intended = settings.schedule.offsets()
    latency = np.full(len(intended), 0.001)
    latency[:20] = 0.15
    version = np.ones(len(intended))
    t = np.arange(0, seconds, 0.1)
    private = np.full(len(t), 100 << 20)
    states = [StateChange(-1.0, 1, "AVAILABLE")]
    publishes = []
    for old, (moment, spike) in enumerate(zip(settings.publish_moments, spikes, strict=True), start=1):
        stall, stall_end = moment + 1.2, moment + 1.2 + spike / 1e3
        waits = (intended >= stall) & (intended < stall_end)
        latency[waits] += stall_end - intended[waits]
        version[intended >= stall] = old + 1
        private[t >= moment] = 180 << 20
        private[t >= moment + 1.4] = 110 << 20
        publishes.append(Publish(moment, moment + 0.01, f"models/boston/{old + 1}"))
        states += [
            StateChange(moment + 0.9, old + 1, "LOADING"),
            StateChange(stall, old + 1, "AVAILABLE"),
            StateChange(moment + 1.3, old, "UNLOADING"),
            StateChange(moment + 1.4, old, "END"),
        ]
    columns = {
        "intended": intended,
        "lag": np.full(len(intended), 0.0001),
        "latency": latency,
        "code": np.zeros(len(intended)),
        "version": version,
        "request": np.arange(len(intended)) % 3,
    }
    samples: dict[str, Any] = {
        "t": t,
        "rss_anon": private,
        "rss_file": np.full(len(t), 300 << 20),
        "cpu_total": (t * 200).astype(np.int64),
        "cpu_steal": np.zeros(len(t), np.int64),
    }
    standard: dict[str, Any] = {
        "scenario": scenario,
        "started": "2026-01-02T03:04:05.678+00:00",
        "commit": "0123456789ab",
        "settings": settings,
        "machine": MACHINE,
        "server": ServerFacts(
            "127.0.0.1:8500", "embedded", "0.1.0", "jemalloc", "libjemalloc.so.2", ("serve",)
        ),
        "generator": ("locust",),
        "publishes": publishes,
        "states": states,
        "floor": Floor(200, 1000, 0.3, 0.6, 1.5, 1.7),
    }
    requests = {name: columns[name].astype(dtype) for name, dtype in COLUMNS.items()}
    return Run(Facts(**standard | facts), requests, samples)


def with_failures(run: Run, count: int) -> Run:
    """The same, with `count` requests before the publishing UNAVAILABLE."""
    requests = {name: values.copy() for name, values in run.requests.items()}
    requests["code"][1000 : 1000 + count] = Code.UNAVAILABLE
    requests["version"][1000 : 1000 + count] = 0
    return dataclasses.replace(run, requests=requests)


def write_requests(path: Path, *sizes: int, alias: str = "x", width: int = 4) -> Path:
    """A warmup file of Predict requests with float32 inputs of `sizes` rows."""
    records = []
    for rows in sizes:
        log = prediction_log_pb2.PredictionLog()
        spec = log.predict_log.request.model_spec
        spec.name, spec.version.value = "somebody", 7
        tensor = to_proto(np.ones((rows, width), np.float32))
        log.predict_log.request.inputs[alias].CopyFrom(tensor)
        records.append(log.SerializeToString())
    tfrecord.write(path, records)
    return path


def publish_boston(saved_model: Path, directory: Path) -> Path:
    """A new repository with version 1 of boston, which carries requests.

    What was published is in ``source`` beside it.
    """
    models, source = directory / "models", directory / "source"
    shutil.copytree(saved_model, source)
    (source / "assets.extra").mkdir()
    write_requests(source / "assets.extra" / "tf_serving_warmup_requests", 1, 8)
    publishing.publish(source, models, "boston", gates=())
    return models


def reload_of(summary: Summary) -> Window:
    """The reload window of a run in which something was published."""
    assert summary.reload is not None
    return summary.reload


def control_of(reload: Reload) -> Window:
    """The control window of a reload that has one."""
    assert reload.control is not None
    return reload.control
