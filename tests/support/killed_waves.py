"""Promote in waves in copies of a store, killed at every point (see `killed`).

python killed_waves.py STORE DIRECTORY

Machines report already that they serve version 2.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import msgspec
from killed import at_every_touch

from spikeless.store.objects import Store
from spikeless.store.reports import Reports
from spikeless.store.settings import StoreSettings
from spikeless.store.waves import WaveSettings, promote_in_waves

source, directory = sys.argv[1:]


def prepare(folder: Path) -> None:
    shutil.copytree(source, folder)
    reports = Reports(Store(str(folder)))
    for node in reports.nodes():
        report = reports.read(node)
        (model,) = report.models
        moved = msgspec.structs.replace(model, labels={"stable": 2})
        reports.write(msgspec.structs.replace(report, models=(moved,), time=time.time(), every=3600.0))


def act(folder: Path) -> None:
    # One at a time, so that every point is reached in its turn.
    settings = WaveSettings(("1", "100%"), interval=0.01, store=StoreSettings(workers=1))
    promote_in_waves(str(folder), "ctr", 2, settings)


at_every_touch(directory, prepare, act)
