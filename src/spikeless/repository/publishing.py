"""Publishing: a SavedModel becomes a version, which servers see whole or not at all.

In: a SavedModel from anywhere. Out: the same as a version that TensorFlow Serving picks
up by polling, and a record in the journal.

A server takes every child of ``<models>/<name>/`` whose name is an integer for a
version and loads it at once; there is no marker for "complete". So a version is built
in ``<models>/<name>/.spikeless/staging/``, which servers ignore and which is on the
same file system, passes its gates there (`spikeless.repository.gates`), and gets
its number by a single rename at the very end. Whatever happens before that, a kill
included, leaves the versions as they were; the next publish removes what is left of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from spikeless.disk import atomic, locks, pages
from spikeless.errors import AlreadyExists, InvalidArgument
from spikeless.formats.checkpoint import READ_ONLY
from spikeless.formats.savedmodel import SAVED_MODEL_FILE
from spikeless.formats.versions import MAX_VERSION, list_versions
from spikeless.mapping import check_files as check_mapped_files
from spikeless.mapping import is_mapped, read_manifest, repin
from spikeless.mapping.manifest import here
from spikeless.repository import layout, origin
from spikeless.repository.candidate import Candidate
from spikeless.repository.checks import check_files
from spikeless.repository.gates import GATES, Gate
from spikeless.repository.origin import Origin, Taken

#: In a model's state directory.
STAGING = "staging"


def publish(
    saved_model: str | os.PathLike[str],
    models: str | os.PathLike[str],
    name: str,
    version: int | None = None,
    *,
    gates: Sequence[Gate] = GATES,
    serving_root: str | None = None,
    progress: Callable[[str], None] = lambda title: None,
) -> Path:
    """Copy a SavedModel into the repository as a new version and return its directory.

    Arguments and errors are those of `stage`.
    """
    with stage(
        saved_model, models, name, version, gates=gates, serving_root=serving_root, progress=progress
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
    gates: Sequence[Gate] = GATES,
    serving_root: str | None = None,
    link: bool = False,
    digests: bool = True,
    registered: Origin | None = None,
    progress: Callable[[str], None] = lambda title: None,
) -> Iterator[Candidate]:
    """Do all of publishing but the last step, which is ``candidate.publish()``.

    A candidate that is not published is gone at the end of the block. The copy holds
    what links in the source point at (`spikeless.disk.atomic.copy_tree`) and every user
    can read it, whatever the modes in the source. The source is left as it is.

    Args:
        saved_model: the directory with ``saved_model.pb``.
        models: the repository; created when it is not there.
        name: the model's name: letters, digits, ``_``, ``-``, ``.``; a letter or ``_``
            first.
        version: its number, from 0 to 2**63 - 1; by default one more than the highest
            that is there or being published, or 1.
        gates: what the staged copy has to pass, in this order
            (`spikeless.repository.gates.GateSettings.pipeline`).
        serving_root: the absolute path at which servers see the repository; where it is
            here by default. A mapped version names its files by it
            (`spikeless.mapping`).
        link: share the source's files by hard links where the file system allows it,
            which costs neither space nor time. Nothing may write to the source's files
            from then on.
        digests: compare the content of mapped files with their digests, which reads all
            of them. Without, for links to files that were compared already.
        registered: what a registry calls the source; the version is told, and the
            journal. By default the journal has the path.
        progress: called with the title of each stage as it begins.

    Raises:
        AlreadyExists: the version is there, or another process is publishing it.
        ResourceExhausted: no space is left.
        SpikelessError: a gate refused it, the arguments are wrong, the file system
            failed. In all these cases the versions in the repository are what they
            were.
    """
    source = Path(saved_model)
    directory = layout.model_directory(models, name)
    if version is not None and not 0 <= version <= MAX_VERSION:
        raise InvalidArgument(f"version {version} of {name} must be between 0 and {MAX_VERSION}")
    if is_mapped(source):
        # Their content is compared in the copy, which servers will map.
        check_mapped_files(source, read_manifest(source), digests=False)
    check_files(source)
    for gate in gates:
        gate.early(source)
    stable = layout.stable_version(models, name)
    with ExitStack() as stack:
        with atomic.reported_errors(f"publish to {directory}"):
            if not Path(models).exists():
                progress(f"making a new model repository, {models}")
            number, staging = stack.enter_context(_reserved(directory, version))
            came_from = registered or Origin(str(source.absolute()))
            candidate = Candidate(staging / "version", directory / str(number), came_from, stable)
            progress("copying")
            atomic.copy_tree(source, candidate.path, link=link)
            if is_mapped(candidate.path):
                progress("checking mapped files")
                repin(candidate.path, digests=digests)  # its gates find the files of the copy
            for gate in gates:
                progress(gate.title)
                gate.run(candidate)
                candidate.passed.append(gate.name)
            for warning in candidate.warnings:
                progress(f"warning: {warning}")
            if is_mapped(candidate.path):
                _prepare_mapped(candidate, serving_root or here(Path(models)))
            if registered is not None:
                taken = Taken(registered, tuple(candidate.passed), candidate.findings)
                origin.write(candidate.path, taken)
            _keep_time(source, candidate.path)
            progress("writing to disk")
            atomic.make_readable(candidate.path)
            atomic.sync_tree(candidate.path)
            candidate.size = atomic.size_of(candidate.path)
        yield candidate


def _keep_time(source: Path, copy: Path) -> None:
    """Let the time of the graph's file be when it was exported, as at its source."""
    status = (source / SAVED_MODEL_FILE).stat()
    os.utime(copy / SAVED_MODEL_FILE, ns=(status.st_atime_ns, status.st_mtime_ns))


def _prepare_mapped(candidate: Candidate, serving_root: str) -> None:
    """Pin a mapped version to the paths that servers see, and fill the page cache."""
    root = f"{serving_root.rstrip('/')}/{candidate.name}/{candidate.version}"
    for record in repin(candidate.path, root, digests=False).mapped_files():
        path = candidate.path / record.path
        path.chmod(READ_ONLY)  # a server that has it mapped would not survive a change
        pages.prefetch(path)


@contextmanager
def _reserved(directory: Path, version: int | None) -> Iterator[tuple[int, Path]]:
    """A version number for nobody else, and the staging directory that reserves it."""
    atomic.make_directory(directory)
    state = layout.state_directory(directory.parent, directory.name)
    state.mkdir(exist_ok=True)
    with ExitStack() as stack:
        with locks.acquire(state / "lock"):
            # In this order: a publisher renames its version before it gives up its
            # reservation.
            reserved = {int(path.name.partition("-")[0]) for path in atomic.staged(state / STAGING)}
            published = list_versions(directory)
            number = max([0, *published, *reserved]) + 1 if version is None else version
            if number in published:
                raise AlreadyExists(f"{published[number]} is there already; versions are never overwritten")
            if number in reserved:
                raise AlreadyExists(f"{directory / str(number)} is being published by another process")
            if number > MAX_VERSION:
                raise InvalidArgument(f"{directory} has the highest version there is; give a free one")
            staging = stack.enter_context(atomic.staging(state / STAGING, prefix=f"{number}-"))
        yield number, staging
