"""Prune a copy of MODELS in ``DIRECTORY/<n>``, killed at every point (see `killed`).

python killed_prunes.py MODELS DIRECTORY
"""

import shutil
import sys

from killed import at_every_touch

from spikeless.rollout.prune import prune

source, directory = sys.argv[1:]
at_every_touch(
    directory,
    lambda models: shutil.copytree(source, models),
    lambda models: prune(models, "scale", 1, None),
)
