"""The models that a server answers for, as its transports see them.

In: a ``ModelSpec``. Out: the loaded model, or the states of versions. Where versions
come from is for `spikeless.engine.core` to say, or for
`spikeless.engine.workers.replica`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

from spikeless.errors import InvalidArgument, NotFound
from spikeless.formats.protos import model_pb2, model_server_config_pb2
from spikeless.formats.states import VersionStatus
from spikeless.runtime.model import Model

#: Name -> label -> version.
Labels = dict[str, dict[str, int]]


class ServedModels(ABC):
    """Look-up for requests, and the configuration that is in force."""

    def __init__(self) -> None:
        # Both are replaced as a whole.
        self._config = model_server_config_pb2.ModelServerConfig()
        self._labels: Labels = {}

    @abstractmethod
    def available(self, name: str) -> list[int]:
        """The versions of ``name`` that are available, lowest first."""

    @abstractmethod
    def version_statuses(self, name: str) -> list[VersionStatus]:
        """Every version of ``name`` that was ever wanted, lowest first."""

    @abstractmethod
    def add_listener(self, listener: Callable[[str, VersionStatus], None]) -> None:
        """Call ``listener(name, status)`` at each change of state; it may not block."""

    @abstractmethod
    def reload_config(self, config: model_server_config_pb2.ModelServerConfig) -> None:
        """Replace the configuration; return when every new model is available.

        Raises:
            InvalidArgument: the configuration is wrong; the old one stays.
            FailedPrecondition: a label points at a version that is not available; the
                old one stays.
            SpikelessError: a new model could not be loaded (UNKNOWN); the new
                configuration is in force.
        """

    @abstractmethod
    def stop(self) -> None:
        """Wait for running requests, and unload everything."""

    @abstractmethod
    def _lend(self, name: str, version: int | None) -> AbstractContextManager[Model]:
        """Lend a version, by default the highest; NotFound where it is not there."""

    @property
    def config(self) -> model_server_config_pb2.ModelServerConfig:
        """A copy of the configuration that is in force."""
        copy = model_server_config_pb2.ModelServerConfig()
        copy.CopyFrom(self._config)
        return copy

    @property
    def labels(self) -> Labels:
        """The versions that labels are on."""
        return {name: dict(labels) for name, labels in self._labels.items()}

    def model_names(self) -> list[str]:
        """The names of the configured models."""
        return [config.name for config in self._config.model_config_list.config]

    def is_configured(self, name: str) -> bool:
        """Whether the configuration has a model of this name."""
        return name in self._labels

    def use(self, spec: model_pb2.ModelSpec) -> AbstractContextManager[Model]:
        """Lend the model of a ``ModelSpec``: by version or label, or the latest.

        To the ``with`` statement that asks for it; it is not closed while it is lent.

        Raises:
            InvalidArgument: no name, or a label that is not assigned.
            NotFound: no such model or version is available.
        """
        name = spec.name
        if not name:
            raise InvalidArgument("ModelSpec has no name specified.")
        version = self.version_of(spec)
        while True:
            try:
                return self._lend(name, version)
            except NotFound:
                # The label may have moved meanwhile, and its old version be gone.
                asked, version = version, self.version_of(spec)
                if asked == version:
                    raise

    def version_of(self, spec: model_pb2.ModelSpec) -> int | None:
        """The version that a ``ModelSpec`` asks for; None for the latest."""
        choice = spec.WhichOneof("version_choice")
        if choice == "version":
            return int(spec.version.value)
        if choice == "version_label":
            version = self._labels.get(spec.name, {}).get(spec.version_label)
            if version is None:
                raise InvalidArgument(f"Unrecognized servable version label: {spec.version_label}")
            return version
        return None

    def statuses(self, spec: model_pb2.ModelSpec) -> list[VersionStatus]:
        """The state of one version, or of all versions, of a model.

        A label says nothing here, as in TensorFlow Serving: all versions are listed.

        Raises:
            NotFound: the model or the version was never seen.
        """
        version = int(spec.version.value) if spec.HasField("version") else None
        statuses = self.version_statuses(spec.name)
        if version is not None:
            statuses = [status for status in statuses if status.version == version]
            if not statuses:
                raise NotFound(f"Could not find version {version} of model {spec.name}")
        elif not statuses:
            raise NotFound(f"Could not find any versions of model {spec.name}")
        return statuses
