"""Map to ``DIRECTORY/<n>/mapped``, killed at every point (see `killed`).

python killed_mappers.py SAVED_MODEL DIRECTORY
"""

import sys
from pathlib import Path

from killed import at_every_touch

from spikeless.mapping import MapSettings, map_saved_model

#: Without the comparison: TensorFlow's threads would not live on in a child.
SETTINGS = MapSettings(min_bytes=4096, verify=False)

source, directory = sys.argv[1:]
at_every_touch(directory, Path.mkdir, lambda folder: map_saved_model(source, folder / "mapped", SETTINGS))
