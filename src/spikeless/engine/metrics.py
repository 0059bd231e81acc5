"""Metrics for Prometheus: TensorFlow Serving's by its names, and this engine's own.

In: the calls, the states of versions and the loads, as they happen. Out: the text that
Prometheus scrapes, below the REST port, at the path of ``--monitoring_config_file``:

    prometheus_config { enable: true, path: "/monitoring/prometheus/metrics" }

TensorFlow Serving's metrics, in microseconds, have no version among their labels.
``API`` is ``Predict``, ``Classify``, ... over gRPC and for the runtime, and
``predict``, ``classify``, ... over REST, as it is there; empty for a REST call that
asks for states or signatures; ``ModelInfer`` for the Open Inference Protocol:

    :tensorflow:serving:request_count                 calls, by model_name, status
    :tensorflow:serving:request_latency               by model_name, API, entrypoint
    :tensorflow:serving:runtime_latency               by model_name, API, runtime (TF1)
    :tensorflow:serving:request_example_counts        examples in a call, by model
    :tensorflow:serving:request_example_count_total   the same, added up
    :tensorflow:serving:model_warmup_latency          by model_path, status
    :tensorflow:cc:saved_model:load_attempt_count     by model_path, status
    :tensorflow:cc:saved_model:load_latency           added up, by model_path

With ``--enable_batching`` these besides, sizes in rows:

    :tensorflow:serving:batching_session:queuing_latency       in microseconds
    :tensorflow:serving:batching_session:input_batch_size      of each input of a call
    :tensorflow:serving:batching_session:processed_batch_size  of a batch with padding
    :tensorflow:serving:batching_session:padding_size          by execution_batch_size
    :tensorflow:serving:batching_session:wrapped_run_count     batches that have run

Those that begin with ``spikeless_`` are this engine's own, in seconds and bytes:

    spikeless_call_latency_seconds     by model_name, version, API, entrypoint, status
    spikeless_calls_in_progress        by entrypoint (GRPC, REST)
    spikeless_version_state            1 for its state, by model_name, version, state
    spikeless_version_load_seconds     how long the version took to restore
    spikeless_version_warmup_seconds   how long its warmup took
    spikeless_version_warmup_records   how many records it had
    spikeless_load_failures_total      failed loads, by model_name, status
    spikeless_memory_private_bytes     what counts against a container's limit (RssAnon)
    spikeless_memory_mapped_bytes      parameters mapped from files, can be given back

Useful queries:

    # requests a second, by status
    sum by (model_name, status) (rate(:tensorflow:serving:request_count[1m]))
    # p99 in milliseconds, as for TensorFlow Serving
    histogram_quantile(0.99, sum by (le, model_name)
        (rate(:tensorflow:serving:request_latency_bucket{API!=""}[1m]))) / 1000
    # p99 of each version, across a swap
    histogram_quantile(0.99, sum by (le, version)
        (rate(spikeless_call_latency_seconds_bucket{model_name="boston"}[1m])))
    # which version is being served, and how much of the traffic it takes
    spikeless_version_state{state="AVAILABLE"} == 1
    sum by (version)
        (rate(spikeless_call_latency_seconds_count{model_name="boston"}[1m]))
    # how much of a call is spent outside TensorFlow, in milliseconds
    (sum by (model_name) (rate(:tensorflow:serving:request_latency_sum[1m]))
        - sum by (model_name) (rate(:tensorflow:serving:runtime_latency_sum[1m])))
        / sum by (model_name) (rate(:tensorflow:serving:request_latency_count[1m]))
        / 1000
    # alert: a version could not be loaded, or is loading for more than five minutes
    increase(spikeless_load_failures_total[10m]) > 0
    min_over_time(spikeless_version_state{state="LOADING"}[5m]) == 1
    # private memory against the limit, during a swap
    max_over_time(spikeless_memory_private_bytes[10m])
"""

from __future__ import annotations

import bisect
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from spikeless.disk import proc
from spikeless.errors import Code
from spikeless.formats.protos import message_class, read_text_proto
from spikeless.formats.states import State, VersionStatus

DEFAULT_PATH = "/monitoring/prometheus/metrics"

#: TensorFlow Serving's buckets: ``Buckets::Exponential(10, 1.8, 33)`` microseconds, and
#: of examples.
MICROSECONDS = tuple(10 * 1.8**power for power in range(33))
EXAMPLES = tuple(2.0**power for power in range(15))
#: The same for batches: ``Exponential(1, 2, 14)`` rows and ``(100, 1.2, 52)``
#: microseconds.
ROWS = tuple(2.0**power for power in range(14))
QUEUED_MICROSECONDS = tuple(100 * 1.2**power for power in range(52))
#: Fine where calls usually are, from 0.1 ms to 10 s.
SECONDS = (
    *(0.0001, 0.0002, 0.0003, 0.0004, 0.0005, 0.0007, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.007),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0),
)

_PrometheusConfig = message_class("PrometheusConfig", enable=(1, bool), path=(2, str))
_MonitoringConfig = message_class("MonitoringConfig", prometheus_config=(1, _PrometheusConfig))


def read_monitoring_path(file: str | os.PathLike[str]) -> str:
    """The path in a ``MonitoringConfig`` in text format; empty when metrics are off."""
    prometheus = read_text_proto(file, _MonitoringConfig()).prometheus_config
    return str(prometheus.path or DEFAULT_PATH) if prometheus.enable else ""


class Metrics:
    """What one server counts, in a registry of its own."""

    def __init__(self, path: str = DEFAULT_PATH) -> None:
        #: Where below the REST port Prometheus finds them.
        self.path = path
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = self._registry = CollectorRegistry()
        count = partial(_Counter, registry=registry)
        distribution = partial(_Histogram, registry=registry)
        gauge = partial(Gauge, registry=registry)
        self._requests = count(
            ":tensorflow:serving:request_count", "The total number of requests.", ("model_name", "status")
        )
        self._latency = distribution(
            ":tensorflow:serving:request_latency",
            "Distribution of wall time (in microseconds) for TensorFlow Serving requests.",
            ("model_name", "API", "entrypoint"),
        )
        self._runtime = distribution(
            ":tensorflow:serving:runtime_latency",
            "Distribution of wall time (in microseconds) for TensorFlow's runtime.",
            ("model_name", "API", "runtime"),
        )
        self._example_counts = distribution(
            ":tensorflow:serving:request_example_counts",
            "The number of tensorflow.Examples per request.",
            ("model",),
            bounds=EXAMPLES,
        )
        self._examples = count(
            ":tensorflow:serving:request_example_count_total",
            "The total number of tensorflow.Examples.",
            ("model",),
        )
        self._warmup = distribution(
            ":tensorflow:serving:model_warmup_latency",
            "Distribution of wall time (in microseconds) for warming up a version.",
            ("model_path", "status"),
        )
        batching = ":tensorflow:serving:batching_session"
        self._queuing = distribution(
            f"{batching}:queuing_latency",
            "Time (in microseconds) that calls waited until their batch ran.",
            ("thread_pool_name",),
            bounds=QUEUED_MICROSECONDS,
        )
        self._batch_inputs = distribution(
            f"{batching}:input_batch_size",
            "Rows of each input of the calls.",
            (),
            bounds=ROWS,
        )
        self._batches = distribution(
            f"{batching}:processed_batch_size",
            "Rows of the batches, padding included.",
            (),
            bounds=ROWS,
        )
        self._padding = distribution(
            f"{batching}:padding_size",
            "Rows of padding in the batches, by their size.",
            ("execution_batch_size",),
            bounds=ROWS,
        )
        self._batch_runs = count(f"{batching}:wrapped_run_count", "The number of batches that have run.", ())
        self._load_attempts = count(
            ":tensorflow:cc:saved_model:load_attempt_count",
            "The number of times a SavedModel was loaded or could not be.",
            ("model_path", "status"),
        )
        self._load_latency = count(
            ":tensorflow:cc:saved_model:load_latency",
            "Wall time (in microseconds) of loads that succeeded.",
            ("model_path",),
        )
        self._calls = distribution(
            "spikeless_call_latency_seconds",
            "Wall time of calls, by version.",
            ("model_name", "version", "API", "entrypoint", "status"),
            bounds=SECONDS,
        )
        self._in_progress = gauge("spikeless_calls_in_progress", "Calls being answered.", ["entrypoint"])
        version = ["model_name", "version"]
        self._states = gauge(
            "spikeless_version_state", "1 for the state that a version is in.", [*version, "state"]
        )
        self._load_seconds = gauge("spikeless_version_load_seconds", "Time to restore a version.", version)
        self._warmup_seconds = gauge(
            "spikeless_version_warmup_seconds", "Time to warm a version up.", version
        )
        self._warmup_records = gauge("spikeless_version_warmup_records", "Warmup records replayed.", version)
        self._load_failures = Counter(
            "spikeless_load_failures", "Loads that failed.", ["model_name", "status"], registry=registry
        )
        registry.register(_Memory())
        #: The text for all workers, where there are several.
        self.gather: Callable[[], bytes] = self.own_page
        self._paths: dict[tuple[str, int], str] = {}

    def page(self) -> bytes:
        """The text for Prometheus."""
        return self.gather()

    def own_page(self) -> bytes:
        """The text of this process."""
        # The client library knows counters only by names that end in _total.
        return generate_latest(self._registry).replace(b" untyped\n", b" counter\n")

    # --- calls ------------------------------------------------------------------------

    def started(self, entrypoint: str) -> None:
        """A call has begun."""
        self._in_progress.labels(entrypoint).inc()

    def ended(
        self, name: str, version: int | None, api: str, entrypoint: str, code: Code, seconds: float
    ) -> None:
        """A call of a model has ended; ``version`` is None when it found no model."""
        self._in_progress.labels(entrypoint).dec()
        self._requests.add(1, name, code.name)
        if code is Code.OK:
            self._latency.observe(seconds * 1e6, name, api, entrypoint)
        number = "" if version is None else str(version)
        self._calls.observe(seconds, name, number, api, entrypoint, code.name)

    def examples(self, name: str, count: int) -> None:
        """A Classify, Regress or MultiInference call with ``count`` examples."""
        self._example_counts.observe(count, name)
        self._examples.add(count, name)

    def ran(self, name: str, api: str, seconds: float) -> None:
        """A call was in TensorFlow for ``seconds``; so are warmup records."""
        self._runtime.observe(seconds * 1e6, name, api, "TF1")

    # --- batches ----------------------------------------------------------------------

    def batch_input(self, size: int) -> None:
        """An input of a call has ``size`` rows."""
        self._batch_inputs.observe(size)

    def batch_queued(self, seconds: float) -> None:
        """A call waited so long for its batch to run."""
        # The label is empty in TensorFlow Serving, whatever the pool is called.
        self._queuing.observe(seconds * 1e6, "")

    def batch_merged(self, size: int, padding: int) -> None:
        """A batch has ``size`` rows, of which so many are padding."""
        self._batches.observe(size)
        self._padding.observe(padding, str(size))

    def batch_ran(self) -> None:
        """A batch has run."""
        self._batch_runs.add(1)

    # --- versions ---------------------------------------------------------------------

    def version_changed(self, name: str, status: VersionStatus) -> None:
        """A version has entered a state; at END its series are removed."""
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
        self._calls.drop(name, version)
        path = self._paths.pop((name, status.version), None)
        if path is not None:
            for series in (self._load_latency, self._load_attempts, self._warmup):
                series.drop(path)

    def load_failed(self, path: Path) -> None:
        """The version in ``path`` could not be restored; it may be tried again."""
        self._load_attempts.add(1, str(path), "fail")

    def restored(self, name: str, version: int, path: Path, seconds: float) -> None:
        """The version in ``path`` was restored, and will be warmed."""
        self._paths[name, version] = str(path)
        self._load_attempts.add(1, str(path), "success")
        self._load_latency.add(round(seconds * 1e6), str(path))
        self._load_seconds.labels(name, str(version)).set(seconds)

    def warmed(self, name: str, version: int, path: Path, seconds: float, records: int) -> None:
        """It was warmed with so many records."""
        if records:
            self._warmup.observe(seconds * 1e6, str(path), Code.OK.name)
        self._warmup_seconds.labels(name, str(version)).set(seconds)
        self._warmup_records.labels(name, str(version)).set(records)


_Cell = TypeVar("_Cell")


class _Family(Collector, Generic[_Cell]):
    """A metric with a cell for each combination of label values.

    The classes of the client library end the names of all counters in ``_total`` and
    write the bounds of histograms with all their digits; queries and dashboards for
    TensorFlow Serving have neither.
    """

    kind = "unknown"

    def __init__(self, name: str, text: str, labels: tuple[str, ...], registry: CollectorRegistry) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._cells: dict[tuple[str, ...], _Cell] = {}
        self._lock = threading.Lock()
        registry.register(self)

    def drop(self, *labels: str) -> None:
        """Forget the cells whose first labels have these values."""
        with self._lock:
            for key in [key for key in self._cells if key[: len(labels)] == labels]:
                del self._cells[key]

    def collect(self) -> Iterator[Metric]:
        metric = Metric(self._name, self._text, self.kind)
        with self._lock:
            for key, cell in self._cells.items():
                self._sample(metric, dict(zip(self._labels, key, strict=True)), cell)
        yield metric

    def _sample(self, metric: Metric, labels: dict[str, str], cell: _Cell) -> None:
        raise NotImplementedError


class _Counter(_Family[int]):
    """Sums of whole numbers."""

    def add(self, value: int, *labels: str) -> None:
        with self._lock:
            self._cells[labels] = self._cells.get(labels, 0) + value

    def _sample(self, metric: Metric, labels: dict[str, str], cell: int) -> None:
        metric.add_sample(self._name, labels, cell)


class _Histogram(_Family[list[float]]):
    """Distributions: a cell has the count of each bucket, then the sum."""

    kind = "histogram"

    def __init__(
        self,
        name: str,
        text: str,
        labels: tuple[str, ...],
        registry: CollectorRegistry,
        bounds: tuple[float, ...] = MICROSECONDS,
    ) -> None:
        self._bounds = bounds
        self._texts = [*(f"{bound:g}" for bound in bounds), "+Inf"]
        super().__init__(name, text, labels, registry)

    def observe(self, value: float, *labels: str) -> None:
        bucket = bisect.bisect_left(self._bounds, value)
        with self._lock:
            cell = self._cells.get(labels)
            if cell is None:
                cell = self._cells[labels] = [0] * (len(self._texts) + 1)
            cell[bucket] += 1
            cell[-1] += value

    def _sample(self, metric: Metric, labels: dict[str, str], cell: list[float]) -> None:
        *counts, total = cell
        for text, count in zip(self._texts, itertools.accumulate(counts), strict=True):
            metric.add_sample(f"{self._name}_bucket", {**labels, "le": text}, count)
        metric.add_sample(f"{self._name}_sum", labels, total)
        metric.add_sample(f"{self._name}_count", labels, sum(counts))


class _Memory(Collector):
    """The memory of this process; nothing where there is no ``/proc``."""

    def collect(self) -> Iterator[Metric]:
        try:
            private, mapped = proc.private_memory(), proc.mapped_parameters()
        except OSError:
            return
        yield GaugeMetricFamily(
            "spikeless_memory_private_bytes", "Memory that is this process's own.", value=private
        )
        yield GaugeMetricFamily(
            "spikeless_memory_mapped_bytes",
            "Resident parameters that are mapped from files.",
            value=mapped,
        )
