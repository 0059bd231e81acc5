"""Start a model server as a child process, whichever engine it is, and stop it again.

In: what to serve, as TensorFlow Serving's own flags. Out: a `ServerProcess` with its
address, process id, log file and allocator. The environment variable
``SPIKELESS_SERVER`` chooses the engine:

``embedded``  (the default) this package's own server, run by the current Python
a path        a ``tensorflow_model_server`` binary
``docker``    a container of ``SPIKELESS_IMAGE`` (default ``spikeless/serving``)

A child process gets its own session: it can be signalled as a group, a Ctrl-C meant for
the caller does not reach it, and the kernel schedules it and its load generator as two
groups. It ends with the caller, however that ends (`spikeless.disk.children`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import grpc
import psutil

from spikeless import __version__, channels
from spikeless.disk import children, proc
from spikeless.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SpikelessError,
    Unavailable,
    missing_extra,
)
from spikeless.formats.protos import get_model_status_pb2, model_service_pb2_grpc
from spikeless.formats.states import State

if TYPE_CHECKING:
    from docker.models.containers import Container

ENGINE_VARIABLE = "SPIKELESS_SERVER"
#: Engines that are not the path of a binary: this package's own, the default, and a
#: container.
EMBEDDED, DOCKER = "embedded", "docker"
#: What a binary is called in results.
TENSORFLOW_SERVING = "tensorflow_model_server"
IMAGE_VARIABLE = "SPIKELESS_IMAGE"
#: What cannot be told of a server.
UNKNOWN = "unknown"
#: Ports for servers: Linux gives outgoing connections those from 32768 on.
_SERVER_PORTS = range(20000, 32768)
DEFAULT_IMAGE = "spikeless/serving"
JEMALLOC = "libjemalloc.so.2"
JEMALLOC_REMEDY = f"{JEMALLOC} is not installed: on Debian or Ubuntu run `apt-get install libjemalloc2`"
#: Whether servers that are started here load versions apart from requests: ``0`` (the
#: default) or ``1``.
ISOLATE_VARIABLE = "SPIKELESS_ISOLATE"
#: The library that does so (``docker/isolate``): a path, or a name that the dynamic
#: loader finds.
ISOLATE_LIBRARY_VARIABLE = "SPIKELESS_ISOLATE_LIBRARY"
ISOLATE_LIBRARY = "libspikeless-isolate.so"
#: Names, with commas between them, of what that library does not do: for measuring.
ISOLATE_WITHOUT_VARIABLE = "SPIKELESS_ISOLATE_WITHOUT"
#: All of what it does (``docker/isolate/isolate.c``).
ISOLATE_PARTS = ("hide", "pool", "idle", "pause", "touch", "unmap", "arena")
LOOPBACK = "127.0.0.1"
ALLOCATORS = ("glibc", "jemalloc")

#: Prints the platform configuration for flags of TensorFlow Serving, as the serving
#: image does.
_PLATFORM_CONFIG = 'fail() { echo "$1" >&2; exit 1; }; flags=("$@"); source "$0"; platform_config'
_SERVING_FLAGS = Path(__file__).with_name("serving-flags.bash")

_READY_POLL_SECONDS = 0.05
_LOG_TAIL_LINES = 40
# Knock again soon while the port is still closed, and never through a proxy.
_CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.enable_http_proxy", 0),
]


@dataclass(frozen=True)
class LaunchSettings:
    """What to start. Ports, log file and engine that are None are chosen."""

    #: The one model to serve, and the folder of its versions; both None when ``flags``
    #: name a ``--model_config_file``.
    model_name: str | None = None
    model_base_path: Path | None = None
    #: Models that need an AVAILABLE version before the server is ready, by default
    #: ``model_name``. With neither, it is ready when its gRPC port answers.
    wait_for: Sequence[str] = ()
    port: int | None = None
    #: Whether to open the REST port as well.
    rest: bool = False
    rest_port: int | None = None
    #: Further flags in TensorFlow Serving's spelling, such as
    #: ``("--num_load_threads=1",)``.
    flags: Sequence[str] = ()
    engine: str | None = None
    #: ``glibc`` or ``jemalloc``.
    allocator: str = "glibc"
    #: Whether to preload the library that keeps loading versions apart from requests;
    #: None: what the variable ``SPIKELESS_ISOLATE`` says.
    isolate: bool | None = None
    #: Variables added to the server's environment.
    environment: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None
    #: Seconds until waiting for readiness fails.
    ready_timeout: float = 120.0

    def __post_init__(self) -> None:
        if self.allocator not in ALLOCATORS:
            raise InvalidArgument(
                f"unknown allocator {self.allocator!r}: choose one of {', '.join(ALLOCATORS)}"
            )
        if (self.model_name is None) != (self.model_base_path is None):
            raise InvalidArgument("model_name and model_base_path belong together: give both or neither")


def chosen_engine() -> str:
    """``SPIKELESS_SERVER``: ``embedded``, ``docker`` or the path of a binary."""
    return os.environ.get(ENGINE_VARIABLE) or EMBEDDED


def isolates(settings: LaunchSettings) -> bool:
    """Whether a server with these settings loads versions apart from requests.

    Raises:
        InvalidArgument: ``SPIKELESS_ISOLATE`` is neither 0 nor 1.
    """
    if settings.isolate is not None:
        return settings.isolate
    wanted = settings.environment.get(ISOLATE_VARIABLE) or os.environ.get(ISOLATE_VARIABLE) or "0"
    if wanted not in ("0", "1"):
        raise InvalidArgument(f"{ISOLATE_VARIABLE} must be 0 or 1, not {wanted!r}")
    return wanted == "1"


def unoptimizing(settings: LaunchSettings, directory: Path) -> LaunchSettings:
    """The same server, for models whose graphs were optimised beforehand.

    The embedded engine reads from each model that it should not optimise it again
    (`spikeless.formats.session_overrides`). TensorFlow Serving reads a platform
    configuration for all models, written into ``directory``; it overrides the flags and
    therefore repeats what they say.
    """
    engine = settings.engine or chosen_engine()
    if engine == EMBEDDED:
        return settings
    environment = {"DISABLE_META_OPTIMIZER": "true"}
    if engine == DOCKER:
        return replace(settings, environment={**settings.environment, **environment})
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", _PLATFORM_CONFIG, str(_SERVING_FLAGS), *settings.flags],
        env={**os.environ, **settings.environment, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode:
        raise InvalidArgument(f"no platform configuration for these flags: {done.stderr.strip()}")
    file = directory / "platform.config"
    file.write_text(done.stdout)
    return replace(settings, flags=(*settings.flags, f"--platform_config_file={file}"))


def start(settings: LaunchSettings) -> ServerProcess:
    """Start a server and wait until it is ready; stop it if it does not become ready.

    Raises:
        NotFound: the engine or the allocator is not installed.
        Unavailable: the server exited or cannot load its model; says how its log ends.
        DeadlineExceeded: it was not ready in time.
    """
    server = ServerProcess(settings)
    try:
        server.start()
        server.wait_ready()
    except BaseException:
        server.stop(grace=2.0)
        raise
    return server


class ServerProcess(AbstractContextManager["ServerProcess"]):
    """A model server that runs beside this process; a context manager that stops it."""

    def __init__(self, settings: LaunchSettings) -> None:
        self.settings = settings
        self.port = settings.port or free_port()
        self.rest_port = (settings.rest_port or free_port()) if settings.rest else None
        has_tls = any(re.match("--?ssl_config_file=.", flag) for flag in settings.flags)
        #: The gRPC address, as `spikeless.channels` has it.
        self.target = f"{channels.TLS if has_tls else ''}{LOOPBACK}:{self.port}"
        #: The base of the REST API, or None.
        self.rest_url = f"http://{LOOPBACK}:{self.rest_port}" if self.rest_port else None
        #: Which engine it is, its version, and the command that starts it.
        self.engine, self.engine_version, self.command = self._plan(settings.engine or chosen_engine())
        #: Where both of its output streams go.
        self.log_path = settings.log or _temporary_log()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._process: _Child | _Container | None = None

    def _plan(self, engine: str) -> tuple[str, str, list[str]]:
        """The engine's name, its version, and the command line that starts it."""
        flags = [f"--port={self.port}"]
        if self.rest_port:
            flags.append(f"--rest_api_port={self.rest_port}")
        if path := self.settings.model_base_path:
            flags += [f"--model_name={self.settings.model_name}", f"--model_base_path={path.resolve()}"]
        flags += self.settings.flags

        if engine == EMBEDDED:
            return engine, __version__, [sys.executable, "-m", "spikeless", "serve", *flags]
        if engine == DOCKER:
            image = os.environ.get(IMAGE_VARIABLE, DEFAULT_IMAGE)
            return engine, image, ["docker", "run", image, *flags]
        binary = shutil.which(engine)
        if binary is None:
            raise NotFound(
                f"{ENGINE_VARIABLE} names {engine!r}, which is no executable: "
                "say `embedded`, `docker`, or the path of a tensorflow_model_server"
            )
        return TENSORFLOW_SERVING, binary_version(binary), [binary, *flags]

    def start(self) -> str:
        """Start the server, which is not ready yet; returns its gRPC address."""
        self._process = _Container(self) if self.engine == DOCKER else _Child(self)
        return self.target

    @property
    def _started(self) -> _Child | _Container:
        if self._process is None:
            raise FailedPrecondition("the server was not started")
        return self._process

    @property
    def pid(self) -> int:
        """The process that serves; in a container the largest process."""
        return self._started.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code (negative: a signal killed it), or None while it runs."""
        return self._started.exit_code

    def log_tail(self, lines: int = _LOG_TAIL_LINES) -> str:
        """The end of the server's output."""
        text = self.log_path.read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def wait_ready(self) -> None:
        """Wait until every awaited model is AVAILABLE; check the allocator."""
        names = self.settings.wait_for or ([self.settings.model_name] if self.settings.model_name else [])
        with channels.channel(self.target, _CHANNEL_OPTIONS) as channel:
            if names:
                stub = model_service_pb2_grpc.ModelServiceStub(channel)
                for name in names:
                    self.wait_for(partial(_available, stub, name), f"model {name!r} to be available")
            else:
                connected = grpc.channel_ready_future(channel)
                self.wait_for(connected.done, "the gRPC port to answer")
        if self.settings.allocator == "jemalloc" and self.allocator().name != "jemalloc":
            raise FailedPrecondition(
                f"jemalloc was preloaded, but the server does not use it; its log ends:\n{self.log_tail()}"
            )
        library = Path(isolate_library()).name
        if isolates(self.settings) and not _maps(self.pid, library):
            raise FailedPrecondition(
                f"{library} was preloaded, but the server does not use it; its log ends:\n{self.log_tail()}"
            )

    def wait_for(self, condition: Callable[[], bool], what: str, timeout: float | None = None) -> None:
        """Wait until ``condition`` holds; a dead server fails at once, with its log."""
        timeout = self.settings.ready_timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        while True:
            if self.exit_code is not None:
                raise Unavailable(
                    f"the server exited with code {self.exit_code} while waiting for {what}; its log ends:\n"
                    f"{self.log_tail()}"
                )
            try:
                if condition():
                    return
            except SpikelessError as error:
                raise Unavailable(f"{error}; the server's log ends:\n{self.log_tail()}") from error
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"waited {timeout:g} s for {what}; the server's log ({self.log_path}) ends:\n"
                    f"{self.log_tail()}"
                )
            time.sleep(_READY_POLL_SECONDS)

    def allocator(self) -> Allocator:
        """Which allocator the running server uses, read from its memory maps."""
        return allocator_of(self.pid)

    def stop(self, grace: float = 30.0) -> int | None:
        """SIGTERM, then SIGKILL after ``grace`` seconds; returns the exit code."""
        return None if self._process is None else self._process.stop(grace)

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Child:
    """A server in a process group of its own."""

    def __init__(self, server: ServerProcess) -> None:
        environment = {**os.environ, **server.settings.environment}
        preloaded = []
        if server.settings.allocator == "jemalloc":
            if not jemalloc_installed():
                raise NotFound(JEMALLOC_REMEDY)
            preloaded.append(JEMALLOC)
        if isolates(server.settings):
            if not isolate_installed():
                raise NotFound(isolate_remedy())
            preloaded.append(isolate_library())
        if preloaded:
            environment["LD_PRELOAD"] = ":".join(preloaded)
            environment[ISOLATE_VARIABLE] = "1" if isolates(server.settings) else "0"
        # The streams go straight into the file: no pipe can fill up, and no output is
        # lost with the caller.
        with server.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                children.tied(server.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def stop(self, grace: float) -> int:
        if self.exit_code is None:
            self._process.terminate()
            try:
                self._process.wait(grace)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()


class _Container:
    """A server in a container, which is removed when it is stopped."""

    def __init__(self, server: ServerProcess) -> None:
        try:
            import docker
        except ModuleNotFoundError as error:
            raise missing_extra(error) or error from None
        settings, base_path = server.settings, server.settings.model_base_path
        image, *flags = server.command[2:]
        ports = [port for port in (server.port, server.rest_port) if port]
        volumes = [] if base_path is None else [f"{base_path.resolve()}:{base_path.resolve()}:ro"]
        try:
            self._container: Container = docker.from_env().containers.run(
                image,
                flags,
                detach=True,
                ports={f"{port}/tcp": (LOOPBACK, port) for port in ports},
                environment={
                    "SPIKELESS_ALLOCATOR": settings.allocator,
                    ISOLATE_VARIABLE: "1" if isolates(settings) else "0",
                    **settings.environment,
                },
                volumes=volumes,
            )
        except docker.errors.ImageNotFound as error:
            raise NotFound(f"there is no image {image!r}: {error.explanation}") from error
        except docker.errors.DockerException as error:
            raise Unavailable(
                f"{ENGINE_VARIABLE}=docker, but Docker cannot run {image!r}: {error}"
            ) from error
        self._code: int | None = None
        self._removed = False
        self._log = Thread(target=self._copy_log, args=(server.log_path,), daemon=True)
        self._log.start()

    def _copy_log(self, path: Path) -> None:
        with path.open("wb", buffering=0) as log:
            for chunk in self._container.logs(stream=True, follow=True):
                log.write(chunk)

    @property
    def pid(self) -> int:
        self._container.reload()
        root = psutil.Process(self._container.attrs["State"]["Pid"])
        family = [root, *root.children(recursive=True)]
        return max(family, key=lambda process: process.memory_info().rss).pid

    @property
    def exit_code(self) -> int | None:
        if self._code is None:
            self._container.reload()
            if self._container.status in ("exited", "dead"):
                self._code = int(self._container.attrs["State"]["ExitCode"])
                self._log.join()
        return self._code

    def stop(self, grace: float) -> int:
        if self.exit_code is None:
            self._container.stop(timeout=math.ceil(grace))
        code = self.exit_code
        assert code is not None
        if not self._removed:
            self._container.remove(v=True)
            self._removed = True
        return code


@dataclass(frozen=True)
class Allocator:
    """An allocator in use."""

    #: ``glibc``, ``jemalloc`` or ``unknown``.
    name: str
    #: The mapped library that says so.
    proof: str


def allocator_of(pid: int) -> Allocator:
    """The allocator of a running process, by the libraries in its memory."""
    try:
        paths = [file.path for file in proc.mapped_files(pid)]
    except OSError as error:
        return Allocator(UNKNOWN, f"no memory maps: {error.strerror}")
    for name, libraries in (("jemalloc", ("libjemalloc",)), ("glibc", ("libc.so", "libc-2"))):
        for path in paths:
            if Path(path).name.startswith(libraries):
                return Allocator(name, path)
    return Allocator(UNKNOWN, "neither jemalloc nor glibc is mapped")


def _maps(pid: int, library: str) -> bool:
    """Whether a running process has a library in its memory."""
    return any(Path(file.path).name == library for file in proc.mapped_files(pid))


def jemalloc_installed() -> bool:
    """Whether the dynamic loader finds jemalloc."""
    return _loads(JEMALLOC)


def isolate_library() -> str:
    """The library that keeps loading versions apart: what is preloaded."""
    return os.environ.get(ISOLATE_LIBRARY_VARIABLE) or ISOLATE_LIBRARY


def isolate_installed() -> bool:
    """Whether the dynamic loader finds it."""
    return _loads(isolate_library())


def isolate_remedy() -> str:
    return (
        f"{isolate_library()} cannot be loaded: build it with `make -C docker/isolate`, and name it in "
        f"{ISOLATE_LIBRARY_VARIABLE}"
    )


def _loads(library: str) -> bool:
    """Whether the dynamic loader can preload a library; on its own it only warns."""
    true = shutil.which("true")
    if true is None or sys.platform != "linux":
        return False
    trial = subprocess.run([true], env={"LD_PRELOAD": library}, capture_output=True, timeout=30, check=False)
    return trial.returncode == 0 and not trial.stderr


def free_port() -> int:
    """A TCP port on loopback that nothing has at this moment.

    It is below those that the kernel gives to outgoing connections: none of them takes
    it before a server that is still loading listens. Nor does the next call give it.
    """
    for port in itertools.islice(_shuffled_ports(), 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind((LOOPBACK, port))
            return port
    raise Unavailable(f"no free port from {_SERVER_PORTS.start} to {_SERVER_PORTS.stop - 1}")


@cache
def _shuffled_ports() -> Iterator[int]:
    return itertools.cycle(random.sample(_SERVER_PORTS, len(_SERVER_PORTS)))


def _temporary_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="spikeless-server-", suffix=".log")
    os.close(handle)
    return Path(name)


def _available(stub: model_service_pb2_grpc.ModelServiceStub, name: str) -> bool:
    """Whether a version of ``name`` is AVAILABLE; Unavailable when all failed."""
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = name
    try:
        versions = stub.GetModelStatus(request, timeout=2.0).model_version_status
    except grpc.RpcError:
        return False  # Not listening yet, or the model is not known yet.
    if any(version.state == State.AVAILABLE for version in versions):
        return True
    if versions and all(version.state == State.END and version.status.error_code for version in versions):
        raise Unavailable(f"model {name!r} cannot be loaded: {versions[0].status.error_message}")
    return False


def version_of(pid: int) -> str:
    """The version of a running ``tensorflow_model_server``; ``unknown`` of another one.

    Also of one in a container or of another user, whose program cannot be run here.
    """
    try:
        binary = psutil.Process(pid).exe()
        return binary_version(binary) if Path(binary).name == "tensorflow_model_server" else UNKNOWN
    except (psutil.Error, OSError, subprocess.SubprocessError):
        return UNKNOWN


def binary_version(binary: str) -> str:
    """The version that a ``tensorflow_model_server`` states, such as ``2.20.0``."""
    answer = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=60, check=False)
    version = re.search(r"^\s*TensorFlow ModelServer\s*:(.*)", answer.stdout, re.MULTILINE)
    return version[1].strip() if version else UNKNOWN
