"""The errors that Spikeless raises: one base, each kind with its gRPC status code.

    SpikelessError
    ├── InvalidArgument      the input is wrong: says what, where and the remedy
    ├── NotFound             a model, version, label, signature, file is not there
    ├── AlreadyExists        it is there already and is never overwritten
    ├── FailedPrecondition   the input is fine, the state of things does not allow it
    ├── ResourceExhausted    a limit was reached
    ├── Unimplemented        a valid request for something that is not supported
    ├── Unavailable          not now; trying again may help
    ├── DeadlineExceeded     it took longer than the caller allowed
    ├── Cancelled            the caller went away
    ├── DataLoss             a file is truncated or fails its checksum
    └── Internal             TensorFlow failed through no fault of the caller

Errors are translated once at each edge: by the gRPC services into a status, by the
command line into ``spikeless: error: ...`` and exit code 1.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterable


class Code(enum.IntEnum):
    """The canonical status codes, numbered as in gRPC and in TensorFlow's C API."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class SpikelessError(Exception):
    """Base of all; ``code`` is the gRPC status that a server answers with."""

    code: Code = Code.UNKNOWN


class InvalidArgument(SpikelessError):
    code = Code.INVALID_ARGUMENT


class NotFound(SpikelessError):
    code = Code.NOT_FOUND


class AlreadyExists(SpikelessError):
    code = Code.ALREADY_EXISTS


class FailedPrecondition(SpikelessError):
    code = Code.FAILED_PRECONDITION


class ResourceExhausted(SpikelessError):
    code = Code.RESOURCE_EXHAUSTED


class Unimplemented(SpikelessError):
    code = Code.UNIMPLEMENTED


class Unavailable(SpikelessError):
    code = Code.UNAVAILABLE


class DeadlineExceeded(SpikelessError):
    code = Code.DEADLINE_EXCEEDED


class Cancelled(SpikelessError):
    code = Code.CANCELLED


class DataLoss(SpikelessError):
    code = Code.DATA_LOSS


class Internal(SpikelessError):
    code = Code.INTERNAL


class TensorFlowError(SpikelessError):
    """An error from TensorFlow's C API, with TensorFlow's own code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = Code(code) if code in Code._value2member_map_ else Code.UNKNOWN


def nearest(name: str, known: Iterable[str]) -> str:
    """``: did you mean NAME?``, or nothing where no known name is like ``name``."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {found[0]}?" if found else ""


#: What each extra of the package installs, by the names that it is imported by.
EXTRAS = {
    "serve": ("waitress",),
    "bench": ("gevent", "h11", "hdrh", "jinja2", "locust", "plotly"),
    "train": ("keras", "scipy", "sklearn", "tensorboard", "tensorflow_datasets"),
    "tagger": ("seqeval", "tf_keras"),
    "spark": ("py4j", "pyarrow", "pyspark"),
    "docker": ("docker",),
    "fleet": ("fsspec", "msgspec", "zstandard"),
    "s3": ("s3fs",),
    "gcs": ("gcsfs",),
    "azure": ("adlfs",),
    "sftp": ("paramiko",),
    "http": ("aiohttp",),
    "mlflow": ("mlflow",),
}


def missing_extra(error: ModuleNotFoundError) -> NotFound | None:
    """The error where a library of an extra is missing; None for other modules."""
    library = (error.name or "").partition(".")[0]
    for extra, libraries in EXTRAS.items():
        if library in libraries:
            return NotFound(f"{library} is not installed: run `pip install 'spikeless[{extra}]'`")
    return None
