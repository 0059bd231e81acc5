"""What it takes to bring a new version to a machine, over a link of 1 Gbit/s.

    python benchmarks/fleet.py                          # as root, about fifteen minutes
    python benchmarks/fleet.py --size 64MiB --rate 100  # a quick look
    python benchmarks/fleet.py --show DIRECTORY         # print a result again

In: the size of a table with rows of 256 bytes. Out: ``fleet.json`` and ``summary.md``
in ``--out``.

Three versions follow each other: the first; one with 1 % of the rows changed at random,
and another dense layer; one with another dense layer only. Each is brought to a machine
that has the one before it, and the second also to one that has none. The machine is a
network namespace of its own; a token bucket (``tc tbf``) limits the link in both
directions. Bytes are those that the kernel counts on the link, headers included. Time
is from the start, when the version is complete in the store, until a server that
watches the folder has it AVAILABLE; every way ends with the files on the disk (fsync)
and one rename.

pull     ``spikeless pull`` from S3 (SeaweedFS)
rsync    rsync's daemon, with the version before as basis of its differences
sync     every file of the version from S3 by parallel ranges, as ``aws s3 sync`` does:
         it compares files whole
copy     every file of the version, one after the other (``rsync --whole-file``)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from fleet_models import WIDTH
from stores import listens, running, s3_server

from spikeless import launch, publish, push
from spikeless.bench.machine import describe_machine, source_commit
from spikeless.cli.options import Size
from spikeless.client import Client
from spikeless.disk import atomic, proc
from spikeless.errors import SpikelessError
from spikeless.formats.states import State
from spikeless.launch import free_port
from spikeless.mapping import MapSettings, repin
from spikeless.repository.gates import GateSettings

SCHEMA = 1
NAME = "ctr"
WAYS = ("pull", "rsync", "sync", "copy")
#: Title -> the version that is there, and the one that comes.
CASES = {"1 % of rows": (1, 2), "dense layer": (2, 3), "nothing there": (None, 2)}
HOST, MACHINE = "10.231.77.1", "10.231.77.2"
SECONDS = 1800.0
#: A server sees a new version within a tenth of a second.
SERVER_FLAGS = ("--file_system_poll_wait_seconds=0.1",)
_COPY = """
import fsspec, pathlib, sys
fs = fsspec.filesystem("s3")
for path in fs.find(sys.argv[1]):
    target = pathlib.Path(sys.argv[2] + path.partition(sys.argv[1])[2])
    target.parent.mkdir(parents=True, exist_ok=True)
    fs.get_file(path, str(target), max_concurrency=8)
"""


@dataclass(frozen=True)
class Taken:
    """What one way took, once."""

    way: str
    case: str
    #: Seconds until the server had it AVAILABLE.
    seconds: float
    #: Over the link, in both directions.
    wire_bytes: int
    version_bytes: int
    #: Memory of what brought it, at its peak, in bytes.
    peak_bytes: int


class Link:
    """A network namespace behind a link of so many Mbit/s; a context manager."""

    def __init__(self, rate: int) -> None:
        self._name = f"fleet{os.getpid() % 10_000}"
        self._rate = rate

    def __enter__(self) -> Link:
        name, peer = self._name, f"{self._name}p"
        limit = ["root", "tbf", "rate", f"{self._rate}mbit", "burst", "1mb", "latency", "50ms"]
        for command in (
            ["ip", "netns", "add", name],
            ["ip", "link", "add", name, "type", "veth", "peer", "name", peer, "netns", name],
            ["ip", "address", "add", f"{HOST}/30", "dev", name],
            ["ip", "link", "set", name, "up"],
            ["ip", "-n", name, "address", "add", f"{MACHINE}/30", "dev", peer],
            ["ip", "-n", name, "link", "set", peer, "up"],
            ["ip", "-n", name, "link", "set", "lo", "up"],
            ["tc", "qdisc", "add", "dev", name, *limit],
            ["tc", "-n", name, "qdisc", "add", "dev", peer, *limit],
        ):
            subprocess.run(command, check=True)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["ip", "netns", "del", self._name], check=True)

    def run(self, command: list[str], variables: Mapping[str, str]) -> int:
        """Run a command behind it; returns its memory at its peak, in bytes."""
        peak = 0
        # `ip` becomes the command.
        inside = ["ip", "netns", "exec", self._name, *command]
        with subprocess.Popen(
            inside, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as child:
            while child.poll() is None:
                with contextlib.suppress(OSError):
                    peak = max(peak, proc.memory(child.pid).get("VmHWM", 0))
                time.sleep(0.01)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)} exited with {child.returncode}")
        return peak

    def bytes(self) -> int:
        """What went over it so far, in both directions."""
        counters = Path("/sys/class/net", self._name, "statistics")
        return sum(int((counters / name).read_text()) for name in ("rx_bytes", "tx_bytes"))


@dataclass(frozen=True)
class Stage:
    """Where everything is."""

    work: Path
    models: Path
    link: Link
    #: Of the S3 libraries.
    variables: Mapping[str, str]
    rsync_port: int

    def bring(self, way: str, version: int, there: Path, before: int | None) -> int:
        """Bring a version to a repository on the machine behind the link.

        Returns the memory that this took at its peak, in bytes.
        """
        if way == "pull":
            command = ["pull", "s3://bucket/models", NAME, f"--models={there}", f"--version={version}"]
            return self.link.run([sys.executable, "-m", "spikeless", *command], self.variables)
        target = there / NAME / f"staged-{version}"
        if way == "sync":
            source = f"bucket/plain/{NAME}/{version}"
            peak = self.link.run([sys.executable, "-c", _COPY, source, str(target)], self.variables)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            how = ["--whole-file"] if way == "copy" or before is None else ["--no-whole-file"]
            if way == "rsync" and before is not None:
                how.append(f"--link-dest={there / NAME / str(before)}")
            source = f"rsync://{HOST}:{self.rsync_port}/models/{NAME}/{version}/"
            peak = self.link.run(["rsync", "--archive", *how, source, f"{target}/"], {})
        repin(target, str(there / NAME / str(version)), digests=False)
        atomic.sync_tree(target)
        target.rename(there / NAME / str(version))
        return peak


def prepare(work: Path, size: int) -> Path:
    """The repository of whoever trains, with the three versions."""
    models = work / "trained"
    if not (models / NAME / "3").is_dir():
        exported = work / "exported"
        exported.mkdir(parents=True, exist_ok=True)
        script = Path(__file__).resolve().parents[1] / "tests" / "support" / "fleet_models.py"
        subprocess.run([sys.executable, script, exported, str(size // (4 * WIDTH))], check=True)
        gates = GateSettings(allow_cold=True, load=False, mapping=MapSettings(verify=False)).pipeline()
        for name in ("first", "rows", "dense"):
            publish(exported / name, models, NAME, gates=gates)
            shutil.rmtree(exported / name)
    return models


def measure(stage: Stage, way: str, case: str) -> Taken:
    """Bring one version, once, to a server that watches for it."""
    before, version = CASES[case]
    there = stage.work / "machine"
    shutil.rmtree(there, ignore_errors=True)
    (there / NAME).mkdir(parents=True)
    if before is not None:
        # As a pull would leave it, without the link.
        command = [sys.executable, "-m", "spikeless", "pull", "s3://bucket/models", NAME]
        subprocess.run(
            [*command, f"--models={there}", f"--version={before}"],
            check=True,
            env={**os.environ, **stage.variables},
            stdout=subprocess.DEVNULL,
        )
    os.sync()
    with contextlib.ExitStack() as stack:
        client = None
        if before is not None:
            settings = launch.LaunchSettings(NAME, there / NAME, flags=SERVER_FLAGS)
            server = stack.enter_context(launch.start(settings))
            client = stack.enter_context(Client(server.target))
        sent = stage.link.bytes()
        began = time.monotonic()
        peak = stage.bring(way, version, there, before)
        if client is not None:
            _wait(client, version)
        seconds = time.monotonic() - began
        wire = stage.link.bytes() - sent
    return Taken(way, case, seconds, wire, atomic.size_of(there / NAME / str(version)), peak)


def _wait(client: Client, version: int) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(SpikelessError):
            if client.statuses(NAME, version)[0].state is State.AVAILABLE:
                return
        time.sleep(0.01)
    raise SystemExit(f"version {version} does not become AVAILABLE")


@contextlib.contextmanager
def staged(work: Path, size: int, rate: int) -> Iterator[Stage]:
    """The stores, filled, and the link."""
    models = prepare(work, size)
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(Link(rate))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work)))
        s3 = stack.enter_context(s3_server(directory, HOST))
        variables = s3.environment()
        os.environ.update(variables)
        for version in (1, 2, 3):
            push(models / NAME / str(version), s3.url)
        import fsspec

        fsspec.filesystem("s3").put(str(models / NAME), "bucket/plain/", recursive=True)
        port = free_port()
        config = directory / "rsyncd.conf"
        config.write_text(
            f"address = {HOST}\nport = {port}\nuid = root\ngid = root\nuse chroot = no\n"
            f"[models]\npath = {models}\nread only = yes\n"
        )
        command = ["rsync", "--daemon", "--no-detach", f"--config={config}"]
        ready: Callable[[], bool] = lambda: listens(port, HOST)  # noqa: E731
        stack.enter_context(running(command, directory / "rsync.log", ready))
        yield Stage(work, models, link, variables, port)


def summary(content: Mapping[str, Any]) -> str:
    """The table, and whether the bars are met."""
    taken = [Taken(**each) for each in content["taken"]]
    lines = [
        "# Bringing a version to a machine",
        "",
        f"A table of {content['bytes'] / 2**20:.0f} MiB, a link of {content['rate']} Mbit/s, median of "
        f"{content['repeats']} runs. {content['machine_text']}. Commit {content['commit']}.",
        "",
        "| what changed | way | over the link | of the version | until AVAILABLE |",
        "|---|---|---|---|---|",
    ]
    medians: dict[tuple[str, str], float] = {}
    shares: dict[tuple[str, str], float] = {}
    for case in CASES:
        for way in WAYS:
            found = [each for each in taken if (each.way, each.case) == (way, case)]
            if not found:
                continue
            wire = statistics.median(each.wire_bytes for each in found)
            seconds = medians[way, case] = statistics.median(each.seconds for each in found)
            share = shares[way, case] = wire / found[0].version_bytes
            until = f"{seconds:.2f} s" if CASES[case][0] is not None else f"{seconds:.2f} s, on the disk"
            lines.append(f"| {case} | {way} | {wire / 1e6:,.2f} MB | {100 * share:.2f} % | {until} |")
    rows, dense, *_ = CASES
    bars = (
        ("1 % of rows: at most 3 % over the link", shares["pull", rows] <= 0.03),
        ("dense layer: under 1 % over the link", shares["pull", dense] < 0.01),
        ("1 % of rows: at most a quarter of a copy", medians["pull", rows] <= medians["copy", rows] / 4),
    )
    lines += ["", *(f"- {text}: {'met' if met else 'not met'}" for text, met in bars)]
    peak = max(each.peak_bytes for each in taken if each.way == "pull")
    lines += ["", f"Memory of one pull at its peak: {peak / 1e6:,.0f} MB.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    today = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{today}-fleet")
    parser.add_argument("--work", type=Path, default=Path("runs") / "fleet", help="for 16 GB of versions")
    parser.add_argument("--size", type=lambda text: Size().convert(text, None, None), default=2 << 30)
    parser.add_argument("--rate", type=int, default=1000, help="of the link, in Mbit/s")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--show", type=Path, help="only print the summary of this result")
    options = parser.parse_args()
    if options.show:
        print(summary(json.loads((options.show / "fleet.json").read_text())))
        return
    options.out.mkdir(parents=True)
    work = options.work.absolute() / str(options.size)
    taken: list[Taken] = []
    with staged(work, options.size, options.rate) as stage:
        for case in CASES:
            for _ in range(options.repeats):
                for way in WAYS:  # in turn: A B A B
                    taken.append(measure(stage, way, case))
                    print(taken[-1], file=sys.stderr)
    shutil.rmtree(work / "machine", ignore_errors=True)
    machine = describe_machine()
    content = {
        "schema": SCHEMA,
        "commit": source_commit(),
        "machine": dataclasses.asdict(machine),
        "machine_text": machine.describe(),
        "bytes": options.size,
        "rate": options.rate,
        "repeats": options.repeats,
        "taken": [dataclasses.asdict(each) for each in taken],
    }
    atomic.write_atomically(options.out / "fleet.json", (json.dumps(content, indent=1) + "\n").encode())
    atomic.write_atomically(options.out / "summary.md", summary(content).encode())
    print(summary(content))


if __name__ == "__main__":
    main()
