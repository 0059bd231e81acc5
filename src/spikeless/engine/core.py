"""The models of a server: configuration, labels, versions and look-up for requests.

In: a ``ModelServerConfig`` (``model_config_list``), at the start and again at each
reload. Out: the loaded model for a ``ModelSpec``, and the states of versions. It knows
no transport.

The rules, and the messages that clients see, are those of TensorFlow Serving's
``server_core.cc``: a new configuration replaces the whole of the old one; it is checked
as a whole, and one that is refused leaves everything as it was; a label may only point
at a version that is available.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from spikeless.engine.flags import DEFAULTS, ServerFlags
from spikeless.engine.manager import Manager
from spikeless.engine.served_models import Labels, ServedModels
from spikeless.errors import FailedPrecondition, InvalidArgument, SpikelessError
from spikeless.formats.protos import model_server_config_pb2
from spikeless.formats.states import VersionStatus
from spikeless.formats.versions import aspired_versions, list_versions
from spikeless.runtime.model import Model

_log = logging.getLogger(__name__)
_PLATFORM = "tensorflow"


class ServerCore(ServedModels):
    """Keeps the models of a configuration loaded and lends them out: start, stop."""

    def __init__(self, loader: Callable[[str, int, Path], Any], flags: ServerFlags = DEFAULTS) -> None:
        """``loader`` makes a `Model` of a version, or else what is never lent."""
        super().__init__()
        self._flags = flags
        self.manager: Manager[Any] = Manager(loader, flags)
        # What is served of models whose wanted versions could not be loaded at start.
        self._instead: dict[str, Mapping[int, Path]] = {}
        self._reloading = threading.Lock()
        self._polling = threading.Lock()
        self._complaints: list[str] = []
        self._stopping = threading.Event()
        self._poller = threading.Thread(target=self._poll_forever, name="poll", daemon=True)

    def start(self, config: model_server_config_pb2.ModelServerConfig) -> None:
        """Load the models of ``config`` and poll.

        A version that cannot be loaded stops neither the other models nor the server:
        another version on disk is served instead of it, the next lower one if there is
        one, until a version that is wanted is available.

        Raises:
            InvalidArgument, FailedPrecondition: as from `reload_config`.
            SpikelessError: no model can be served.
        """
        self.manager.start()
        if self._flags.file_system_poll_wait_seconds > 0:
            self._poller.start()
        with self._reloading:
            self._put_in_force(config)
            failed = self.manager.wait_available(self.model_names(), all_have_versions=False)
            while failed and not self._stopping.is_set():
                replaced = [name for name, reason in failed.items() if self._replace(name, reason)]
                self.poll()
                failed = self.manager.wait_available(replaced)
            if names := self.model_names():
                self._require_one(names)
            self._move_labels()

    # --- configuration ----------------------------------------------------------------

    def reload_config(self, config: model_server_config_pb2.ModelServerConfig) -> None:
        with self._reloading:
            self._wait_for(sorted(self._put_in_force(config)))

    def _put_in_force(self, config: model_server_config_pb2.ModelServerConfig) -> set[str]:
        """Replace the configuration; returns the models that are new."""
        _validate(config, self.model_names())
        labels = self._checked_labels(config)
        old = set(self.model_names())
        # A poll that has begun with the old one would want its models again.
        with self._polling:
            self._config, self._labels = config, labels
            for name in old - set(self.model_names()):
                self.manager.set_aspired(name, {})
        self.poll()
        return set(self.model_names()) - old

    # --- the start --------------------------------------------------------------------

    def _replace(self, name: str, reason: str) -> bool:
        """Want another version of a model that failed; False when none is left."""
        config = next(model for model in self._config.model_config_list.config if model.name == name)
        tried = {status.version for status in self.manager.statuses(name)}
        limit = max(tried.union(config.model_version_policy.specific.versions), default=0)
        with suppress(SpikelessError):
            versions = list_versions(config.base_path)
            others = sorted(set(versions) - tried, key=lambda version: (version < limit, version))
            if others:
                self._instead[name] = {others[-1]: versions[others[-1]]}
                _log.warning("version %d of %s is served instead: %s", others[-1], name, reason)
                return True
        _log.error("%s is left out: %s", name, reason)
        return False

    def _require_one(self, names: list[str]) -> None:
        """Raise unless a model is available."""
        if not any(self.manager.available(name) for name in names):
            self._wait_for(names)

    def _move_labels(self) -> None:
        """Put labels of versions that are not available on the highest one that is."""
        for name, labels in self._labels.items():
            self.manager.wait_settled(name, labels.values())
            available = self.manager.available(name)
            for label, version in labels.items():
                if available and version not in available:
                    _log.error("label %s of %s is on version %d instead", label, name, available[-1])
                    labels[label] = available[-1]

    def _wait_for(self, names: list[str]) -> None:
        failed = self.manager.wait_available(names)
        if failed and not self._stopping.is_set():
            reasons = ", ".join(f"{{{reason}}}" for reason in failed.values())
            raise SpikelessError(f"{len(failed)} servable(s) did not become available: {reasons}")

    def _checked_labels(self, config: model_server_config_pb2.ModelServerConfig) -> Labels:
        labels: Labels = {}
        asked_before = {
            model.name: dict(model.version_labels) for model in self._config.model_config_list.config
        }
        for model in config.model_config_list.config:
            in_use = self._labels.get(model.name, {})
            available = self.manager.available(model.name)
            labels[model.name] = dict(model.version_labels)
            for label, version in model.version_labels.items():
                if version in available:
                    continue
                asked = asked_before.get(model.name, {}).get(label, version)
                if not self._flags.allow_version_labels_for_unavailable_models or asked != version:
                    raise FailedPrecondition(
                        f"Request to assign label to version {version} of model {model.name}, "
                        "which is not currently available for inference"
                    )
                # It was moved at the start, and nobody asks for anything else: a model
                # that is broken must not keep the others from being changed.
                now = in_use.get(label, version)
                if now != version:
                    _log.warning("label %s of %s stays on version %d", label, model.name, now)
                labels[model.name][label] = now
        return labels

    # --- versions on disk -------------------------------------------------------------

    def poll(self) -> None:
        """Tell the manager which of the versions in the file system are wanted."""
        with self._polling:
            complaints: list[str] = []
            for config in self._config.model_config_list.config:
                try:
                    versions = aspired_versions(config, complaints.append)
                except SpikelessError as error:
                    # A mount that comes and goes must not unload a model.
                    complaints.append(f"{error}, the base path of {config.name}")
                    continue
                if set(versions) & set(self.manager.available(config.name)):
                    self._instead.pop(config.name, None)
                self.manager.set_aspired(config.name, {**self._instead.get(config.name, {}), **versions})
            # Each is logged once, not at every poll.
            for complaint in complaints:
                if complaint not in self._complaints:
                    _log.warning("%s", complaint)
            self._complaints = complaints

    def _poll_forever(self) -> None:
        while not self._stopping.wait(self._flags.file_system_poll_wait_seconds):
            try:
                self.poll()
            except Exception:
                _log.exception("looking for versions")

    # --- what there is ----------------------------------------------------------------

    def available(self, name: str) -> list[int]:
        return self.manager.available(name)

    def version_statuses(self, name: str) -> list[VersionStatus]:
        return self.manager.statuses(name)

    def add_listener(self, listener: Callable[[str, VersionStatus], None]) -> None:
        self.manager.add_listener(listener)

    def _lend(self, name: str, version: int | None) -> AbstractContextManager[Model]:
        return self.manager.use(name, version)

    def stop(self) -> None:
        """Stop looking for versions, wait for running requests, unload everything."""
        self._stopping.set()
        if self._poller.is_alive():
            self._poller.join()
        self.manager.stop()


def _validate(config: model_server_config_pb2.ModelServerConfig, configured: Collection[str] = ()) -> None:
    """Refuse what cannot be served, and another platform for what is configured."""
    if config.WhichOneof("config") not in (None, "model_config_list"):
        raise InvalidArgument("only a model_config_list can be served, not a custom_model_config")
    seen: set[str] = set()
    for model in config.model_config_list.config:
        if not model.name:
            raise InvalidArgument("a model in the configuration has no name")
        if model.name in seen:
            raise InvalidArgument(f"Illegal to list model {model.name} multiple times in config list")
        seen.add(model.name)
        _check_platform(model, model.name in configured)
        if model.HasField("logging_config"):
            # TensorFlow Serving's own words: it comes without a log collector.
            raise InvalidArgument(
                f"No request-logger-creator provided: model {model.name} has a logging_config"
            )
        if not os.path.isabs(model.base_path):
            raise InvalidArgument(
                f"Expected model {model.name} to have an absolute path or URI; got base_path()="
                f"{model.base_path}"
            )


def _check_platform(model: model_server_config_pb2.ModelConfig, is_configured: bool) -> None:
    both = "ModelServerConfig::model_type (deprecated) {} ModelServerConfig::model_platform, model name is {}"
    if model.model_type and model.model_platform:
        raise InvalidArgument(f"Illegal setting both {both.format('and', model.name)}")
    if not model.model_type and not model.model_platform:
        raise InvalidArgument(f"Illegal setting neither {both.format('nor', model.name)}")
    if model.model_type not in (0, model_server_config_pb2.TENSORFLOW):
        raise InvalidArgument(f"ModelServerConfig::model_type choice {model.model_type} not supported.")
    if model.model_platform not in ("", _PLATFORM):
        if is_configured:
            raise InvalidArgument(
                f"Illegal to change a model's platform. For model {model.name} platform was {_PLATFORM} "
                f"and new platform requested is {model.model_platform}"
            )
        raise InvalidArgument(f"Model {model.name} requests unsupported platform {model.model_platform}")
