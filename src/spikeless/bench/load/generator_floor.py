"""The load generator's own latency: the same load on a server that answers at once.

In: the settings of a run. Out: a `Floor`. It is an upper bound, because it includes the
time of the instant server.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from spikeless.bench import analysis
from spikeless.bench.events import PUBLISH
from spikeless.bench.protocols import GRPC
from spikeless.bench.run_file import Floor, ServerFacts, Settings
from spikeless.bench.scenario import Progress, run
from spikeless.disk import children
from spikeless.formats import tfrecord
from spikeless.formats.protos import prediction_log_pb2
from spikeless.formats.tensors import to_proto
from spikeless.openloop.schedule import RECORDED

FLOOR_SECONDS = 5.0


@contextmanager
def instant_server(protocol: str = GRPC) -> Iterator[str]:
    """Run `spikeless.bench.load.instant_server`; gives its address."""
    command = [sys.executable, "-m", "spikeless.bench.load.instant_server", protocol]
    with children.serving(command) as (port, _):
        yield f"127.0.0.1:{port}"


@contextmanager
def built_in_requests() -> Iterator[Path]:
    """A file with one small request, to measure a floor without a model."""
    log = prediction_log_pb2.PredictionLog()
    tensor = log.predict_log.request.inputs["features"]
    tensor.CopyFrom(to_proto(np.zeros((1, 30), np.float32)))
    with tempfile.TemporaryDirectory(prefix="spikeless-floor-") as directory:
        path = Path(directory) / "requests"
        tfrecord.write(path, [log.SerializeToString()])
        yield path


def measure_floor(
    settings: Settings, seconds: float = FLOOR_SECONDS, progress: Progress | None = None
) -> Floor:
    """Drive the load of `settings` for `seconds` against the instant server.

    Raises what `spikeless.bench.scenario.run` raises.
    """
    warm = min(1.0, seconds / 4)
    short = dataclasses.replace(settings, seconds=seconds, warm_seconds=warm, event=PUBLISH, publish_at=None)
    if short.arrivals == RECORDED:  # Its first seconds may be any.
        short = dataclasses.replace(short, arrivals="poisson", speed=1.0)
    with instant_server(settings.protocol) as target:
        server = ServerFacts(
            target if settings.protocol == GRPC else "", engine="trivial", rest_target=target
        )
        result = run("floor", short, server, progress=progress)
    steady = analysis.analyse(result).steady
    return Floor(settings.rate, steady.requests, steady.p50, steady.p99, steady.p99_9, steady.max)
