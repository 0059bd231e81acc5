"""Warmup: the requests that a server sends itself before a version takes traffic.

In: a SavedModel and, where there are any, sample requests. Out: the file
``<version>/assets.extra/tf_serving_warmup_requests``, a TFRecord of ``PredictionLog`` that any TensorFlow
Serving replays while it loads the version.
"""

from spikeless.warmup.records import MAX_RECORDS, warmup_file
from spikeless.warmup.replay import WarmupError, replay

__all__ = ["MAX_RECORDS", "WarmupError", "replay", "warmup_file"]
