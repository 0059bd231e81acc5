"""The model repository: ``<models>/<name>/<version>/``, in which every version is whole at any moment.

In: a SavedModel from anywhere. Out: the same as a version that TensorFlow Serving picks up by polling.

A server takes every child of ``<models>/<name>/`` whose name is an integer for a version and loads it at
once; there is no marker for "complete". So a version is built in ``<models>/<name>/.spikeless/staging/``,
which no server looks into and which is on the same file system, and gets its number by a single rename at the
very end. Whatever happens before that, a kill included, leaves the versions as they were; what is left of it
is removed by the next publish.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from spikeless.disk import atomic, locks, pages
from spikeless.errors import AlreadyExists, InvalidArgument
from spikeless.formats.checkpoint import READ_ONLY
from spikeless.formats.versions import MAX_VERSION, list_versions
from spikeless.mapping import MapSettings, is_mapped, map_in_place, read_manifest, repin
from spikeless.mapping import check_files as check_mapped_files
from spikeless.repository.checks import check_files, check_load, check_warmup

#: What belongs to Spikeless inside a model's directory.
STATE_DIRECTORY = ".spikeless"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,127}", re.ASCII)


@dataclass(frozen=True)
class Candidate:
    """A version that is staged and not yet visible."""

    path: Path
    name: str
    version: int
    #: Where it will be.
    target: Path

    def publish(self) -> Path:
        """Make it visible: one rename. Returns the version's directory.

        Raises:
            AlreadyExists: something is in the way.
        """
        with atomic.reported_errors(f"publish to {self.target.parent}"):
            return _rename(self.path, self.target)


@dataclass(frozen=True)
class Step:
    """Something done with a staged version before it becomes visible: a check that raises, or a rewrite."""

    #: What it does, for progress messages.
    title: str
    run: Callable[[Candidate], None]
    #: What of it can be told from the source already, before gigabytes are copied and anything is created.
    early: Callable[[Path], None] = lambda source: None


CHECK_FILES = Step("checking files", lambda candidate: check_files(candidate.path), check_files)
CHECK_WARMUP = Step("checking warmup", lambda candidate: check_warmup(candidate.path), check_warmup)
CHECK_LOAD = Step("loading", lambda candidate: check_load(candidate.path))
STEPS = (CHECK_FILES, CHECK_WARMUP, CHECK_LOAD)


def map_step(settings: MapSettings) -> Step:
    """Map the candidate's parameters, unless that is done already."""

    def run(candidate: Candidate) -> None:
        if not is_mapped(candidate.path):
            map_in_place(candidate.path, settings)

    return Step("mapping parameters", run)


def versions(models: str | os.PathLike[str], name: str) -> dict[int, Path]:
    """The versions of a model that are on disk, lowest first; none when the model is unknown."""
    directory = _model_directory(models, name)
    return list_versions(directory) if directory.is_dir() else {}


def publish(
    saved_model: str | os.PathLike[str],
    models: str | os.PathLike[str],
    name: str,
    version: int | None = None,
    *,
    steps: Sequence[Step] = STEPS,
    serving_root: str | None = None,
    progress: Callable[[str], None] = lambda title: None,
) -> Path:
    """Copy a SavedModel into the repository as a new version and return its directory.

    Arguments and errors are those of `stage`.
    """
    with stage(
        saved_model, models, name, version, steps=steps, serving_root=serving_root, progress=progress
    ) as candidate:
        progress("publishing")
        return candidate.publish()


@contextmanager
def stage(
    saved_model: str | os.PathLike[str],
    models: str | os.PathLike[str],
    name: str,
    version: int | None = None,
    *,
    steps: Sequence[Step] = STEPS,
    serving_root: str | None = None,
    link: bool = False,
    progress: Callable[[str], None] = lambda title: None,
) -> Iterator[Candidate]:
    """Do all of publishing but the rename, for those who must choose the moment: ``candidate.publish()``.

    A candidate that is not published is gone at the end of the block. The copy holds what links in the source
    point at (`spikeless.disk.atomic.copy_tree`) and every user can read it, whatever the modes in the source.
    The source is left as it is.

    Args:
        saved_model: the directory with ``saved_model.pb``.
        models: the repository; created when it is not there.
        name: the model's name: letters, digits, ``_``, ``-``, ``.``; a letter or ``_`` first.
        version: its number, from 0 to 2**63 - 1; by default one more than the highest that is there or being
            published, or 1.
        steps: what is done with the staged copy, in this order, before it becomes visible.
        serving_root: the absolute path at which servers see the repository; where it is here by default.
            A mapped version names its files by it (`spikeless.mapping`).
        link: share the source's files by hard links where the file system allows it. It costs no space and
            no time; but only for a source whose files nobody writes to from then on.
        progress: called with the title of each stage as it begins.

    Raises:
        AlreadyExists: the version is there, or another process is publishing it.
        ResourceExhausted: no space is left.
        SpikelessError: a step refused it, the arguments are wrong, the file system failed. In all these cases
            the versions in the repository are what they were.
    """
    source = Path(saved_model)
    directory = _model_directory(models, name)
    if version is not None and not 0 <= version <= MAX_VERSION:
        raise InvalidArgument(f"version {version} of {name} must be between 0 and {MAX_VERSION}")
    if is_mapped(source):
        # Their content is compared in the copy, which servers will map.
        check_mapped_files(source, read_manifest(source), digests=False)
    check_files(source)
    for step in steps:
        step.early(source)
    with ExitStack() as stack:
        with atomic.reported_errors(f"publish to {directory}"):
            number, staging = stack.enter_context(_reserved(directory, version))
            candidate = Candidate(staging / "version", name, number, directory / str(number))
            progress("copying")
            atomic.copy_tree(source, candidate.path, link=link)
            if is_mapped(candidate.path):
                progress("checking mapped files")
                repin(candidate.path)  # its steps find the files of the copy
            for step in steps:
                progress(step.title)
                step.run(candidate)
            if is_mapped(candidate.path):
                _prepare_mapped(candidate, serving_root or str(Path(models).absolute()))
            progress("writing to disk")
            atomic.make_readable(candidate.path)
            atomic.sync_tree(candidate.path)
        yield candidate


def _prepare_mapped(candidate: Candidate, serving_root: str) -> None:
    """Let a mapped version name its files where servers will see them, and fill the page cache."""
    root = f"{serving_root.rstrip('/')}/{candidate.name}/{candidate.target.name}"
    for record in repin(candidate.path, root, digests=False).mapped_files():
        path = candidate.path / record.path
        path.chmod(READ_ONLY)  # a server that has it mapped would not survive a change
        pages.prefetch(path)


def _model_directory(models: str | os.PathLike[str], name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"model name {name!r} must be letters, digits, '_', '-' and '.', starting with a letter or '_'"
        )
    return Path(models) / name


@contextmanager
def _reserved(directory: Path, version: int | None) -> Iterator[tuple[int, Path]]:
    """A version number that nobody else gets, and the staging directory that reserves it by its name."""
    _make_directory(directory)
    state = directory / STATE_DIRECTORY
    state.mkdir(exist_ok=True)
    with ExitStack() as stack:
        with locks.acquire(state / "lock"):
            # In this order: a publisher renames its version before it gives up its reservation.
            reserved = {int(path.name.partition("-")[0]) for path in atomic.staged(state / "staging")}
            published = list_versions(directory)
            number = max([0, *published, *reserved]) + 1 if version is None else version
            if number in published:
                raise AlreadyExists(f"{published[number]} is there already; versions are never overwritten")
            if number in reserved:
                raise AlreadyExists(f"{directory / str(number)} is being published by another process")
            if number > MAX_VERSION:
                raise InvalidArgument(f"{directory} has the highest version there is; give a free one")
            staging = stack.enter_context(atomic.staging(state / "staging", prefix=f"{number}-"))
        yield number, staging


def _make_directory(path: Path) -> None:
    """Create a directory that a server of another user can list, and its parents."""
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(exist_ok=True)
    path.chmod(atomic.DIRECTORY_MODE)
    atomic.sync(path.parent)


def _rename(staged: Path, target: Path) -> Path:
    try:
        # Fails where anything but an empty directory is in the way.
        staged.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise AlreadyExists(f"{target} appeared meanwhile; versions are never overwritten") from None
    atomic.sync(target.parent)
    return target
