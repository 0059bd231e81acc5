"""What every worker says of models: the configuration, labels, states of versions.

In: the core of the process that leads. Out: the same in each worker, as JSON.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any

from spikeless.client import RemoteError
from spikeless.engine.served_models import Labels, ServedModels
from spikeless.errors import Code, SpikelessError
from spikeless.formats.protos import model_server_config_pb2
from spikeless.formats.states import State, VersionStatus


@dataclass(frozen=True)
class View:
    """The models as a caller may see them at one moment."""

    config: model_server_config_pb2.ModelServerConfig = field(
        default_factory=model_server_config_pb2.ModelServerConfig
    )
    labels: Labels = field(default_factory=dict)
    #: Name -> the states of its versions, lowest first.
    statuses: dict[str, list[VersionStatus]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "config": encode_config(self.config),
            "labels": self.labels,
            "statuses": {
                name: [[one.version, one.state.value, *_error(one.error)] for one in statuses]
                for name, statuses in self.statuses.items()
            },
        }

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> View:
        return cls(
            decode_config(message["config"]),
            message["labels"],
            {name: [_status(*one) for one in statuses] for name, statuses in message["statuses"].items()},
        )


def of(core: ServedModels, names: list[str]) -> View:
    """What a core says of its models, and of those that it had."""
    return View(core.config, core.labels, {name: core.version_statuses(name) for name in names})


def encode_config(config: model_server_config_pb2.ModelServerConfig) -> str:
    return base64.b64encode(config.SerializeToString()).decode()


def decode_config(text: str) -> model_server_config_pb2.ModelServerConfig:
    return model_server_config_pb2.ModelServerConfig.FromString(base64.b64decode(text))


def _error(error: SpikelessError | None) -> list[Any]:
    return [] if error is None else [error.code.value, str(error)]


def _status(version: int, state: int, code: int | None = None, message: str = "") -> VersionStatus:
    return VersionStatus(version, State(state), None if code is None else RemoteError(Code(code), message))
