"""Start a model server as a child process, whichever engine it is, and stop it again.

In: what to serve, as TensorFlow Serving's own flags. Out: a `Server` with its address, process id, log file
and the proof of its allocator. The engine is one setting, the environment variable ``SPIKELESS_SERVER``:

``embedded``  (the default) this package's own server, run by the Python that runs now
a path        a ``tensorflow_model_server`` binary
``docker``    the serving image (``SPIKELESS_IMAGE``, default ``spikeless/serving``) through ``docker run``

The server gets a session of its own: it can be signalled as a group, a Ctrl-C meant for the caller does not
reach it, and the kernel's autogroups schedule it against its load generator as one group against another.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType

import grpc
import psutil

from spikeless import __version__
from spikeless.disk import proc
from spikeless.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SpikelessError,
    Unavailable,
)
from spikeless.formats.protos import get_model_status_pb2, model_service_pb2_grpc

ENGINE_VARIABLE = "SPIKELESS_SERVER"
#: The engine that is part of this package, and the default.
EMBEDDED = "embedded"
IMAGE_VARIABLE = "SPIKELESS_IMAGE"
DEFAULT_IMAGE = "spikeless/serving"
JEMALLOC = "libjemalloc.so.2"
JEMALLOC_REMEDY = f"{JEMALLOC} is not installed: on Debian or Ubuntu run `apt-get install libjemalloc2`"
LOOPBACK = "127.0.0.1"
ALLOCATORS = ("glibc", "jemalloc")

#: For TensorFlow Serving: what its flags say, and that no graph is optimised, for which it has no flag.
_UNOPTIMIZING = """platform_configs { key: "tensorflow" value { source_adapter_config {
[type.googleapis.com/tensorflow.serving.SavedModelBundleSourceAdapterConfig] { legacy_config {
session_config { graph_options { rewrite_options { disable_meta_optimizer: true } } }
saved_model_tags: "serve"
enable_model_warmup: true
remove_unused_fields_from_bundle_metagraph: true
} } } } }
"""

_READY_POLL_SECONDS = 0.05
_LOG_TAIL_LINES = 40
# Knock again soon while the port is still closed, and never through a proxy.
_CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.enable_http_proxy", 0),
]

# States of a version, numbered as in get_model_status.proto.
_State = get_model_status_pb2.ModelVersionStatus.State


@dataclass(frozen=True)
class LaunchSettings:
    """What to start. Fields left at None are chosen: free ports, a temporary log file, the engine.

    model_name, model_base_path: the one model to serve; None when `flags` name a ``--model_config_file``.
    wait_for: names of models that must have an AVAILABLE version before the server counts as ready; by
        default `model_name`. With no name at all, ready means that the gRPC port answers.
    rest: also open the REST port.
    flags: further flags in TensorFlow Serving's spelling, for example ``("--num_load_threads=1",)``.
    allocator: ``glibc`` or ``jemalloc``.
    environment: variables added to the server's environment.
    ready_timeout: seconds until the wait for readiness gives up.
    """

    model_name: str | None = None
    model_base_path: Path | None = None
    wait_for: Sequence[str] = ()
    port: int | None = None
    rest: bool = False
    rest_port: int | None = None
    flags: Sequence[str] = ()
    engine: str | None = None
    allocator: str = "glibc"
    environment: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None
    ready_timeout: float = 120.0

    def __post_init__(self) -> None:
        if self.allocator not in ALLOCATORS:
            raise InvalidArgument(
                f"unknown allocator {self.allocator!r}: choose one of {', '.join(ALLOCATORS)}"
            )
        if (self.model_name is None) != (self.model_base_path is None):
            raise InvalidArgument("model_name and model_base_path belong together: give both or neither")


def chosen_engine() -> str:
    """What ``SPIKELESS_SERVER`` says: ``embedded``, ``docker`` or the path of a binary."""
    return os.environ.get(ENGINE_VARIABLE) or EMBEDDED


def unoptimizing(settings: LaunchSettings, directory: Path) -> LaunchSettings:
    """The same server for graphs that were optimised beforehand: as one that does not optimise them again.

    The embedded engine reads that from each model (`spikeless.formats.session_overrides`). TensorFlow
    Serving is told so, for all models, by a file, which is written into ``directory`` and which takes the
    place of its flags about warmup, batching, parallelism and tags.
    """
    engine = settings.engine or chosen_engine()
    if engine == EMBEDDED:
        return settings
    if engine == "docker":
        return replace(settings, environment={**settings.environment, "DISABLE_META_OPTIMIZER": "true"})
    file = directory / "platform.config"
    file.write_text(_UNOPTIMIZING)
    return replace(settings, flags=(*settings.flags, f"--platform_config_file={file}"))


def start(settings: LaunchSettings) -> Server:
    """Start a server and wait until it is ready.

    Raises NotFound when the engine or the allocator is not installed, Unavailable with the end of the log
    when the server exits or cannot load its model, DeadlineExceeded when it is not ready in time. A server
    that did not become ready is stopped before the error leaves.
    """
    server = Server(settings)
    try:
        server.wait_ready()
    except BaseException:
        server.stop(grace=2.0)
        raise
    return server


class Server:
    """A running server process; a context manager that stops it.

    `target` is the gRPC address, `rest_url` the base of the REST API or None, `pid` the process that serves
    (for memory and maps), `command` what was run, `log_path` where both of its output streams go, `engine`
    and `engine_version` what it is.
    """

    def __init__(self, settings: LaunchSettings) -> None:
        self.settings = settings
        self.port = settings.port or free_port()
        self.rest_port = (settings.rest_port or free_port()) if settings.rest else None
        self.target = f"{LOOPBACK}:{self.port}"
        self.rest_url = f"http://{LOOPBACK}:{self.rest_port}" if self.rest_port else None
        self._container = f"spikeless-{uuid.uuid4().hex[:12]}"
        chosen = settings.engine or chosen_engine()
        self.engine, self.engine_version, self.command = self._plan(chosen)

        environment = {**os.environ, **settings.environment}
        if settings.allocator == "jemalloc" and self.engine != "docker":
            if not jemalloc_installed():
                raise NotFound(JEMALLOC_REMEDY)
            environment["LD_PRELOAD"] = JEMALLOC
        if settings.log is None:
            handle, name = tempfile.mkstemp(prefix="spikeless-server-", suffix=".log")
            os.close(handle)
            self.log_path = Path(name)
        else:
            self.log_path = settings.log
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
        # The streams go straight into the file: no pipe can fill up, and no output is lost with the caller.
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def _plan(self, engine: str) -> tuple[str, str, list[str]]:
        """The engine's name, its version, and the command line that starts it."""
        flags = [f"--port={self.port}"]
        if self.rest_port:
            flags.append(f"--rest_api_port={self.rest_port}")
        base_path = self.settings.model_base_path
        if base_path is not None:
            base_path = base_path.resolve()
            flags.append(f"--model_name={self.settings.model_name}")
            flags.append(f"--model_base_path={base_path}")
        flags.extend(self.settings.flags)

        if engine == EMBEDDED:
            return engine, __version__, [sys.executable, "-m", "spikeless", "serve", *flags]
        if engine == "docker":
            if shutil.which("docker") is None:
                raise NotFound(f"{ENGINE_VARIABLE}=docker, but there is no docker command: install Docker")
            image = os.environ.get(IMAGE_VARIABLE, DEFAULT_IMAGE)
            command = ["docker", "run", "--rm", "--name", self._container]
            for port in (self.port, self.rest_port):
                if port:
                    command += ["--publish", f"{LOOPBACK}:{port}:{port}"]
            command += ["--env", f"SPIKELESS_ALLOCATOR={self.settings.allocator}"]
            for name, value in self.settings.environment.items():
                command += ["--env", f"{name}={value}"]
            if base_path is not None:
                command += ["--volume", f"{base_path}:{base_path}:ro"]
            return engine, image, [*command, image, *flags]
        binary = shutil.which(engine)
        if binary is None:
            raise NotFound(
                f"{ENGINE_VARIABLE} names {engine!r}, which is no executable: "
                "say `embedded`, `docker`, or the path of a tensorflow_model_server"
            )
        return "tensorflow_model_server", _binary_version(binary), [binary, *flags]

    @property
    def pid(self) -> int:
        """The process that serves: behind an entrypoint script its largest descendant."""
        if self.engine == "docker":
            answer = subprocess.run(
                ["docker", "inspect", "--format", "{{.State.Pid}}", self._container],
                capture_output=True,
                text=True,
                timeout=30,
                check=True,
            )
            root = psutil.Process(int(answer.stdout))
            family = [root, *root.children(recursive=True)]
            return max(family, key=lambda process: process.memory_info().rss).pid
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs."""
        return self._process.poll()

    def log_tail(self, lines: int = _LOG_TAIL_LINES) -> str:
        """The end of the server's output."""
        text = self.log_path.read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def wait_ready(self) -> None:
        """Return when every awaited model has an AVAILABLE version and the allocator is the one asked for."""
        names = self.settings.wait_for or ([self.settings.model_name] if self.settings.model_name else [])
        with grpc.insecure_channel(self.target, options=_CHANNEL_OPTIONS) as channel:
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

    def wait_for(self, condition: Callable[[], bool], what: str, timeout: float | None = None) -> None:
        """Wait until `condition` holds; a dead server fails the wait at once, with the end of its log."""
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

    def stop(self, grace: float = 30.0) -> int:
        """SIGTERM, then after `grace` seconds SIGKILL for the whole group; returns the exit code."""
        if self.exit_code is None:
            self._process.terminate()
            try:
                self._process.wait(grace)
            except subprocess.TimeoutExpired:
                if self.engine == "docker":
                    kill = ["docker", "kill", self._container]
                    subprocess.run(kill, capture_output=True, timeout=30, check=False)
                os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


@dataclass(frozen=True)
class Allocator:
    """`name` is ``glibc``, ``jemalloc`` or ``unknown``; `proof` is the mapped library that says so."""

    name: str
    proof: str


def allocator_of(pid: int) -> Allocator:
    """The allocator of a running process, by the libraries in its memory."""
    try:
        paths = [file.path for file in proc.mapped_files(pid)]
    except OSError as error:
        return Allocator("unknown", f"no memory maps: {error.strerror}")
    for path in paths:
        if Path(path).name.startswith("libjemalloc"):
            return Allocator("jemalloc", path)
    for path in paths:
        if Path(path).name.startswith(("libc.so", "libc-2")):
            return Allocator("glibc", path)
    return Allocator("unknown", "neither jemalloc nor glibc is mapped")


def jemalloc_installed() -> bool:
    """Whether the dynamic loader finds jemalloc by its soname (it only warns when it does not)."""
    true = shutil.which("true")
    if true is None or sys.platform != "linux":
        return False
    trial = subprocess.run([true], env={"LD_PRELOAD": JEMALLOC}, capture_output=True, timeout=30, check=False)
    return trial.returncode == 0 and not trial.stderr


def free_port() -> int:
    """A TCP port on loopback that nothing listens on at this moment."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        port: int = listener.getsockname()[1]
        return port


def _available(stub: model_service_pb2_grpc.ModelServiceStub, name: str) -> bool:
    """Whether a version of `name` is AVAILABLE; raises when every version has ended in an error."""
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = name
    try:
        versions = stub.GetModelStatus(request, timeout=2.0).model_version_status
    except grpc.RpcError:
        return False  # Not listening yet, or the model is not known yet.
    if any(version.state == _State.AVAILABLE for version in versions):
        return True
    if versions and all(version.state == _State.END and version.status.error_code for version in versions):
        raise Unavailable(f"model {name!r} cannot be loaded: {versions[0].status.error_message}")
    return False


def _binary_version(binary: str) -> str:
    """The version that ``tensorflow_model_server --version`` states, for example ``2.20.0``."""
    answer = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=60, check=False)
    for line in answer.stdout.splitlines():
        label, _, version = line.partition(":")
        if label.strip() == "TensorFlow ModelServer":
            return version.strip()
    return "unknown"
