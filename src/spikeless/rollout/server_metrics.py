"""What a server's Prometheus metrics say about its models.

In: the address of a metrics page, in Prometheus' text format with TensorFlow Serving's
names (``:tensorflow:serving:request_count`` by model and status, and the buckets of
``:tensorflow:serving:request_latency``). Out: per model, how many requests there were,
how many failed, and how long they took.
"""

from __future__ import annotations

import http.client
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from spikeless.errors import InvalidArgument, Unavailable
from spikeless.formats.urls import redacted

_COUNT = ":tensorflow:serving:request_count"
_LATENCY = ":tensorflow:serving:request_latency_bucket"
_MAX_BYTES = 64 << 20
_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class Traffic:
    """Requests to one model: all, and those that failed."""

    requests: float = 0.0
    errors: float = 0.0
    #: Upper bound of a bucket in microseconds -> requests that took at most so long.
    buckets: Mapping[float, float] = field(default_factory=dict)

    def since(self, other: Traffic) -> Traffic:
        """What was added; everything, when a restart has reset the counters."""
        if self.requests < other.requests:
            return self
        return Traffic(
            self.requests - other.requests,
            self.errors - other.errors,
            {bound: count - other.buckets.get(bound, 0.0) for bound, count in self.buckets.items()},
        )

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0

    def percentile_ms(self, share: float) -> float | None:
        """What a `share` of the requests did not exceed; None without any.

        It is the upper bound of a bucket, and infinite for requests above all of them.
        """
        total = max(self.buckets.values(), default=0.0)
        bounds = [bound for bound, count in self.buckets.items() if count >= share * total]
        return min(bounds) / 1e3 if total else None


def read(url: str) -> dict[str, Traffic]:
    """The traffic of each model since the server's start.

    Raises:
        Unavailable: the page cannot be fetched.
        InvalidArgument: it is no page of metrics, or its address has credentials.
    """
    shown = redacted(url)
    if not url.startswith(("http://", "https://")):
        raise InvalidArgument(f"{shown!r} is no http address of a metrics page")
    if "@" in urlsplit(url).netloc:
        raise InvalidArgument(f"{shown}: metrics are read without user and password; leave these out")
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            text = response.read(_MAX_BYTES).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(
            f"no metrics at {shown}: {error}; servers need --rest_api_port and a --monitoring_config_file"
        ) from None
    return parse(text, shown)


def parse(text: str, source: str) -> dict[str, Traffic]:
    """The traffic of each model in a page of metrics."""
    requests: dict[str, float] = defaultdict(float)
    errors: dict[str, float] = defaultdict(float)
    buckets: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == _LATENCY:
                    bound = float(sample.labels["le"])
                    buckets[sample.labels.get("model_name", "")][bound] += sample.value
                if sample.name in (_COUNT, f"{_COUNT}_total"):
                    model = sample.labels.get("model_name", "")
                    requests[model] += sample.value
                    if sample.labels.get("status") != "OK":
                        errors[model] += sample.value
    except ValueError as error:
        raise InvalidArgument(f"{source} cannot be read as metrics: {error}") from None
    return {model: Traffic(count, errors[model], dict(buckets[model])) for model, count in requests.items()}
