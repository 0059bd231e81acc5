"""Warmup: the requests that a server sends itself before a version takes traffic.

In: a SavedModel and, where there are any, sample requests. Out: the file
``<version>/assets.extra/tf_serving_warmup_requests``, a TFRecord of ``PredictionLog``
that any TensorFlow Serving replays while it loads the version.
"""

from spikeless.warmup.build import BuildSettings, build, make_requests
from spikeless.warmup.inspection import InputSummary, RecordSummary, inspect
from spikeless.warmup.records import MAX_RECORDS, warmup_file
from spikeless.warmup.replay import WarmupError, replay
from spikeless.warmup.samples import SampleFile
from spikeless.warmup.verification import FirstRequest, Verification, verify

__all__ = [
    "MAX_RECORDS",
    "BuildSettings",
    "FirstRequest",
    "InputSummary",
    "RecordSummary",
    "SampleFile",
    "Verification",
    "WarmupError",
    "build",
    "inspect",
    "make_requests",
    "replay",
    "verify",
    "warmup_file",
]
