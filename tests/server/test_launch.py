"""Starting and stopping server processes: readiness, death, signals, allocator."""

import os
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from places import SUPPORT

from spikeless import launch
from spikeless.errors import InvalidArgument, NotFound, Unavailable

STAND_IN = SUPPORT / "stand_in.py"


@pytest.fixture
def engine(tmp_path: Path) -> str:
    """The stand-in as an executable, as a tensorflow_model_server would be."""
    script = tmp_path / "model_server"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models" / "1").mkdir(parents=True)
    return tmp_path / "models"


def settings(engine: str, models: Path, tmp_path: Path, *flags: str, **more: Any) -> launch.LaunchSettings:
    return launch.LaunchSettings(
        "boston", models, flags=flags, engine=engine, log=tmp_path / "server.log", **more
    )


def test_start_serve_and_stop(engine: str, models: Path, tmp_path: Path) -> None:
    with launch.start(settings(engine, models, tmp_path)) as server:
        assert server.engine == "tensorflow_model_server"
        assert server.engine_version == "0.0.0-stand-in"
        assert f"--port={server.port}" in server.command
        assert server.rest_url is None
        assert server.exit_code is None
        assert server.allocator().name == "glibc"
        assert os.getsid(server.pid) == server.pid, "the server has a session of its own"
        assert "serving" in server.log_tail()
    assert server.exit_code == 0


def test_a_server_that_does_not_optimise_graphs(engine: str, models: Path, tmp_path: Path) -> None:
    plain = settings(engine, models, tmp_path, "--num_load_threads=1")
    with launch.start(launch.unoptimizing(plain, tmp_path)) as server:
        file = tmp_path / "platform.config"
        assert server.command[-2:] == ["--num_load_threads=1", f"--platform_config_file={file}"]
        assert "disable_meta_optimizer: true" in file.read_text()
    embedded = settings(launch.EMBEDDED, models, tmp_path)
    assert launch.unoptimizing(embedded, tmp_path) == embedded
    docker = launch.unoptimizing(settings("docker", models, tmp_path), tmp_path)
    assert docker.environment == {"DISABLE_META_OPTIMIZER": "true"}


def test_jemalloc_is_proved_from_the_maps(engine: str, models: Path, tmp_path: Path) -> None:
    if not launch.jemalloc_installed():
        with pytest.raises(NotFound, match="apt-get install libjemalloc2"):
            launch.start(settings(engine, models, tmp_path, allocator="jemalloc"))
        return
    with launch.start(settings(engine, models, tmp_path, allocator="jemalloc")) as server:
        allocator = server.allocator()
        assert allocator.name == "jemalloc"
        assert launch.JEMALLOC in allocator.proof


def test_a_dead_server_fails_the_wait_with_its_log(engine: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"exited with code 3[\s\S]*cannot open the model directory"):
        launch.start(settings(engine, models, tmp_path, "--behaviour=exit"))


def test_a_model_that_cannot_be_loaded_fails_the_wait(engine: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"'boston' cannot be loaded: no such file: saved_model.pb"):
        launch.start(settings(engine, models, tmp_path, "--behaviour=broken"))


def test_a_server_that_ignores_sigterm_is_killed(engine: str, models: Path, tmp_path: Path) -> None:
    server = launch.start(settings(engine, models, tmp_path, "--behaviour=deaf"))
    assert server.stop(grace=0.2) == -signal.SIGKILL
    assert server.stop() == -signal.SIGKILL, "stopping twice is harmless"


def test_docker_that_is_not_there_is_an_error(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    with pytest.raises(Unavailable, match="Docker cannot run 'spikeless/serving'"):
        launch.start(settings(launch.DOCKER, models, tmp_path))
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(NotFound, match=r"pip install 'spikeless\[docker\]'"):
        launch.start(settings(launch.DOCKER, models, tmp_path))


def test_wrong_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match="unknown allocator 'tcmalloc'"):
        launch.LaunchSettings(allocator="tcmalloc")
    with pytest.raises(InvalidArgument, match="belong together"):
        launch.LaunchSettings(model_name="boston")
    monkeypatch.setenv(launch.ENGINE_VARIABLE, "/nowhere/tensorflow_model_server")
    with pytest.raises(NotFound, match="names '/nowhere/tensorflow_model_server', which is no executable"):
        launch.start(launch.LaunchSettings("boston", tmp_path))


def test_no_port_is_given_twice() -> None:
    """A server may need seconds until it listens on the one that it was given."""
    assert len({launch.free_port() for _ in range(500)}) == 500
