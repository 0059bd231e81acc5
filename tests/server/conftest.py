"""The servers that the conformance suite shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from harness import IS_EMBEDDED, Running, ServerFactory, model_config, put_version, run_server

from spikeless.formats.states import State


@pytest.fixture
def embedded() -> None:
    """Skip where the server under test is not the embedded engine."""
    if not IS_EMBEDDED:
        pytest.skip("only the embedded engine has this")


@pytest.fixture
def serve(tmp_path: Path) -> ServerFactory:
    """Start a server of one's own: ``with serve(*flags, **settings) as running``."""

    def start(*flags: str, **settings: object) -> AbstractContextManager[Running]:
        number = len(list(tmp_path.glob("server*.log")))
        return run_server(tmp_path / f"server{number}.log", *flags, **settings)

    return start


#: The models of the shared server, each with one version, and ``times`` with two and a
#: label for each.
SHARED_MODELS = ("signatures", "dtypes", "examples")


@pytest.fixture(scope="session")
def shared(saved_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for all tests that only send requests and change nothing."""
    directory = tmp_path_factory.mktemp("shared")
    for name in SHARED_MODELS:
        put_version(saved_models / name, directory / name, 1)
    put_version(saved_models / "times_one", directory / "times", 1)
    put_version(saved_models / "times_two", directory / "times", 2)
    config = model_config(*((name, directory / name) for name in SHARED_MODELS))
    times = config.model_config_list.config.add(
        name="times", base_path=str(directory / "times"), model_platform="tensorflow"
    )
    times.model_version_policy.all.SetInParent()
    times.version_labels.update({"stable": 1, "canary": 2})
    (directory / "models.config").write_text(str(config))
    monitoring = directory / "monitoring.config"
    monitoring.write_text('prometheus_config { enable: true path: "/monitoring/prometheus/metrics" }')
    with run_server(
        directory / "server.log",
        f"--model_config_file={directory / 'models.config'}",
        # A label may not name a version before it is available, and at the start none
        # is.
        "--allow_version_labels_for_unavailable_models=true",
        "--grpc_max_threads=64",
        f"--monitoring_config_file={monitoring}",
        rest=True,
        wait_for=(*SHARED_MODELS, "times"),
    ) as running:
        running.wait("times", {1: State.AVAILABLE, 2: State.AVAILABLE})
        yield running
        assert running.server.exit_code is None, f"the server died:\n{running.server.log_tail()}"
