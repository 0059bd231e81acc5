"""The conformance suite's tools: servers with a client, versions, expected errors.

Everything here runs on the embedded engine, or on the ``tensorflow_model_server`` that
``SPIKELESS_SERVER`` names. Where the two differ, ``differences.toml`` says so and why.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from spikeless import launch
from spikeless.client import Client
from spikeless.errors import Code, SpikelessError
from spikeless.formats.protos import model_server_config_pb2
from spikeless.formats.states import State

ENGINE = os.environ.get(launch.ENGINE_VARIABLE) or "embedded"
IS_EMBEDDED = ENGINE == "embedded"
#: The shortest time between two looks that the server takes: TensorFlow Serving only
#: takes whole seconds.
POLL_SECONDS = 0.1 if IS_EMBEDDED else 1
POLL = f"--file_system_poll_wait_seconds={POLL_SECONDS}"

Config: TypeAlias = model_server_config_pb2.ModelServerConfig


@contextmanager
def refused(code: Code, message: str = "") -> Iterator[None]:
    """The call inside must fail with this status code and a message that matches."""
    with pytest.raises(SpikelessError) as caught:
        yield
    assert (caught.value.code, str(caught.value)) == (code, caught.value.args[0])
    assert re.search(message, str(caught.value)), str(caught.value)


def put_version(saved_model: Path, models: Path, version: int) -> Path:
    """Publish a SavedModel: copied beside, then one rename, as publishers do."""
    models.mkdir(parents=True, exist_ok=True)
    staged = models / f"staging-{version}"
    shutil.copytree(saved_model, staged)
    return staged.rename(models / str(version))


def model_config(*models: tuple[str, Path], **settings: Any) -> Config:
    """A configuration of each ``(name, base path)``, all with these settings."""
    config = Config()
    for name, base_path in models:
        entry = config.model_config_list.config.add(
            name=name, base_path=str(base_path), model_platform="tensorflow"
        )
        entry.MergeFrom(model_server_config_pb2.ModelConfig(**settings))
    return config


def states(client: Client, name: str) -> dict[int, State]:
    """The state of each version that the server knows of."""
    try:
        return {status.version: status.state for status in client.statuses(name)}
    except SpikelessError as error:
        if error.code is not Code.NOT_FOUND:
            raise
        return {}


def in_progress(address: str) -> dict[str, int]:
    """How many calls each transport is answering, from the metrics at ``host:port``."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", "/monitoring/prometheus/metrics")
    text = connection.getresponse().read().decode()
    found = re.findall(r'^spikeless_calls_in_progress\{entrypoint="(\w+)"\} (\d+)', text, re.MULTILINE)
    return {entrypoint: int(count) for entrypoint, count in found}


class Running:
    """A server with a client: what most tests need."""

    def __init__(self, server: launch.ServerProcess, client: Client) -> None:
        self.server = server
        self.client = client

    @property
    def rest_url(self) -> str:
        assert self.server.rest_url is not None
        return self.server.rest_url

    def wait(self, name: str, expected: dict[int, State]) -> None:
        """Wait until these versions have these states, and all others have ended."""

        def reached() -> bool:
            # A server may forget a version that has ended.
            known = {**dict.fromkeys(expected, State.END), **states(self.client, name)}
            return known == {**dict.fromkeys(known, State.END), **expected}

        self.server.wait_for(reached, f"{name} to reach {expected}", timeout=60.0)


@contextmanager
def run_server(log: Path, *flags: str, **settings: object) -> Iterator[Running]:
    """Start a server with these flags, wait until it is ready, stop it at the end.

    It logs what it does, whatever the level that this process's own TensorFlow has.
    """
    settings.setdefault("environment", {"TF_CPP_MIN_LOG_LEVEL": "0"})
    launch_settings = launch.LaunchSettings(flags=flags, log=log, **settings)  # type: ignore[arg-type]
    with launch.start(launch_settings) as server, Client(server.target, timeout=60.0) as client:
        yield Running(server, client)


ServerFactory = Callable[..., AbstractContextManager[Running]]
