"""Keep the mapped files of served versions in memory, from beside the server.

In: a model repository and a budget. Out: locked files. The server's mapped parameters
are pages of the page cache, and under memory pressure the kernel may take them back; a
process that maps the same files and locks them keeps them. What is locked follows what
is served: the files of a new version are locked as soon as it is there, those of a
version that is no longer served are released.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from spikeless.disk.pages import Mapping
from spikeless.errors import DataLoss, NotFound, ResourceExhausted
from spikeless.formats.protos import model_server_config_pb2
from spikeless.formats.versions import aspired_versions, list_versions
from spikeless.mapping import is_mapped, read_manifest
from spikeless.repository import models_config

_log = logging.getLogger(__name__)

#: The versions that are served now, by model, the one to lock first in front.
Served = Callable[[], dict[str, list[Path]]]


@dataclass(frozen=True)
class Kept:
    """What one poll changed, and what it left out."""

    locked: tuple[Path, ...]
    released: tuple[Path, ...]
    #: Files that the budget has no room for.
    left_out: tuple[Path, ...]
    #: Bytes that are locked now.
    bytes: int


class Keeper(AbstractContextManager["Keeper"]):
    """Locks the mapped files of served versions; a context manager that releases them.

    Args:
        served: says which versions are served.
        budget: bytes to lock at most.
    """

    def __init__(self, served: Served, budget: int) -> None:
        self._served = served
        self._budget = budget
        self._held: dict[tuple[int, int], Mapping] = {}

    def poll(self) -> Kept:
        """Lock what is served and is not locked yet, release what is no longer served.

        The first version of each model comes before the second of any, so that a small
        budget is spent on what takes the traffic. A file counts once, however many
        versions link to it.

        Raises:
            ResourceExhausted: the process may not lock that much; what it holds stays
                locked.
        """
        wanted = self._wanted()
        released = [self._held.pop(identity) for identity in self._held.keys() - wanted.keys()]
        for mapping in released:
            mapping.close()
        locked, left_out = [], []
        for identity, (path, size) in wanted.items():
            if identity in self._held:
                continue
            if self.bytes + size > self._budget:
                left_out.append(path)
                continue
            try:
                mapping = Mapping(path)
            except FileNotFoundError:  # the version went away meanwhile
                continue
            try:
                mapping.lock()
            except ResourceExhausted:
                mapping.close()
                raise
            self._held[identity] = mapping
            locked.append(path)
        return Kept(tuple(locked), tuple(mapping.path for mapping in released), tuple(left_out), self.bytes)

    @property
    def bytes(self) -> int:
        """How much is locked now."""
        return sum(mapping.size for mapping in self._held.values())

    def _wanted(self) -> dict[tuple[int, int], tuple[Path, int]]:
        """Path and size of each file to lock, by device and inode, by priority."""
        versions = list(self._served().values())
        wanted: dict[tuple[int, int], tuple[Path, int]] = {}
        for rank in range(max(map(len, versions), default=0)):
            for version in (paths[rank] for paths in versions if rank < len(paths)):
                for path in _mapped_files(version):
                    with suppress(FileNotFoundError):  # the version is going away
                        status = path.stat()
                        wanted.setdefault((status.st_dev, status.st_ino), (path, status.st_size))
        return wanted

    def close(self) -> None:
        for mapping in self._held.values():
            mapping.close()
        self._held.clear()

    def __exit__(self, *_: object) -> None:
        self.close()


def served_versions(models: Path) -> dict[str, list[Path]]:
    """The versions that servers of a repository should serve, newest first, by model.

    ``models.config`` says which; the base paths in it are the server's, and the models'
    folders are taken to have the same names here. Without that file, the newest version
    of each folder counts.

    Raises:
        NotFound: there is no such folder.
        InvalidArgument: ``models.config`` cannot be read.
    """
    if (models / models_config.FILE_NAME).is_file():
        configured = models_config.read(models).message.model_config_list.config
    else:
        configured = [
            model_server_config_pb2.ModelConfig(name=name, base_path=name) for name in _model_folders(models)
        ]
    served = {}
    for model in configured:
        model.base_path = str(models / PurePosixPath(model.base_path).name)
        if os.path.isdir(model.base_path):
            versions = aspired_versions(model)
            served[model.name] = [versions[number] for number in sorted(versions, reverse=True)]
    return served


def _model_folders(models: Path) -> list[str]:
    try:
        folders = [child for child in models.iterdir() if child.is_dir()]
    except OSError as error:
        raise NotFound(f"{models} cannot be listed: {error.strerror}") from None
    return sorted(folder.name for folder in folders if list_versions(folder))


def _mapped_files(version: Path) -> list[Path]:
    """The mapped files of a version; none for a version that is not mapped."""
    try:
        files = read_manifest(version).mapped_files() if is_mapped(version) else []
    except (NotFound, DataLoss) as error:
        _log.warning("%s", error)
        return []
    return [version / record.path for record in files]
