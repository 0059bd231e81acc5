"""Push or pull in ``DIRECTORY/<n>``, killed at every point (see `killed`).

python killed_fleet.py push MODELS DIRECTORY      version 2, where the store has 1
python killed_fleet.py pull STORE DIRECTORY       version 2, where the disk has 1
python killed_fleet.py prune MODELS DIRECTORY     all but version 3 of a store
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from killed import at_every_touch

from spikeless.store.prune import prune
from spikeless.store.pull import PullSettings, pull
from spikeless.store.push import push
from spikeless.store.settings import StoreSettings

what, source, directory = sys.argv[1:]
# One at a time, so that every point is reached in its turn.
one = StoreSettings(workers=1)


def link_tree(tree: Path, target: Path) -> None:
    shutil.copytree(tree, target, copy_function=lambda a, b: Path(b).hardlink_to(a))


def prepare_push(folder: Path) -> None:
    link_tree(Path(source), folder / "models")
    push(folder / "models" / "ctr" / "1", str(folder / "store"), settings=one)


def prepare_pull(folder: Path) -> None:
    folder.mkdir()
    pull(source, folder, version=1, settings=PullSettings(store=one))


def prepare_prune(folder: Path) -> None:
    for version in "123":
        push(Path(source, "ctr", version), str(folder), settings=one)


if what == "prune":
    at_every_touch(
        directory, prepare_prune, lambda folder: prune(str(folder), "ctr", 1, force=True, settings=one)
    )
elif what == "push":
    at_every_touch(
        directory,
        prepare_push,
        lambda folder: push(folder / "models" / "ctr" / "2", str(folder / "store"), settings=one),
    )
else:
    at_every_touch(
        directory, prepare_pull, lambda folder: pull(source, folder, settings=PullSettings(store=one))
    )
