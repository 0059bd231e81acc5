"""The raw result of a run: every request, and what was measured, in one file.

In and out: an ``.npz`` file (NumPy's zip of arrays, read without pickle) of

``metadata``           one JSON text in UTF-8 bytes: the fields of `Facts`
a column per fact      as in `spikeless.openloop.columns.COLUMNS`, one row per request
``sample_`` + column   as in `spikeless.bench.watch.SAMPLES`, one row per sample

Times are seconds after the start of the run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikeless.bench import events
from spikeless.bench.machine import UNKNOWN, Machine
from spikeless.bench.protocols import GRPC, PROTOCOLS
from spikeless.bench.replayed import parse_batch_sizes
from spikeless.bench.watch import SAMPLES, StateChange
from spikeless.disk.atomic import atomic_writer
from spikeless.errors import DataLoss, InvalidArgument, NotFound
from spikeless.openloop.columns import COLUMNS
from spikeless.openloop.schedule import RECORDED, Schedule

SCHEMA = 2
_SAMPLE_PREFIX = "sample_"


@dataclass(frozen=True)
class Settings:
    """What a run shall do."""

    model_name: str
    #: The file whose requests are replayed.
    requests: str
    #: The schedule: requests per second, its duration, and as in `Schedule`.
    rate: float = 300.0
    seconds: float = 30.0
    arrivals: str = "poisson"
    #: How much faster than they were recorded, where `arrivals` is ``recorded``: then
    #: rate and duration are those of the recording at this speed, and no seed counts.
    speed: float = 1.0
    seed: int = 1
    #: How requests are drawn by their batch size, as in
    #: `spikeless.bench.replayed.parse_batch_sizes`; empty: they take turns.
    batch_sizes: str = ""
    #: One of `spikeless.bench.protocols.PROTOCOLS`.
    protocol: str = GRPC
    #: Where requests over HTTP go; empty: to the path of the protocol.
    url_path: str = ""
    #: Deadline of each request, in seconds.
    timeout: float = 10.0
    #: Processes of the load generator.
    processes: int = 1
    #: What happens to versions, as in `spikeless.bench.events`.
    event: str = events.PUBLISH
    #: When it first does, in seconds after the start; None: never.
    publish_at: float | None = None
    #: How often (of a storm: how many versions),
    publishes: int = 1
    #: and the seconds between two.
    publish_every: float = 10.0
    #: Names of other models that are published instead, in turn; empty: the one that
    #: is loaded.
    published_models: Sequence[str] = ()
    #: Seconds at the start that are left out of the steady window.
    warm_seconds: float = 3.0
    #: Slower requests count as part of a spike.
    slo_ms: float = 10.0

    def __post_init__(self) -> None:
        # Raises when it is invalid.
        _ = Schedule(self.rate, self.seconds) if self.arrivals == RECORDED else self.schedule
        if not self.speed > 0 or (self.speed != 1 and self.arrivals != RECORDED):
            raise InvalidArgument("a speed is positive, and of a recording that is replayed")
        if self.batch_sizes and self.arrivals == RECORDED:
            raise InvalidArgument("a recording has its own batch sizes")
        if self.batch_sizes:
            parse_batch_sizes(self.batch_sizes)
        if self.protocol not in PROTOCOLS:
            raise InvalidArgument(f"unknown protocol {self.protocol!r}: choose one of {', '.join(PROTOCOLS)}")
        if self.url_path and (self.protocol == GRPC or not self.url_path.startswith("/")):
            raise InvalidArgument(
                f"{self.url_path!r} is no path to send requests over HTTP to: say /predict, and --protocol"
            )
        if self.processes < 1:
            raise InvalidArgument(f"a load needs 1 process or more, not {self.processes}")
        if not (self.timeout > 0 and self.slo_ms > 0 and self.warm_seconds >= 0):
            raise InvalidArgument("timeout and SLO must be positive, the warm start not negative")
        if self.model_name in self.published_models:
            raise InvalidArgument(
                f"{self.model_name} is the model that is loaded: it is published without naming it"
            )
        if not (self.publishes >= 1 and self.publish_every > 0):
            raise InvalidArgument("publish 1 version or more, with positive time between them")
        self._check_event()
        at = self.publish_at
        then = "" if at is None else f", and publishing begins at {at:g} s"
        end = self.seconds if at is None else at
        if not self.warm_seconds < end <= self.seconds:
            raise InvalidArgument(
                f"there is no steady window: of {self.seconds:g} s of load the first {self.warm_seconds:g} s "
                f"do not count{then}; make the load longer, or the warm start shorter"
            )
        if self.publish_moments and self.publish_moments[-1] > self.seconds:
            raise InvalidArgument(
                f"the last of {self.publishes} versions would be published at {self.publish_moments[-1]:g} s,"
                f" but the load ends at {self.seconds:g} s; publish fewer or faster, or make it longer"
            )

    def _check_event(self) -> None:
        events.event(self.event)
        if self.event == events.PUBLISH_ALL and not self.published_models:
            raise InvalidArgument("to publish a version of every model at once, name the models")
        if self.event == events.STORM and self.publishes < 2:
            raise InvalidArgument("a storm has 2 versions or more")
        if self.event == events.UNLOAD and self.published_models:
            raise InvalidArgument("what is unloaded is a version of the model that is loaded with requests")

    @property
    def schedule(self) -> Schedule:
        """Of arrivals that are not recorded."""
        return Schedule(self.rate, self.seconds, self.arrivals, self.seed)

    @property
    def publish_moments(self) -> tuple[float, ...]:
        """When each version is published, in seconds after the start, ascending."""
        if self.publish_at is None:
            return ()
        return tuple(self.publish_at + number * self.publish_every for number in range(self.publishes))


@dataclass(frozen=True)
class ServerFacts:
    """The server that was measured."""

    #: The gRPC address, at which its states are asked for; empty: it has none.
    target: str
    engine: str = UNKNOWN
    engine_version: str = UNKNOWN
    allocator: str = UNKNOWN
    #: The mapped library that shows which allocator it is.
    allocator_proof: str = UNKNOWN
    command: Sequence[str] = ()
    pid: int | None = None
    #: What else is to be said of the engine, such as how it was built.
    engine_note: str = ""
    #: The address of requests over HTTP.
    rest_target: str = ""

    def address(self, protocol: str) -> str:
        """Where requests of a protocol go.

        Raises:
            InvalidArgument: it has no such address.
        """
        address = self.target if protocol == GRPC else self.rest_target
        if not address:
            raise InvalidArgument(f"no address for {protocol}: the server was given without one")
        return address


@dataclass(frozen=True)
class Publish:
    """One publishing."""

    #: In seconds after the start of the run.
    begin: float
    end: float
    #: What it returned, as text.
    result: str = ""
    #: The model that a version was published of; empty: the one that is loaded.
    model: str = ""

    @property
    def version(self) -> int | None:
        """The version, where the result is its directory."""
        name = Path(self.result).name
        return int(name) if name.isdecimal() else None


@dataclass(frozen=True)
class Floor:
    """The generator's own latency on a server that answers at once, in milliseconds."""

    rate: float
    requests: int
    p50: float
    p99: float
    p99_9: float
    max: float


@dataclass(frozen=True)
class Facts:
    """All of a run that is not a column."""

    scenario: str
    #: UTC in ISO 8601.
    started: str
    commit: str
    settings: Settings
    machine: Machine
    server: ServerFacts
    generator: Sequence[str]
    publishes: Sequence[Publish] = ()
    states: Sequence[StateChange] = ()
    floor: Floor | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Run:
    """One run."""

    facts: Facts
    #: By column, as in `COLUMNS`.
    requests: dict[str, NDArray[Any]]
    #: By column, as in `SAMPLES`.
    samples: dict[str, NDArray[Any]] = field(default_factory=lambda: empty_samples())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        metadata = json.dumps({"schema": SCHEMA, **dataclasses.asdict(self.facts)}, indent=1)
        arrays: dict[str, NDArray[Any]] = {"metadata": np.frombuffer(metadata.encode(), np.uint8)}
        arrays |= self.requests
        arrays |= {_SAMPLE_PREFIX + name: values for name, values in self.samples.items()}
        with atomic_writer(path) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a file that `Run.save` wrote.

    Raises:
        NotFound: there is no such file.
        DataLoss: it is damaged or no raw result.
        InvalidArgument: it has another schema.
    """
    name = os.fspath(path)
    not_one = f"{name} is no raw result of `spikeless bench`: give a *.npz file that it wrote"
    try:
        with np.load(name, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        metadata = json.loads(arrays.pop("metadata").tobytes())
    except OSError as error:
        raise NotFound(f"{name} cannot be read: {error.strerror or error}") from None
    except zipfile.BadZipFile:
        raise DataLoss(f"{name} is damaged: its end is missing, or it is no raw result") from None
    except (ValueError, KeyError, EOFError, AttributeError, RuntimeError, MemoryError, zlib.error):
        raise DataLoss(not_one) from None
    schema = metadata.pop("schema", None) if isinstance(metadata, dict) else None
    if schema != SCHEMA:
        raise InvalidArgument(f"{name} has schema {schema}; this version of Spikeless reads schema {SCHEMA}")
    try:
        facts = _facts(metadata)
        requests = {column: arrays[column].astype(dtype) for column, dtype in COLUMNS.items()}
        samples = {column: arrays[_SAMPLE_PREFIX + column] for column in SAMPLES}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataLoss(f"{name} is incomplete or has unknown fields: {error}") from None
    shapes = {values.shape for values in requests.values()}
    if len(shapes) != 1 or any(len(shape) != 1 for shape in shapes):
        raise DataLoss(f"{name} has columns of different lengths")
    return Run(facts, requests, samples)


def result_files(result: Path) -> list[Path]:
    """The file that `result` is, or those in the directory that it is.

    Raises:
        NotFound: the directory holds none.
    """
    found = sorted(result.glob("*.npz")) if result.is_dir() else [result]
    if not found:
        raise NotFound(f"{result} holds no raw results (*.npz)")
    return found


def _facts(metadata: dict[str, Any]) -> Facts:
    settings = metadata["settings"]
    settings["published_models"] = tuple(settings.get("published_models", ()))
    metadata["settings"] = Settings(**settings)
    metadata["machine"] = Machine(**metadata["machine"])
    metadata["server"] = ServerFacts(**metadata["server"])
    metadata["states"] = tuple(StateChange(**state) for state in metadata["states"])
    metadata["publishes"] = tuple(Publish(**publish) for publish in metadata["publishes"])
    if metadata["floor"] is not None:
        metadata["floor"] = Floor(**metadata["floor"])
    return Facts(**metadata)


def merge(parts: Sequence[Run]) -> Run:
    """The run that several workers made together, ordered by intended start.

    Raises:
        InvalidArgument: there is no part, or they are of different runs.
    """
    if not parts:
        raise InvalidArgument("nothing to merge")
    first = parts[0]
    for part in parts[1:]:
        if (part.facts.started, part.facts.settings) != (first.facts.started, first.facts.settings):
            raise InvalidArgument("these files are of different runs: merge the workers' files of one run")
    order = np.argsort(np.concatenate([part.requests["intended"] for part in parts]), kind="stable")
    requests = {name: np.concatenate([part.requests[name] for part in parts])[order] for name in COLUMNS}
    return Run(first.facts, requests, first.samples)


def empty_samples() -> dict[str, NDArray[Any]]:
    return {name: np.zeros(0, dtype) for name, dtype in SAMPLES.items()}
