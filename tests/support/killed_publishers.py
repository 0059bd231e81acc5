"""Publish version 2 beside version 1 in ``DIRECTORY/<n>``, killed at every point.

python killed_publishers.py SAVED_MODEL DIRECTORY
"""

import sys
from pathlib import Path

from killed import at_every_touch

from spikeless.repository.gates import FILES
from spikeless.repository.publishing import publish

source, directory = sys.argv[1:]


def publish_one(models: Path) -> None:
    publish(source, models, "boston", gates=[FILES])


at_every_touch(directory, publish_one, publish_one)
