"""What Spikeless asks of an MLflow tracking server.

In: a model URI. Out: what it names now, its files, and tags on it. Where the server is
and what it wants to see is MLflow's own business: ``MLFLOW_TRACKING_URI``,
``MLFLOW_REGISTRY_URI``, ``MLFLOW_TRACKING_TOKEN`` and the like.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from spikeless.disk import atomic
from spikeless.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SpikelessError,
    Unavailable,
)
from spikeless.registry.mlflow_models import MODELS, RUNS
from spikeless.repository.origin import Origin

#: Folders in folders, and files: a model has far fewer.
_MAX_FILES = 100_000
#: MLflow's settings where nobody says otherwise: its 7 retries take minutes, what it
#: reports about its use goes to a third party, and its progress bars fill logs.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
#: MLflow's error codes -> ours; any other is taken to be a server that cannot answer.
_KINDS: dict[str, type[SpikelessError]] = {
    "RESOURCE_DOES_NOT_EXIST": NotFound,
    "NOT_FOUND": NotFound,
    "INVALID_PARAMETER_VALUE": InvalidArgument,
    "BAD_REQUEST": InvalidArgument,
    "PERMISSION_DENIED": FailedPrecondition,
    "UNAUTHENTICATED": FailedPrecondition,
    "FEATURE_DISABLED": FailedPrecondition,
}


@dataclass(frozen=True)
class Release:
    """What a URI named when it was asked."""

    #: Where its origin and its files are: a URI that names nothing else later.
    origin: Origin
    #: The registered model, and its version; none for the model of a run.
    name: str = ""
    version: int | None = None
    #: The version's tags.
    tags: Mapping[str, str] = field(default_factory=dict)


class Registry:
    """A tracking server and its model registry, as MLflow's settings name them."""

    def __init__(self) -> None:
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        import mlflow.artifacts

        if not mlflow.is_tracking_uri_set():
            # MLflow would make a database in the working directory.
            raise FailedPrecondition("no MLflow server is named: set MLFLOW_TRACKING_URI")
        self._artifacts: Any = mlflow.artifacts
        self._client: Any = mlflow.MlflowClient()

    def resolve(self, uri: str) -> Release:
        """What a URI names now.

        Args:
            uri: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``,
                ``models:/NAME/latest``, ``models:/MODEL_ID`` or ``runs:/RUN/PATH``.

        Raises:
            NotFound: it names nothing.
            InvalidArgument: it is none of these.
            Unavailable: the tracking server does not answer.
        """
        with _reported(f"find {uri}", "does it exist, and is MLFLOW_TRACKING_URI right?"):
            if uri.startswith(RUNS):
                return self._of_run(uri)
            rest = uri.removeprefix(MODELS).strip("/")
            if "@" in rest:
                name, _, alias = rest.rpartition("@")
                return self._registered(self._client.get_model_version_by_alias(name, alias))
            name, _, which = rest.rpartition("/")
            if not name:
                return self._logged(rest)
            if which.isdecimal():
                return self._registered(self._client.get_model_version(name, which))
            if which.lower() != "latest":
                raise InvalidArgument(
                    f"{uri} names a stage, which MLflow gave up: set an alias and say models:/{name}@ALIAS"
                )
            return self._registered(self._latest(name))

    def _latest(self, name: str) -> Any:
        self._client.get_registered_model(name)  # says so when there is none
        quoted = name.replace("'", "''")
        found = self._client.search_model_versions(
            f"name='{quoted}'", max_results=1, order_by=["version_number DESC"]
        )
        if not found:
            raise NotFound(f"{MODELS}{name} has no version: register one")
        return found[0]

    def _of_run(self, uri: str) -> Release:
        run, _, path = uri.removeprefix(RUNS).strip("/").partition("/")
        if not path:
            raise InvalidArgument(f"{uri} names no folder: say {RUNS}RUN/PATH")
        info = self._client.get_run(run).info
        return Release(Origin(f"{RUNS}{run}/{path}", run, info.start_time or 0))

    def _logged(self, model: str) -> Release:
        if not model.startswith("m-"):
            raise InvalidArgument(f"{MODELS}{model} names no version: say {MODELS}{model}@ALIAS")
        found = self._client.get_logged_model(model)
        return Release(Origin(f"{MODELS}{model}", found.source_run_id or "", found.creation_timestamp or 0))

    def _registered(self, found: Any) -> Release:
        name, version = str(found.name), int(found.version)
        origin = Origin(
            f"{MODELS}{name}/{version}", str(found.run_id or ""), int(found.creation_timestamp or 0)
        )
        return Release(origin, name, version, dict(found.tags))

    def download(self, release: Release, directory: Path) -> Path:
        """Fetch the release's files into a new directory; returns where they are.

        Raises:
            NotFound: it has no files.
            ResourceExhausted: they do not fit on the disk; nothing was fetched.
            DataLoss: a file would not stay in the directory.
            Unavailable: the store does not answer.
        """
        uri = release.origin.source
        with (
            _reported(f"fetch {uri}", "does the store of its files answer?"),
            atomic.reported_errors(f"fetch {uri} to {directory}"),
        ):
            directory.mkdir()
            needed, free = self._size(uri), shutil.disk_usage(directory).free
            if needed > free:
                raise ResourceExhausted(
                    f"{uri} has {needed / 1e6:.0f} MB, and {directory} has room for {free / 1e6:.0f} MB; "
                    "make room and try again"
                )
            return Path(self._artifacts.download_artifacts(artifact_uri=uri, dst_path=str(directory)))

    def _size(self, uri: str) -> int:
        """Bytes of all files, whose paths are checked."""
        size = count = 0
        folders = [uri]
        while folders:
            for item in self._artifacts.list_artifacts(artifact_uri=folders.pop()):
                path = PurePosixPath(item.path)
                if path.is_absolute() or ".." in path.parts:
                    raise DataLoss(f"{uri} has a file outside its folder, {item.path}: log the model again")
                count += 1
                if count > _MAX_FILES:
                    raise ResourceExhausted(f"{uri} has more than {_MAX_FILES} files: is it a model?")
                if item.is_dir:
                    folders.append(f"{uri}/{path.name}" if "/" not in item.path else f"{uri}/{item.path}")
                size += item.file_size or 0
        if not count:
            raise NotFound(f"{uri} has no files: log the model again")
        return size

    def tag(self, release: Release, tags: Mapping[str, str | None]) -> None:
        """Set the tags that differ; None removes one. A run's model gets none.

        Raises:
            Unavailable: the tracking server does not answer.
        """
        if release.version is None:
            return
        with _reported(f"tag {release.origin.source}", "repeat the command to write what is missing"):
            for key, value in tags.items():
                if value is None and key in release.tags:
                    self._client.delete_model_version_tag(release.name, str(release.version), key)
                elif value is not None and release.tags.get(key) != value:
                    self._client.set_model_version_tag(release.name, str(release.version), key, value)


@contextmanager
def _reported(what: str, remedy: str) -> Iterator[None]:
    """Report MLflow's errors, and those of the libraries that it calls, as ours."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        kind = _KINDS.get(error.error_code, Unavailable)
        raise kind(f"cannot {what}: {_first_line(error)}; {remedy}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        # Of requests: the disk's errors have numbers.
        raise Unavailable(f"cannot {what}: {_first_line(error)}; {remedy}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:500].rstrip(".")
