"""What a server's Prometheus metrics say about its models.

In: the address of a metrics page, in Prometheus' text format with TensorFlow Serving's
names (``:tensorflow:serving:request_count`` by model and status). Out: per model, how
many requests there were and how many failed.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections import defaultdict
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from spikeless.errors import InvalidArgument, Unavailable

_COUNT = ":tensorflow:serving:request_count"
_MAX_BYTES = 64 << 20
_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class Traffic:
    """Requests to one model: all, and those that failed."""

    requests: float = 0.0
    errors: float = 0.0

    def since(self, other: Traffic) -> Traffic:
        """What was added; everything, when a restart has reset the counters."""
        if self.requests < other.requests:
            return self
        return Traffic(self.requests - other.requests, self.errors - other.errors)

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0


def read(url: str) -> dict[str, Traffic]:
    """The traffic of each model since the server's start.

    Raises:
        Unavailable: the page cannot be fetched.
        InvalidArgument: it is no page of metrics.
    """
    if not url.startswith(("http://", "https://")):
        raise InvalidArgument(f"{url!r} is no http address of a metrics page")
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            text = response.read(_MAX_BYTES).decode("utf-8", "replace")
    except (urllib.error.URLError, OSError) as error:
        raise Unavailable(
            f"no metrics at {url}: {error}; servers need --rest_api_port and a --monitoring_config_file"
        ) from None
    return parse(text, url)


def parse(text: str, source: str) -> dict[str, Traffic]:
    """The traffic of each model in a page of metrics."""
    requests: dict[str, float] = defaultdict(float)
    errors: dict[str, float] = defaultdict(float)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in (_COUNT, f"{_COUNT}_total"):
                    model = sample.labels.get("model_name", "")
                    requests[model] += sample.value
                    if sample.labels.get("status") != "OK":
                        errors[model] += sample.value
    except ValueError as error:
        raise InvalidArgument(f"{source} cannot be read as metrics: {error}") from None
    return {model: Traffic(count, errors[model]) for model, count in requests.items()}
