"""Take version 1 from the registry into ``DIRECTORY/<n>``, killed at every point.

python killed_followers.py URI DIRECTORY
"""

import sys
from pathlib import Path

# Once, not once in each child.
import mlflow.artifacts
import mlflow.store.artifact.artifact_repo
import mlflow.store.artifact.models_artifact_repo
from killed import at_every_touch

from spikeless.registry import AliasFollower, Registry
from spikeless.repository.gates import FILES

uri, directory = sys.argv[1:]
# One file at a time, so that every point is reached in its turn.
mlflow.store.artifact.artifact_repo._NUM_MAX_THREADS = 1


def follow(models: Path) -> None:
    AliasFollower(Registry(), uri, models, gates=[FILES]).poll()


at_every_touch(directory, Path.mkdir, follow)
