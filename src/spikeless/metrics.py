"""Metrics for Prometheus: TensorFlow Serving's, by its names, and those that it does not have.

In: the calls, the states of versions and the loads, as they happen. Out: the text that Prometheus scrapes,
below the REST port, at the path of ``--monitoring_config_file``:

    prometheus_config { enable: true, path: "/monitoring/prometheus/metrics" }

TensorFlow Serving's metrics, in microseconds, have no version among their labels:

    :tensorflow:serving:request_count                 calls, by model_name, status (OK, NOT_FOUND, ...)
    :tensorflow:serving:request_latency               of calls that succeeded, by model_name, API, entrypoint
    :tensorflow:serving:request_example_counts        examples in a Classify or Regress call, by model
    :tensorflow:serving:request_example_count_total   the same, added up

Those that begin with ``spikeless_`` are this engine's own, in seconds and bytes:

    spikeless_call_latency_seconds     every call, by model_name, version, API, entrypoint, status
    spikeless_calls_in_progress        by entrypoint (GRPC, REST)
    spikeless_version_state            1 for the state that a version is in, by model_name, version, state
    spikeless_version_load_seconds     how long the version took to restore
    spikeless_version_warmup_seconds   how long its warmup took
    spikeless_version_warmup_records   how many records it had
    spikeless_load_failures_total      versions that could not be loaded, by model_name, status
    spikeless_memory_private_bytes     what counts against a container's limit (RssAnon)
    spikeless_memory_mapped_bytes      pages of files, which the kernel can take back (RssFile)

What to ask of them, in PromQL:

    # requests a second, by status
    sum by (model_name, status) (rate(:tensorflow:serving:request_count[1m]))
    # p99 in milliseconds, as for TensorFlow Serving
    histogram_quantile(0.99, sum by (le, model_name)
        (rate(:tensorflow:serving:request_latency_bucket[1m]))) / 1000
    # p99 of each version, across a swap
    histogram_quantile(0.99, sum by (le, version)
        (rate(spikeless_call_latency_seconds_bucket{model_name="boston"}[1m])))
    # which version is being served, and how much of the traffic it takes
    spikeless_version_state{state="AVAILABLE"} == 1
    sum by (version) (rate(spikeless_call_latency_seconds_count{model_name="boston"}[1m]))
    # alert: a version could not be loaded, or is loading for more than five minutes
    increase(spikeless_load_failures_total[10m]) > 0
    min_over_time(spikeless_version_state{state="LOADING"}[5m]) == 1
    # private memory against the limit, during a swap
    max_over_time(spikeless_memory_private_bytes[10m])
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from spikeless.errors import Code
from spikeless.manager import State, VersionStatus
from spikeless.protos import read_text_proto

DEFAULT_PATH = "/monitoring/prometheus/metrics"

#: TensorFlow Serving's buckets: ``Buckets::Exponential(10, 1.8, 33)`` microseconds, and of examples.
MICROSECONDS = tuple(10 * 1.8**power for power in range(33))
EXAMPLES = tuple(2.0**power for power in range(15))
#: Fine where calls usually are, from 0.1 ms to 10 s.
SECONDS = (
    *(0.0001, 0.0002, 0.0003, 0.0004, 0.0005, 0.0007, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.007),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0),
)


def read_monitoring_path(file: str | os.PathLike[str]) -> str:
    """The path that a ``MonitoringConfig`` in text format gives the metrics; empty when it disables them."""
    config: Any = read_text_proto(file, _monitoring_config()())
    prometheus = config.prometheus_config
    return str(prometheus.path or DEFAULT_PATH) if prometheus.enable else ""


def _monitoring_config() -> type[Message]:
    """The message of ``monitoring_config.proto``, which TensorFlow Serving's Python package leaves out."""
    file = descriptor_pb2.FileDescriptorProto(
        name="spikeless/monitoring_config.proto", package="spikeless", syntax="proto3"
    )
    prometheus = file.message_type.add(name="PrometheusConfig")
    field = descriptor_pb2.FieldDescriptorProto
    prometheus.field.add(name="enable", number=1, type=field.TYPE_BOOL, label=field.LABEL_OPTIONAL)
    prometheus.field.add(name="path", number=2, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    file.message_type.add(name="MonitoringConfig").field.add(
        name="prometheus_config",
        number=1,
        type=field.TYPE_MESSAGE,
        type_name=".spikeless.PrometheusConfig",
        label=field.LABEL_OPTIONAL,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("spikeless.MonitoringConfig"))


class Metrics:
    """Everything that one server counts; a registry of its own, so that servers do not mix."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        labels = ["model_name", "version", "API", "entrypoint", "status"]
        # The client library ends the names of its counters in _total, which this one must not have.
        self._requests = _PlainCounter(
            ":tensorflow:serving:request_count",
            "The total number of requests.",
            ("model_name", "status"),
            self._registry,
        )
        self._latency = Histogram(
            ":tensorflow:serving:request_latency",
            "Distribution of wall time (in microseconds) for TensorFlow Serving requests.",
            ["model_name", "API", "entrypoint"],
            buckets=MICROSECONDS,
            registry=self._registry,
        )
        self._example_counts = Histogram(
            ":tensorflow:serving:request_example_counts",
            "The number of tensorflow.Examples per request.",
            ["model"],
            buckets=EXAMPLES,
            registry=self._registry,
        )
        self._examples = Counter(
            ":tensorflow:serving:request_example_count",
            "The total number of tensorflow.Examples.",
            ["model"],
            registry=self._registry,
        )
        self._calls = Histogram(
            "spikeless_call_latency_seconds",
            "Wall time of calls, by version.",
            labels,
            buckets=SECONDS,
            registry=self._registry,
        )
        self._in_progress = Gauge(
            "spikeless_calls_in_progress", "Calls being answered.", ["entrypoint"], registry=self._registry
        )
        version = ["model_name", "version"]
        self._states = Gauge(
            "spikeless_version_state",
            "1 for the state that a version is in.",
            [*version, "state"],
            registry=self._registry,
        )
        self._load_seconds = Gauge(
            "spikeless_version_load_seconds", "Time to restore a version.", version, registry=self._registry
        )
        self._warmup_seconds = Gauge(
            "spikeless_version_warmup_seconds", "Time to warm a version up.", version, registry=self._registry
        )
        self._warmup_records = Gauge(
            "spikeless_version_warmup_records", "Warmup records replayed.", version, registry=self._registry
        )
        self._load_failures = Counter(
            "spikeless_load_failures", "Loads that failed.", ["model_name", "status"], registry=self._registry
        )
        self._registry.register(_Memory())
        self._lock = threading.Lock()
        self._series: dict[tuple[str, str], set[tuple[str, ...]]] = {}

    def page(self) -> bytes:
        """The text for Prometheus."""
        return generate_latest(self._registry)

    def started(self, entrypoint: str) -> None:
        """A call has begun."""
        self._in_progress.labels(entrypoint).inc()

    def ended(
        self, name: str, version: int | None, api: str, entrypoint: str, code: Code, seconds: float
    ) -> None:
        """A call of the model ``name`` has ended; ``version`` is None when it found no model."""
        self._in_progress.labels(entrypoint).dec()
        self._requests.inc(name, code.name)
        if code is Code.OK:
            self._latency.labels(name, api, entrypoint).observe(seconds * 1e6)
        number = "" if version is None else str(version)
        labels = (name, number, api, entrypoint, code.name)
        self._calls.labels(*labels).observe(seconds)
        with self._lock:
            self._series.setdefault((name, number), set()).add(labels)

    def examples(self, name: str, count: int) -> None:
        """A Classify, Regress or MultiInference call with ``count`` examples."""
        self._example_counts.labels(name).observe(count)
        self._examples.labels(name).inc(count)

    def version_changed(self, name: str, status: VersionStatus) -> None:
        """A version has entered a state. The series of one that has ended go, so that they stay few."""
        version = str(status.version)
        for state in State:
            self._states.labels(name, version, state.name).set(state is status.state)
        if status.error is not None:
            self._load_failures.labels(name, status.error.code.name).inc()
        if status.state is not State.END:
            return
        for state in State:
            self._states.remove(name, version, state.name)
        for gauge in (self._load_seconds, self._warmup_seconds, self._warmup_records):
            gauge.remove_by_labels({"model_name": name, "version": version})
        with self._lock:
            series = self._series.pop((name, version), set())
        for labels in series:
            self._calls.remove(*labels)

    def loaded(self, name: str, version: int, load: float, warmup: float, records: int) -> None:
        """A version was restored in ``load`` seconds and warmed with ``records`` in ``warmup`` seconds."""
        self._load_seconds.labels(name, str(version)).set(load)
        self._warmup_seconds.labels(name, str(version)).set(warmup)
        self._warmup_records.labels(name, str(version)).set(records)


class _PlainCounter(Collector):
    """A counter that is exported under exactly its name."""

    def __init__(self, name: str, text: str, labels: tuple[str, ...], registry: CollectorRegistry) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._values: dict[tuple[str, ...], int] = {}
        self._lock = threading.Lock()
        registry.register(self)

    def inc(self, *labels: str) -> None:
        with self._lock:
            self._values[labels] = self._values.get(labels, 0) + 1

    def collect(self) -> Iterable[Metric]:
        metric = Metric(self._name, self._text, "unknown")
        with self._lock:
            values = dict(self._values)
        for labels, value in values.items():
            metric.add_sample(self._name, dict(zip(self._labels, labels, strict=True)), value)
        yield metric


class _Memory(Collector):
    """The memory of this process, from ``/proc/self/status``; nothing where there is none."""

    _FIELDS = (
        ("RssAnon", "spikeless_memory_private_bytes", "Memory that is this process's own."),
        ("RssFile", "spikeless_memory_mapped_bytes", "Memory that holds pages of files."),
    )

    def collect(self) -> Iterator[Metric]:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return
        values = {field: rest.split() for field, _, rest in (line.partition(":") for line in lines)}
        for field, name, text in self._FIELDS:
            if field in values:
                metric = Metric(name, text, "gauge")
                metric.add_sample(name, {}, int(values[field][0]) * 1024)
                yield metric
