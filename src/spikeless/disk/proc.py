"""The one reader of ``/proc``: what the kernel says of a process and of the processors.

In: a process id, this process's by default. Out: bytes, clock ticks, mapped files. The
formats are those of proc_pid_status(5), proc_pid_maps(5), proc_pid_smaps(5),
proc_pid_stat(5), proc_stat(5) and proc_cpuinfo(5). Every function raises OSError when
the process is gone, belongs to another user, or when there is no ``/proc``.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
#: In the path of every file of a SavedModel's checkpoint that holds values.
_PARAMETERS = "/variables/variables.data-"


def memory(pid: int | str = "self") -> dict[str, int]:
    """The memory of a process in bytes, by the kernel's names.

    ``RssAnon`` is private and counts against a container's limit, ``RssFile`` is pages
    of files, ``RssShmem`` is shared memory, ``VmLck`` is locked, ``VmHWM`` was the most
    so far.
    """
    return memory_in(_PROC / str(pid) / "status")


def memory_in(status: Path) -> dict[str, int]:
    """What `memory` returns, from a ``/proc/<pid>/status`` or a copy of one."""
    fields = (line.split() for line in status.read_text().splitlines())
    return {
        field[0].rstrip(":"): int(field[1]) * 1024 for field in fields if len(field) == 3 and field[2] == "kB"
    }


def mapped_parameters(pid: int | str = "self") -> int:
    """Resident bytes of the checkpoint files that a process maps: its parameters.

    Files that have no name any more count as long as they are mapped; libraries, which
    ``RssFile`` counts too, do not.
    """
    total, counts = 0, False
    with (_PROC / str(pid) / "smaps").open(errors="replace") as smaps:
        for line in smaps:
            first, _, rest = line.partition(" ")
            if not first.endswith(":"):
                counts = _PARAMETERS in rest
            elif counts and first == "Rss:":
                total += int(rest.split()[0]) * 1024
    return total


def private_memory(pid: int | str = "self") -> int:
    """``RssAnon`` in bytes; 0 for a process that has none any more."""
    return memory(pid).get("RssAnon", 0)


def server_of(pid: int) -> int:
    """The process that serves, for a ``pid`` that may be its container's first process.

    That is the largest of the process and its descendants, for an entrypoint or an init
    is small; of several ``--workers`` the process that leads them.
    """
    members = family(pid)
    largest = max(members, key=_resident)
    try:
        if any(word.startswith("--workers=") for word in _command(largest)):
            parent = int((_PROC / str(largest) / "stat").read_text().rpartition(")")[2].split()[1])
            return parent if parent in members else largest
    except OSError:  # It has ended meanwhile.
        pass
    return largest


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        # It is gone, or the kernel was built without this file.
        with suppress(OSError):
            children = Path(_PROC, str(parent), "task", str(parent), "children").read_text()
            found.extend(map(int, children.split()))
    return found


def server_memory(pid: int) -> dict[str, int]:
    """The memory of a server, as `memory` has it, with that of its workers.

    What is private adds up (``RssAnon``). Files are in memory once, whoever maps them:
    all other values are those of the process with the most.
    """
    total = memory(pid)
    for worker in family(pid)[1:]:
        with suppress(OSError):  # It has ended meanwhile.
            for name, size in memory(worker).items():
                before = total.get(name, 0)
                total[name] = before + size if name == "RssAnon" else max(before, size)
    return total


def server_mapped_parameters(pid: int) -> int:
    """What `mapped_parameters` says of the worker of a server that has the most."""
    most = mapped_parameters(pid)
    for worker in family(pid)[1:]:
        with suppress(OSError):
            most = max(most, mapped_parameters(worker))
    return most


def _command(pid: int) -> list[str]:
    return (_PROC / str(pid) / "cmdline").read_text(errors="replace").split("\0")


def _resident(pid: int) -> int:
    try:
        return memory(pid).get("VmRSS", 0)
    except OSError:  # It has ended meanwhile.
        return 0


class MappedFile(NamedTuple):
    """A part of a process's memory that holds a file, or what was a file."""

    #: As the process that reads sees it; it ends with ``(deleted)`` when the file has
    #: no name any more.
    path: str
    #: Device and inode: see `file_key`.
    key: tuple[str, str]
    start: int
    #: The address behind the last byte.
    end: int


def mapped_files(pid: int | str = "self") -> list[MappedFile]:
    """The files that a process has in its memory, one entry a mapping."""
    found = []
    for line in (_PROC / str(pid) / "maps").read_text(errors="replace").splitlines():
        addresses, _, _, device, inode, *path = line.split(maxsplit=5)
        if inode != "0":
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append(MappedFile("".join(path), (device, inode), start, end))
    return found


def file_key(path: str | os.PathLike[str]) -> tuple[str, str]:
    """A file's device and inode as in `MappedFile.key`, the same by every path."""
    status = os.stat(path)
    return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", str(status.st_ino)


class Counters(NamedTuple):
    """What a process has used since it started."""

    #: Pages that it was given without, and with, reading from a disk.
    minor_faults: int
    major_faults: int
    #: Processor time in clock ticks: ``os.sysconf("SC_CLK_TCK")`` of them are a second.
    user_ticks: int
    system_ticks: int


def counters(pid: int | str = "self") -> Counters:
    """Page faults and processor time of a process."""
    # The name of the program may hold anything, parentheses included: count from behind
    # it.
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return Counters(*(int(fields[index]) for index in (7, 9, 11, 12)))


def processor_ticks() -> tuple[int, int]:
    """Clock ticks of all processors since boot, and those that the hypervisor stole."""
    fields = (_PROC / "stat").read_text().partition("\n")[0].split()
    # "cpu", then user nice system idle iowait irq softirq steal; guest time, which
    # follows, is in user too.
    ticks = [int(field) for field in fields[1:9]]
    return sum(ticks), ticks[7]


def processor_model() -> str | None:
    """The processors' name; None on a machine that does not tell it."""
    for line in (_PROC / "cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return None
