"""Publish a release of the registry, and tell the registry what became of it.

In: a release. Out: the version ``<models>/<name>/<the registry's version>/``, and tags:

``spikeless.state``     ``published``, ``promoted`` or ``refused``
``spikeless.model``     the model's name in the repository
``spikeless.version``   its version there
``spikeless.gates``     the gates that it passed
``spikeless.findings``  what the trial found, as JSON (`spikeless.repository.journal`)
``spikeless.error``     why it was refused or not promoted
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from spikeless.disk import atomic
from spikeless.errors import (
    AlreadyExists,
    DataLoss,
    InvalidArgument,
    NotFound,
    SpikelessError,
    Unimplemented,
)
from spikeless.registry.mlflow_models import saved_model_in, warm
from spikeless.registry.tracking import Registry, Release
from spikeless.repository import layout, origin, publishing
from spikeless.repository.candidate import Candidate
from spikeless.repository.gates import GATES, Gate
from spikeless.repository.trial import GateError
from spikeless.warmup import SampleFile

STATE, ERROR = "spikeless.state", "spikeless.error"
PUBLISHED, PROMOTED, REFUSED = "published", "promoted", "refused"
#: Errors that the same model would meet again.
REFUSALS = (GateError, InvalidArgument, NotFound, DataLoss, Unimplemented)
_DOWNLOADS = "downloads"
#: Characters; MLflow takes 5,000.
_MAX_TAG = 1000


def publish(
    registry: Registry,
    release: Release,
    models: str | os.PathLike[str],
    name: str = "",
    version: int | None = None,
    *,
    gates: Sequence[Gate] = GATES,
    serving_root: str | None = None,
    samples: tuple[SampleFile, ...] = (),
    progress: Callable[[str], None] = lambda title: None,
    dry_run: bool = False,
) -> Candidate:
    """Make a release a version in the repository; one that is there stays as it is.

    Args:
        name: the model's name in the repository; by default the registered model's.
        version: its number; by default the registry's, or for the model of a run the
            next free one.
        samples: what to build a warmup file from, where the model brings none; by
            default the input example that MLflow keeps with a model.
        dry_run: pass the gates and change nothing, here and in the registry.

    The other arguments, and errors, are those of
    `spikeless.repository.publishing.stage`, and:

    Raises:
        AlreadyExists: the version is there, and comes from somewhere else.
        Unavailable: the registry does not answer. When it went away after publishing,
            the same call writes the tags later.
    """
    name = name or release.name
    if not name:
        raise InvalidArgument(f"{release.origin.source} is no registered model: give it a NAME")
    number = release.version if version is None else version
    candidate = _published(release, models, name, number)
    if candidate is not None:
        progress(f"{candidate.target} is there already")
        _clear(models, name)
    else:
        arguments = (registry, release, models, name, number, gates, serving_root, samples, progress)
        try:
            with _staged(*arguments) as candidate:
                progress("it could be published" if dry_run else "publishing")
                if not dry_run:
                    candidate.publish()
        except REFUSALS as error:
            if not dry_run:
                registry.tag(release, {STATE: REFUSED, ERROR: str(error)[:_MAX_TAG]})
            raise
    if not dry_run:
        registry.tag(release, _tags(release, candidate))
    return candidate


def _published(
    release: Release, models: str | os.PathLike[str], name: str, number: int | None
) -> Candidate | None:
    """The version, where it is there and is this release."""
    path = None if number is None else layout.versions(models, name).get(number)
    if path is None:
        return None
    taken = origin.read(path)
    if taken is None or taken.origin != release.origin:
        other = "elsewhere" if taken is None else taken.origin.source
        raise AlreadyExists(
            f"{path} is there already and comes from {other}, not from this {release.origin.source}: give "
            "another NAME, or publish it with another --version"
        )
    size = atomic.size_of(path)
    return Candidate(path, path, taken.origin, size=size, passed=list(taken.gates), findings=taken.findings)


def _clear(models: str | os.PathLike[str], name: str) -> None:
    """Remove what a process left that was killed after it had published."""
    state = layout.state_directory(models, name)
    with atomic.reported_errors(f"clear {state}"):
        for folder in (_DOWNLOADS, publishing.STAGING):
            atomic.staged(state / folder)


@contextmanager
def _staged(
    registry: Registry,
    release: Release,
    models: str | os.PathLike[str],
    name: str,
    number: int | None,
    gates: Sequence[Gate],
    serving_root: str | None,
    samples: tuple[SampleFile, ...],
    progress: Callable[[str], None],
) -> Iterator[Candidate]:
    """A release that has passed the gates."""
    directory = layout.model_directory(models, name)
    with atomic.reported_errors(f"publish to {directory}"):
        atomic.make_directory(directory)
        downloads = atomic.staging(layout.state_directory(models, name) / _DOWNLOADS)
    with downloads as folder:
        progress(f"fetching {release.origin.source}")
        fetched = registry.download(release, folder / "model")
        try:
            saved_model = saved_model_in(fetched, progress)
            warm(saved_model, fetched, samples, progress)
        except SpikelessError as error:
            reason = str(error).replace(f"{fetched}/", "")
            raise type(error)(f"{release.origin.source}: {reason}") from None
        staged = publishing.stage(
            saved_model,
            models,
            name,
            number,
            gates=gates,
            serving_root=serving_root,
            link=True,  # nobody else has the files
            registered=release.origin,
            progress=progress,
        )
        with staged as candidate:
            yield candidate


def _tags(release: Release, candidate: Candidate) -> dict[str, str | None]:
    tags: dict[str, str | None] = {
        "spikeless.model": candidate.name,
        "spikeless.version": str(candidate.version),
        "spikeless.gates": ",".join(candidate.passed),
        "spikeless.findings": json.dumps(dataclasses.asdict(candidate.findings)),
    }
    # A promotion that failed keeps its reason.
    if release.tags.get(STATE) not in (PUBLISHED, PROMOTED):
        tags |= {STATE: PUBLISHED, ERROR: None}
    return tags
