"""Images and a compose stack on a real engine, each made once.

In: nothing. Out: ``images``, built from this tree, and ``stack``, a fresh clone of it
with the compose command. Tests that use them are skipped, with the reason, where there
is no engine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from docker.models.containers import Container
from engine import BASE, Engine, NoEngine, engine
from places import ROOT, SUPPORT

from spikeless import launch

TAG = "test"
#: What the images are told of their source, as `make images` tells them a commit.
REVISION = "0123456789abcdef0123456789abcdef01234567"
#: Who owns the clone: not root, and not the user that images run as.
OWNER = 1234


@dataclass(frozen=True)
class Images:
    """Names of the images."""

    build: str
    embedded: str
    tools: str
    serving: str
    prometheus: str
    #: Whether the serving image is built on a stand-in for TensorFlow Serving's.
    serving_stands_in: bool


@dataclass
class Stack:
    """A clone of the bundle and the compose commands that run in it."""

    engine: Engine
    folder: Path
    environment: dict[str, str]
    ports: dict[str, int]
    profiles: list[str] = field(default_factory=list)

    def compose(
        self, *arguments: str, check: bool = True, timeout: float = 300.0
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["docker", "compose", *arguments],
            cwd=self.folder,
            env={**self.engine.environment, **self.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(
                f"docker compose {' '.join(arguments)} exited with {done.returncode}:\n{done.stdout}\n"
                f"{done.stderr}\n{self.logs()}"
            )
        return done

    def logs(self) -> str:
        return self.compose("--profile", "*", "logs", "--no-color", "--tail", "60", check=False).stdout

    def container(self, service: str) -> Container:
        """The one container of a service."""
        labels = {
            "project": self.environment["COMPOSE_PROJECT_NAME"],
            "service": service,
            "oneoff": "False",
        }
        filters: dict[str, str | list[str] | bool] = {
            "label": [f"com.docker.compose.{name}={value}" for name, value in labels.items()]
        }
        (container,) = self.engine.client.containers.list(all=True, filters=filters)
        return container

    def inside(self, *command: str) -> str:
        """What a command in the server's container prints."""
        return inside(self.container("server"), *command)

    def wait_for(self, condition: Callable[[], bool], what: str, timeout: float = 120.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout:g} s for {what}:\n{self.logs()}")
            time.sleep(0.2)


def inside(container: Container, *command: str) -> str:
    """What a command in a container prints."""
    output = container.exec_run(list(command)).output
    assert isinstance(output, bytes)
    return output.decode()


@pytest.fixture(scope="session")
def containers() -> Iterator[Engine]:
    if os.environ.get("SPIKELESS_CONTAINERS") == "0":
        pytest.skip("SPIKELESS_CONTAINERS=0")
    try:
        with engine() as started:
            yield started
    except NoEngine as reason:
        pytest.skip(f"no containers: {reason}")


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree as git would clone it, with changes, owned by `OWNER`."""
    folder = tmp_path_factory.mktemp("clone") / "spikeless"
    listed = subprocess.run(
        # Whoever the tree belongs to: nothing of it is run by git here.
        ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for parent in folder.parents[:2]:
        parent.chmod(0o755)  # Others have to get to the clone, as to a home directory.
    # What images are made of, as a clone with a umask of 077 has it.
    for name in ("docker/entrypoint", "docker/health", "docker/prepare", "src", "training", "warmup"):
        for path in (folder / name, *(folder / name).rglob("*")):
            path.chmod(path.stat().st_mode & 0o700)
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, OWNER, OWNER)
    return folder


@pytest.fixture(scope="session")
def images(containers: Engine, clone: Path) -> Images:
    """Every image, built. What cannot be pulled is built on a labelled stand-in."""

    def build(name: str, folder: Path, *arguments: str) -> str:
        image = f"spikeless/{name}:{TAG}"
        containers.build(image, folder, *arguments)
        return image

    def target(name: str, *arguments: str) -> str:
        given = (f"--target={name}", f"--build-arg=REVISION={REVISION}", *arguments)
        return build(name, clone, f"--file={clone / 'docker' / 'Dockerfile'}", *given)

    def pulled(image: str) -> bool:
        return not containers.private and containers.pull(image)

    def serving() -> tuple[str, str, bool]:
        embedded, base = target("embedded"), "tensorflow/serving:2.20.0"
        stands_in = not pulled(base)
        if stands_in:
            base = build("stand-in-base", SUPPORT / "serving_stand_in", f"--build-arg=EMBEDDED={embedded}")
        return embedded, target("serving", f"--build-arg=TF_SERVING_IMAGE={base}"), stands_in

    def prometheus() -> str:
        image = "prom/prometheus:v3.5.0"
        if pulled(image):
            return image
        return build("stand-in-prometheus", SUPPORT / "prometheus_stand_in", f"--build-arg=BASE={BASE}")

    # Side by side: while one downloads, another one computes. What they share is built
    # once.
    with ThreadPoolExecutor() as pool:
        served, tools, monitor = (
            pool.submit(serving),
            pool.submit(target, "tools"),
            pool.submit(prometheus),
        )
        embedded, on_base, stands_in = served.result()
        return Images(
            build=target("build"),
            embedded=embedded,
            tools=tools.result(),
            serving=on_base,
            prometheus=monitor.result(),
            serving_stands_in=stands_in,
        )


@pytest.fixture(scope="session")
def stack(containers: Engine, images: Images, clone: Path) -> Iterator[Stack]:
    """The clone, with built images and free ports; down again at the end."""
    names = ("GRPC_PORT", "REST_PORT", "LOCUST_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")
    ports = {name: launch.free_port() for name in names}
    environment = {
        "COMPOSE_PROJECT_NAME": f"spikeless-test-{os.getpid()}",
        "ENGINE": "embedded",
        "TAG": TAG,
        "PROMETHEUS_IMAGE": images.prometheus,
        **{name: str(port) for name, port in ports.items()},
    }
    stack = Stack(containers, clone, environment, ports)
    try:
        yield stack
    finally:
        stack.compose("--profile", "*", "down", "--volumes", "--remove-orphans", check=False)
