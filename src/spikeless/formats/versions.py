"""Which versions of a model to serve: those on disk that its policy selects.

In: a ``ModelConfig``. Out: version number -> directory. As in TensorFlow Serving's
``file_system_storage_path_source.cc``, a version is any child of the base path whose
name is an integer.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from spikeless.errors import NotFound
from spikeless.formats.protos import model_server_config_pb2

_log = logging.getLogger(__name__)
_VERSION = re.compile(r"\d{1,19}", re.ASCII)
MAX_VERSION = (1 << 63) - 1


def parse_version(name: str) -> int | None:
    """The version of a directory name, or None: ``7`` and ``00000007`` are both 7."""
    if not _VERSION.fullmatch(name) or int(name) > MAX_VERSION:
        return None
    return int(name)


def list_versions(base_path: str | os.PathLike[str]) -> dict[int, Path]:
    """All version directories, lowest first; ``NotFound`` without a base path."""
    try:
        names = os.listdir(base_path)
    except OSError as error:
        raise NotFound(f"Could not find base path {os.fspath(base_path)}: {error.strerror}") from None
    found = {version: Path(base_path, name) for name in names if (version := parse_version(name)) is not None}
    return dict(sorted(found.items()))


def aspired_versions(
    config: model_server_config_pb2.ModelConfig, warn: Callable[[str], None] = _log.warning
) -> dict[int, Path]:
    """The versions on disk that the policy selects; without one, the highest.

    Args:
        warn: called with each thing that is not as configured.

    Raises:
        NotFound: there is no base path.
    """
    versions = list_versions(config.base_path)
    policy = config.model_version_policy
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        aspired = versions
    elif choice == "specific":
        wanted = set(policy.specific.versions)
        aspired = {version: path for version, path in versions.items() if version in wanted}
        for version in sorted(wanted - set(aspired)):
            warn(f"version {version} of {config.name} is configured but not on disk")
    else:
        newest = sorted(versions)[-max(policy.latest.num_versions, 1) :]
        aspired = {version: versions[version] for version in newest}
    if not aspired:
        warn(
            f"no versions of servable {config.name} found under base path {config.base_path}: a version is a "
            "folder named by a number"
        )
    return aspired
