"""Warmup: the requests that a server sends itself before a version takes traffic.

In: a SavedModel and, where there are any, sample requests. Out: the file
``<version>/assets.extra/tf_serving_warmup_requests``, a TFRecord of ``PredictionLog``
that any TensorFlow Serving replays while it loads the version.
"""

from spikeless.warmup.build import BuildSettings as BuildSettings
from spikeless.warmup.build import build as build
from spikeless.warmup.build import make_requests as make_requests
from spikeless.warmup.inspection import InputSummary as InputSummary
from spikeless.warmup.inspection import RecordSummary as RecordSummary
from spikeless.warmup.inspection import inspect as inspect
from spikeless.warmup.records import MAX_RECORDS as MAX_RECORDS
from spikeless.warmup.records import warmup_file as warmup_file
from spikeless.warmup.replay import WarmupError as WarmupError
from spikeless.warmup.replay import replay as replay
from spikeless.warmup.samples import SampleFile as SampleFile
from spikeless.warmup.verification import FirstRequest as FirstRequest
from spikeless.warmup.verification import Verification as Verification
from spikeless.warmup.verification import verify as verify
