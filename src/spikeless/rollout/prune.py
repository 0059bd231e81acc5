"""Pruning: old versions leave the disk, and none that anybody still needs.

In: a repository, its ``models.config`` and its servers. Out: the versions that were
removed, and why each of the others stays. A version goes out of sight by one rename, so
that no server ever sees half of one.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from spikeless.disk import atomic, proc
from spikeless.disk.locks import model_lock
from spikeless.errors import FailedPrecondition, InvalidArgument, NotFound
from spikeless.formats.states import State
from spikeless.repository import layout, models_config
from spikeless.repository.journal import Journal, Removed
from spikeless.repository.models_config import ModelsConfig
from spikeless.rollout.fleet import Fleet, FleetSettings
from spikeless.rollout.plans import CANARY_SUFFIX

_TRASH = "trash"
#: Seconds for which a version counts as young.
YOUNG = 86_400.0


@dataclass(frozen=True)
class Pruned:
    """What was removed, and what stays."""

    removed: tuple[int, ...]
    #: Each of the other versions -> why it stays.
    kept: Mapping[int, str]
    #: Bytes.
    freed: int
    #: Nothing was removed: that is what would be.
    dry_run: bool = False


def prune(
    models: str | os.PathLike[str],
    name: str,
    keep: int,
    fleet: FleetSettings | None,
    *,
    force: bool = False,
    dry_run: bool = False,
    pinned: Collection[int] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> Pruned:
    """Remove all but the newest ``keep`` versions.

    Versions that are labelled, configured, loaded or young stay as well.

    Args:
        fleet: the servers to ask what is loaded; None where no server uses the
            repository.
        pinned: versions that a whole fleet serves, as its store says; they stay.
        force: remove versions that are younger than a day, too. Nothing else is forced.
        dry_run: remove nothing, only find out what would be.

    Raises:
        NotFound: the model has no versions.
        Unavailable: a server does not answer: what it has loaded is not known. Nothing
            is removed.
    """
    models = Path(models)
    versions = layout.versions(models, name)
    if not versions:
        raise NotFound(f"{models / name} has no versions{layout.similar_name(models, name)}")
    if keep < 1:
        raise InvalidArgument(f"--keep {keep}: the newest version always stays, so 1 or more")
    state = layout.state_directory(models, name)
    # No promotion chooses a version while this does.
    with model_lock(state, name, wait=True, progress=progress):
        reasons = _reasons(models, name, versions, keep, fleet, force)
        reasons |= {version: "promoted in the store" for version in pinned if version in versions}
        removed = {version: path for version, path in versions.items() if version not in reasons}
        sizes = {version: atomic.size_of(path) for version, path in removed.items()}
        pruned = Pruned(tuple(removed), reasons, sum(sizes.values()), dry_run)
        if dry_run:
            return pruned
        for version, path in removed.items():
            progress(f"removing version {version}")
            hide(path, state)
            Journal(models, name).append(Removed(version, sizes[version]))
        if (state / _TRASH).is_dir():
            progress("freeing the space")
            free_hidden(state)
    return pruned


def hide(version: Path, state: Path) -> None:
    """Put a version out of the sight of servers, by one rename."""
    try:
        (state / _TRASH).mkdir(exist_ok=True)
        version.rename(state / _TRASH / version.name)
        atomic.sync(version.parent)
    except OSError as error:
        raise FailedPrecondition(f"{version} cannot be removed: {error.strerror}") from None


def _reasons(
    models: Path,
    name: str,
    versions: Mapping[int, Path],
    keep: int,
    fleet: FleetSettings | None,
    force: bool,
) -> dict[int, str]:
    """Why versions stay."""
    reasons = {version: f"among the newest {keep}" for version in sorted(versions)[-keep:]}
    if not force:
        for version, path in versions.items():
            # A clock that was set back makes a version young, not old.
            if time.time() - path.stat().st_mtime < YOUNG:
                reasons[version] = "younger than a day"
    for version in _in_use_here(versions):
        reasons[version] = "mapped by a process on this machine"
    for version, where in loaded(models, name, fleet).items():
        reasons[version] = f"loaded by {', '.join(where)}"
    for version, why in configured(models_config.read(models), name).items():
        reasons[version] = why
    unfinished = Journal(models, name).unfinished()
    if unfinished is not None:
        for version in versions:
            if version in (unfinished.version, unfinished.previous):
                reasons[version] = "part of a change that was cut short"
    return {version: reason for version, reason in reasons.items() if version in versions}


def configured(config: ModelsConfig, name: str) -> dict[int, str]:
    """The versions that ``models.config`` names, and how."""
    found: dict[int, str] = {}
    for servable in (name, name + CANARY_SUFFIX):
        model = config.model(servable)
        if model is None:
            continue
        for version in model.model_version_policy.specific.versions:
            found[version] = f"configured for {servable}"
        for label, version in model.version_labels.items():
            found[version] = f"labelled {label}"
    return found


def loaded(models: Path, name: str, fleet: FleetSettings | None) -> dict[int, list[str]]:
    """The versions that servers have in memory, whatever for, and where."""
    found: dict[int, list[str]] = {}
    if fleet is None:
        return found
    with Fleet(models, fleet) as servers:
        for servable in (name, name + CANARY_SUFFIX):
            for target, statuses in servers.statuses(servable).items():
                for status in statuses:
                    if status.state is not State.END:
                        found.setdefault(status.version, []).append(target)
    return found


def _in_use_here(versions: Mapping[int, Path]) -> set[int]:
    """Versions of which a process on this machine has a file mapped.

    A container may see a version at another path, so a file is also known by its device
    and inode. Versions may share it by links: then the end of the path tells them
    apart, and where it does not, all of them count.
    """
    prefixes = {f"{path.resolve()}/": version for version, path in versions.items()}
    inodes: dict[tuple[str, str], dict[str, int]] = {}
    for version, path in versions.items():
        for child in path.rglob("*"):
            if child.is_file():
                end = f"/{path.name}/{child.relative_to(path).as_posix()}"
                inodes.setdefault(proc.file_key(child), {})[end] = version
    found: set[int] = set()
    for pid in psutil.pids():
        try:
            files = proc.mapped_files(pid)
        except OSError:
            continue  # It has ended, or is another user's.
        paths = {file.path for file in files}
        for file in files:
            ends = inodes.get(file.key, {})
            named = {version for end, version in ends.items() if file.path.endswith(end)}
            found |= named or set(ends.values())
        found |= {
            version for prefix, version in prefixes.items() if any(path.startswith(prefix) for path in paths)
        }
    return found


def free_hidden(state: Path) -> None:
    """Remove what this or an earlier, killed prune has put out of sight."""
    shutil.rmtree(state / _TRASH, ignore_errors=True)
