"""The states of a version, as servers report them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from spikeless.errors import SpikelessError


class State(enum.IntEnum):
    """Numbered as ``ModelVersionStatus.State`` in ``get_model_status.proto``."""

    START = 10
    LOADING = 20
    AVAILABLE = 30
    UNLOADING = 40
    END = 50


@dataclass(frozen=True)
class VersionStatus:
    """What ``GetModelStatus`` tells of one version."""

    version: int
    state: State
    #: Why the version could not be loaded; None while it is healthy.
    error: SpikelessError | None = None
