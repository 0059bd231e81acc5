"""Where things are in a model repository.

In: the repository and a model's name. Out: paths: ``<models>/<name>/<version>/`` for
each version, and ``<models>/<name>/.spikeless/`` for what servers ignore.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from spikeless.errors import InvalidArgument, NotFound, nearest
from spikeless.formats.versions import list_versions
from spikeless.repository import models_config

_STATE_DIRECTORY = ".spikeless"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}", re.ASCII)


def require_repository(models: Path) -> None:
    """Raises NotFound where ``models`` is no directory."""
    if not models.is_dir():
        raise NotFound(f"{models} is no directory: give the repository with --models")


def model_names(models: Path) -> list[str]:
    """The models of a repository: its folders that are not hidden."""
    return sorted(path.name for path in models.iterdir() if path.is_dir() and path.name[0] != ".")


def similar_name(models: Path, name: str) -> str:
    """``: did you mean NAME?`` where a repository has a model of a name like this."""
    known = model_names(models) if models.is_dir() else []
    return "" if name in known else nearest(name, known)


def model_directory(models: str | os.PathLike[str], name: str) -> Path:
    """Where a model's versions are.

    Raises:
        InvalidArgument: paths or servers would misread the name.
    """
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"model name {name!r} must be letters, digits, '_', '-' and '.', starting with a letter or '_'"
        )
    return Path(models) / name


def state_directory(models: str | os.PathLike[str], name: str) -> Path:
    """Where Spikeless keeps a model's locks, journal and staged versions."""
    return Path(models, name, _STATE_DIRECTORY)


def versions(models: str | os.PathLike[str], name: str) -> dict[int, Path]:
    """The versions of a model that are on disk, lowest first."""
    directory = model_directory(models, name)
    return list_versions(directory) if directory.is_dir() else {}


def stable_version(models: str | os.PathLike[str], name: str) -> Path | None:
    """The directory of the version that callers get now.

    That is the latest one where nothing is configured; None where there is no version.
    """
    known = versions(models, name)
    model = models_config.read(models).model(name) if Path(models).is_dir() else None
    if model is not None:
        served = model.model_version_policy.specific.versions
        number = model.version_labels.get(models_config.STABLE, max(served, default=None))
        if number in known:
            return known[number]
    return known[max(known)] if known else None
