"""The server that is measured, and what the record says of it.

In: a server that `spikeless.launch` started, or the address of another. Out: its
`ServerFacts`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from spikeless import __version__, launch
from spikeless.bench.machine import UNKNOWN
from spikeless.bench.run_file import ServerFacts
from spikeless.client import Client
from spikeless.disk import proc
from spikeless.errors import NotFound
from spikeless.rollout import local_servers

#: Of every server that is measured: enough threads that no call is refused, even when
#: nothing is answered for 4 s at 1000 requests/s.
SERVER_FLAGS = ("--grpc_max_threads=4096",)
#: What servers of either engine have without that flag.
_DEFAULT_THREADS = 4 * len(os.sched_getaffinity(0))

#: Which allocator our entrypoint gave the server, for those who cannot read its memory.
ALLOCATOR_VARIABLE = "SPIKELESS_ALLOCATOR"


def server_facts(server: launch.ServerProcess, note: str = "") -> ServerFacts:
    """What the record says about a server that `spikeless.launch` started.

    Args:
        note: what else is to be said of the engine, such as how it was built.
    """
    allocator = server.allocator()
    return ServerFacts(
        target=server.target,
        engine=server.engine,
        engine_version=server.engine_version,
        engine_note=note,
        allocator=allocator.name,
        allocator_proof=allocator.proof,
        command=portable(server.command),
        pid=server.pid,
        rest_target=f"{launch.LOOPBACK}:{server.rest_port}" if server.rest_port else "",
    )


def running_server(target: str, model_name: str, pid: int | None = None) -> ServerFacts:
    """What is known of a server that somebody else started.

    `pid` may be its container's first process. Without `pid` it is looked for among the
    processes of this machine. Of one that is not there, only the address is known. The
    memory of another user's process cannot be read: there `SPIKELESS_ALLOCATOR` may say
    which allocator it has, as our entrypoint makes sure of.

    Raises:
        SpikelessError: nothing answers at ``target``, or it does not serve the model
            (see `Client.statuses`).
        NotFound: there is no process ``pid``.
    """
    with Client(target) as client:
        client.statuses(model_name)
    server = local_servers.find(target)
    if pid is None and server is not None:
        pid = server.pid
    if pid is None:
        return ServerFacts(target)
    try:
        pid = proc.server_of(pid)
        command = psutil.Process(pid).cmdline()
    except psutil.NoSuchProcess:
        raise NotFound(f"there is no process {pid}") from None
    allocator = launch.allocator_of(pid)
    if allocator.name == UNKNOWN and (told := os.environ.get(ALLOCATOR_VARIABLE)):
        allocator = launch.Allocator(told, f"{ALLOCATOR_VARIABLE}, which its entrypoint checks")
    embedded = local_servers.is_embedded(command)
    return ServerFacts(
        target,
        engine=launch.EMBEDDED if embedded else Path(command[0]).name,
        engine_version=__version__ if embedded else launch.version_of(pid),
        allocator=allocator.name,
        allocator_proof=allocator.proof,
        command=portable(command),
        pid=pid,
    )


def refusal(server: ServerFacts, rate: float) -> str | None:
    """What to say of a server that refuses part of such a load, or may do so; or None.

    A server refuses calls beyond its ``--grpc_max_threads``.
    """
    remedy = f"servers that `spikeless bench` starts have {SERVER_FLAGS[0]}, which this one needs, too"
    if not server.command:
        return (
            f"the flags of {server.target} cannot be seen: one with few threads for calls, as by default, "
            f"refuses part of this load; {remedy}"
        )
    given = re.findall(r"(?<= )--?grpc_max_threads[= ](\d+)", " " + " ".join(server.command))
    threads = int(given[-1]) if given else _DEFAULT_THREADS
    if threads >= rate:
        return None
    return (
        f"{server.target} takes {threads} calls at once and refuses more: at {rate:g} requests/s, a stall of "
        f"{threads / rate * 1e3:.0f} ms fills them; {remedy}"
    )


def portable(command: Sequence[str]) -> tuple[str, ...]:
    """A command line without the paths of its program and the working directory."""
    program = "python" if command[0] == sys.executable else Path(command[0]).name
    return (program, *map(from_here, command[1:]))


def from_here(text: str) -> str:
    """Paths in it as seen from the working directory."""
    return text.replace(f"{Path.cwd()}/", "")
