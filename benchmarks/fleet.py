"""What it takes to bring a new version to a machine, over a link of 1 Gbit/s.

    python benchmarks/fleet.py                          # as root, about ten minutes
    python benchmarks/fleet.py --size 64MiB --rate 100  # a quick look
    python benchmarks/fleet.py --show DIRECTORY         # print a result again

In: the size of a table with rows of 256 bytes. Out: ``fleet.json`` and ``summary.md``
in ``--out``.

Three versions follow each other: the first; one with 1 % of the rows changed at random,
and another dense layer; one with another dense layer only. Each is brought to a machine
that has the one before it. The machine is a network namespace of its own; a token
bucket (``tc tbf``) limits the link in both directions. Bytes are those that the kernel
counts on the link, headers included. Time ends when a server that watches the folder
has the version AVAILABLE; every way ends with the files on the disk (fsync) and one
rename. Everything runs on the same cores: the store, what brings the version, and the
server.

pull     ``spikeless pull --follow``, which is running when ``spikeless push`` begins;
         from the end of the push. The store is S3 (SeaweedFS)
rsync    rsync's daemon, with the version before as basis of its differences; from its
         start, when the version is complete
sync     ``aws s3 sync`` of awscli, in an environment of its own; from its start
copy     every file of the version, one after the other (``rsync --whole-file``); from
         its start
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

import fsspec
from fleet_models import WIDTH
from stores import S3, listens, running, s3_server

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
from spikeless.store.catalog import Catalog
from spikeless.store.manifest import FORMAT, Index
from spikeless.store.objects import Store

SCHEMA = 2
NAME = "ctr"
WAYS = ("pull", "rsync", "sync", "copy")
#: Title -> the version that is there, and the one that comes; in the order in which
#: they are pushed.
CASES = {"nothing there": (None, 1), "1 % of rows": (1, 2), "dense layer": (2, 3)}
ROWS, DENSE = "1 % of rows", "dense layer"
HOST, MACHINE = "10.231.77.1", "10.231.77.2"
SECONDS = 1800.0
#: How often the store is looked at, and the folder: both cost time that is counted.
POLL = 0.2
SERVER_FLAGS = ("--file_system_poll_wait_seconds=0.1",)


@dataclass(frozen=True)
class Taken:
    """What one way took, once."""

    way: str
    case: str
    #: Seconds until the version had its name on the machine's disk.
    on_disk: float
    #: Seconds until the server had it AVAILABLE; None where no server ran.
    available: float | None
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

    @contextlib.contextmanager
    def started(self, command: list[str], variables: Mapping[str, str], log: Path) -> Iterator[Started]:
        """A command that runs behind it."""
        # `ip` becomes the command.
        inside = ["ip", "netns", "exec", self._name, *command]
        with log.open("wb") as output:
            child = subprocess.Popen(
                inside, env={**os.environ, **variables}, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            yield Started(child, log)
        finally:
            child.terminate()
            child.wait()

    def bytes(self) -> int:
        """What went over it so far, in both directions."""
        counters = Path("/sys/class/net", self._name, "statistics")
        return sum(int((counters / name).read_text()) for name in ("rx_bytes", "tx_bytes"))


class Started:
    """A command behind a link."""

    def __init__(self, child: subprocess.Popen[bytes], log: Path) -> None:
        self._child = child
        self._log = log
        self._peak = 0

    def peak(self) -> int:
        """Its memory at its peak so far, in bytes."""
        with contextlib.suppress(OSError):
            self._peak = max(self._peak, proc.memory(self._child.pid).get("VmHWM", 0))
        return self._peak

    def wait_for(self, text: str) -> None:
        """Wait until it has written this."""
        _until(lambda: text in self._log.read_text() or self._fails(), text)

    def wait(self) -> None:
        """Wait until it has ended well."""
        _until(lambda: self.peak() >= 0 and self._child.poll() is not None, "the end of a command")
        self._fails()

    def _fails(self) -> bool:
        if self._child.poll():
            raise SystemExit(f"exited with {self._child.returncode}:\n{self._log.read_text()}")
        return False


@dataclass(frozen=True)
class Stage:
    """Where everything is."""

    work: Path
    #: The repository of whoever trains.
    models: Path
    link: Link
    s3: S3
    rsync_port: int
    aws: str

    @property
    def machine(self) -> Path:
        """The repository of the machine behind the link."""
        return self.work / "machine"

    def spikeless_pull(self, *options: str) -> list[str]:
        command = [sys.executable, "-m", "spikeless", "pull", self.s3.url, NAME]
        return [*command, f"--models={self.machine}", *options]

    def withdraw(self, version: int) -> None:
        """Let the store be as before a version was pushed, but for its pieces."""
        catalog = Catalog(Store(self.s3.url), NAME)
        kept = tuple(entry for entry in catalog.index().versions if entry.version < version)
        fs = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
        for path in (catalog.manifest_path(version), catalog.index_path):
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(f"{self.s3.bucket}/models/{path}")
        if kept:
            catalog.store.write(catalog.index_path, Index(FORMAT, NAME, kept).to_json())

    def fill(self, case: str) -> None:
        """Let the machine have what it has before the case."""
        shutil.rmtree(self.machine, ignore_errors=True)
        (self.machine / NAME).mkdir(parents=True)
        before, version = CASES[case]
        self.withdraw(version)
        if before is not None:
            push(self.models / NAME / str(before), self.s3.url)
            subprocess.run(self.spikeless_pull(), check=True, stdout=subprocess.DEVNULL)
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        plain = f"{self.s3.bucket}/plain"
        if fs.exists(plain):
            fs.rm(plain, recursive=True)
        fs.put(str(self.models / NAME / str(version)), f"{plain}/{version}", recursive=True)

    def copy(self, way: str, version: int, before: int | None) -> int:
        """Bring a version; returns the memory that this took at its peak, in bytes."""
        target = self.machine / NAME / f"staged-{version}"
        if way == "sync":
            command = [self.aws, "s3", "sync", "--only-show-errors"]
            command += [f"s3://{self.s3.bucket}/plain/{version}", str(target)]
        else:
            how = ["--whole-file"] if way == "copy" or before is None else ["--no-whole-file"]
            if way == "rsync" and before is not None:
                how.append(f"--link-dest={self.machine / NAME / str(before)}")
            source = f"rsync://{HOST}:{self.rsync_port}/models/{NAME}/{version}/"
            command = ["rsync", "--archive", *how, source, f"{target}/"]
        with self.link.started(command, self.s3.environment(), self.work / "command.log") as started:
            started.wait()
        repin(target, str(self.machine / NAME / str(version)), digests=False)
        atomic.sync_tree(target)
        target.rename(self.machine / NAME / str(version))
        return started.peak()


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
    target = stage.machine / NAME / str(version)
    shutil.rmtree(target, ignore_errors=True)
    stage.withdraw(version)
    os.sync()
    with contextlib.ExitStack() as stack:
        client = None
        if before is not None:
            settings = launch.LaunchSettings(NAME, stage.machine / NAME, flags=SERVER_FLAGS)
            server = stack.enter_context(launch.start(settings))
            client = stack.enter_context(Client(server.target))
        if way == "pull":
            command = stage.spikeless_pull("--follow", f"--poll={POLL}s")
            log = stage.work / "follower.log"
            follower = stack.enter_context(stage.link.started(command, stage.s3.environment(), log))
            follower.wait_for("there already" if before is not None else "has no version")
            sent = stage.link.bytes()
            push(stage.models / NAME / str(version), stage.s3.url)
            began = time.monotonic()
            _until(target.exists, f"version {version} on the disk")
            peak = follower.peak()
        else:
            sent = stage.link.bytes()
            began = time.monotonic()
            peak = stage.copy(way, version, before)
        on_disk = time.monotonic() - began
        available = None
        if client is not None:
            _until(lambda: _is_available(client, version), f"version {version} AVAILABLE")
            available = time.monotonic() - began
        wire = stage.link.bytes() - sent
    return Taken(way, case, on_disk, available, wire, atomic.size_of(target), peak)


def _is_available(client: Client, version: int) -> bool:
    with contextlib.suppress(SpikelessError):
        return client.statuses(NAME, version)[0].state is State.AVAILABLE
    return False


def _until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not reached():
        if time.monotonic() > deadline:
            raise SystemExit(f"no {what} after {SECONDS:.0f} s")
        time.sleep(0.01)


def awscli(work: Path) -> str:
    """The program ``aws``, in an environment of its own."""
    environment = work / "awscli"
    program = environment / "bin" / "aws"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run([environment / "bin" / "pip", "install", "--quiet", "awscli"], check=True)
    return str(program)


@contextlib.contextmanager
def staged(work: Path, size: int, rate: int) -> Iterator[Stage]:
    """The store, the machine, and the link."""
    models = prepare(work, size)
    aws = awscli(work.parent)
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(Link(rate))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=work)))
        s3 = stack.enter_context(s3_server(directory, HOST))
        os.environ.update(s3.environment())
        port = free_port()
        config = directory / "rsyncd.conf"
        config.write_text(
            f"address = {HOST}\nport = {port}\nuid = root\ngid = root\nuse chroot = no\n"
            f"[models]\npath = {models}\nread only = yes\n"
        )
        command = ["rsync", "--daemon", "--no-detach", f"--config={config}"]
        ready: Callable[[], bool] = lambda: listens(port, HOST)  # noqa: E731
        stack.enter_context(running(command, directory / "rsync.log", ready))
        yield Stage(directory, models, link, s3, port, aws)


def summary(content: Mapping[str, Any]) -> str:
    """The table, and whether the bars are met."""
    taken = [Taken(**each) for each in content["taken"]]
    lines = [
        "# Bringing a version to a machine",
        "",
        f"A table of {content['bytes'] / 2**20:.0f} MiB, a link of {content['rate']} Mbit/s, median of "
        f"{content['repeats']} runs in turns (lowest to highest). {content['machine_text']}. "
        f"Commit {content['commit']}. {content['aws']}.",
        "",
        "| what changed | way | over the link | of the version | on the disk | until AVAILABLE |",
        "|---|---|---|---|---|---|",
    ]
    wire: dict[tuple[str, str], float] = {}
    until: dict[tuple[str, str], float] = {}
    for case in CASES:
        for way in WAYS:
            found = [each for each in taken if (each.way, each.case) == (way, case)]
            if not found:
                continue
            sent = statistics.median(each.wire_bytes for each in found)
            share = wire[way, case] = sent / found[0].version_bytes
            available = [each.available for each in found if each.available is not None]
            if available:
                until[way, case] = statistics.median(available)
            lines.append(
                f"| {case} | {way} | {sent / 1e6:,.2f} MB | {100 * share:.2f} % | "
                f"{_spread([each.on_disk for each in found])} | {_spread(available) if available else ''} |"
            )
    bars = (
        ("1 % of rows: at most 3 % over the link", wire["pull", ROWS] <= 0.03),
        ("dense layer: under 1 % over the link", wire["pull", DENSE] < 0.01),
        ("1 % of rows: at most a quarter of a copy", until["pull", ROWS] <= until["copy", ROWS] / 4),
    )
    lines += ["", *(f"- {text}: {'met' if met else 'not met'}" for text, met in bars)]
    peak = max(each.peak_bytes for each in taken if each.way == "pull")
    lines += ["", f"Memory of the puller at its peak: {peak / 1e6:,.0f} MB.", ""]
    return "\n".join(lines)


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


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
        aws = subprocess.run([stage.aws, "--version"], check=True, capture_output=True, text=True).stdout
        for case in CASES:
            stage.fill(case)
            for _ in range(options.repeats):
                for way in WAYS:  # in turn: A B A B
                    if (way, CASES[case][0]) == ("rsync", None):
                        continue  # the same as a copy
                    taken.append(measure(stage, way, case))
                    print(taken[-1], file=sys.stderr)
    machine = describe_machine()
    content = {
        "schema": SCHEMA,
        "commit": source_commit(),
        "machine": dataclasses.asdict(machine),
        "machine_text": machine.describe(),
        "bytes": options.size,
        "rate": options.rate,
        "repeats": options.repeats,
        "aws": aws.strip(),
        "taken": [dataclasses.asdict(each) for each in taken],
    }
    atomic.write_atomically(options.out / "fleet.json", (json.dumps(content, indent=1) + "\n").encode())
    atomic.write_atomically(options.out / "summary.md", summary(content).encode())
    print(summary(content))


if __name__ == "__main__":
    main()
