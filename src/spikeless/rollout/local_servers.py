"""What a server on this machine was started on, and which files it sees.

In: the address of a server. Out: its process, where that can be seen from here; a
server in a container or on another machine cannot. TensorFlow Serving has no call that
tells a model's base path, so it is read from the server's command line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from spikeless import launch
from spikeless.channels import TLS
from spikeless.errors import NotFound, SpikelessError
from spikeless.formats.protos import model_server_config_pb2, read_text_proto
from spikeless.repository.target import ServerTarget

_XLA = "xla_cpu_compilation_enabled"
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def on_loopback(target: str) -> bool:
    """Whether an address is one of this machine only."""
    return target.removeprefix(TLS).rpartition(":")[0] in _LOOPBACK


@dataclass(frozen=True)
class LocalServer:
    """A model server on a port of this machine."""

    pid: int
    #: Its files as it sees them: its root directory, and the one that it runs in.
    root: Path
    directory: str
    #: The flags that it was started with.
    flags: dict[str, str]
    #: Whether it is the embedded engine.
    embedded: bool

    def base_path(self, name: str) -> str | None:
        """Where the server was told to find a model; None when that is not known."""
        file, path = self.flags.get("model_config_file"), self.flags.get("model_base_path")
        if file is not None:
            try:
                config = read_text_proto(self._seen(file), model_server_config_pb2.ModelServerConfig())
            except SpikelessError:
                return None
            models = config.model_config_list.config
            return next((model.base_path for model in models if model.name == name), None)
        if path is not None and self.flags.get("model_name", "default") == name:
            return os.path.normpath(os.path.join(self.directory, path))
        return None

    def same(self, one: str, other: str) -> bool:
        """Whether two paths are the same directory for the server."""
        try:
            return one == other or self._seen(one).samefile(self._seen(other))
        except OSError:
            return False

    def sees(self, path: str) -> bool:
        """Whether a path is a directory for the server."""
        return self._seen(path).is_dir()

    def _seen(self, path: str) -> Path:
        return self.root / os.path.join(self.directory, path).lstrip("/")


def is_embedded(command: Sequence[str]) -> bool:
    """Whether a command line is that of the embedded engine."""
    return any(Path(word).name == "spikeless" for word in command[:3])


def find(target: str) -> LocalServer | None:
    """The server that listens on ``target``; None when it cannot be seen from here."""
    port = target.rpartition(":")[2]
    if not on_loopback(target) or not port.isdigit():
        return None
    try:
        pids = {
            connection.pid
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
            and connection.laddr
            and connection.laddr.port == int(port)
            and connection.pid is not None
        }
        processes = [psutil.Process(pid) for pid in pids]
        if len(processes) > 1:
            # Workers that share the port belong to the one that leads them.
            processes = [process for process in {one.parent() for one in processes} if process is not None]
        if len(processes) != 1:
            return None
        (process,) = processes
        root = Path("/proc", str(process.pid), "root")
        root.stat()
        command = process.cmdline()
        flags = _flags(command)
        if not flags.keys() & {"model_config_file", "model_base_path"}:
            return None  # A proxy, or a server inside another program.
        return LocalServer(process.pid, root, process.cwd(), flags, is_embedded(command))
    except (psutil.Error, OSError):
        return None


def capabilities(server: str | None, flags: Sequence[str] = (), version: str | None = None) -> ServerTarget:
    """What servers can load, by the flags and version of a running one, or as given.

    Raises:
        NotFound: ``server`` is not on this machine, or its process cannot be seen.
    """
    found = find(server) if server is not None else None
    if server is not None and found is None:
        raise NotFound(
            f"the flags of {server} cannot be seen from here: say what it has with --server-flag and "
            "--server-version"
        )
    known = _flags(list(flags))
    if found is not None:
        known = {**found.flags, **known}
        told = launch.version_of(found.pid)
        version = version or (None if told == launch.UNKNOWN else told)
        if found.embedded:
            return ServerTarget(version, xla=True)
    if not known:
        return ServerTarget(version)
    value = known.get(_XLA, "false").lower()
    # A boolean may stand alone, before another flag.
    return ServerTarget(version, xla=value in ("", "true", "1") or value.startswith("--"))


def _flags(command: list[str]) -> dict[str, str]:
    flags = {}
    for argument, following in zip(command, (*command, "")[1:], strict=True):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            flags[name] = value if equals else following
    return flags
