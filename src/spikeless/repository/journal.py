"""The journal of a model: who changed what is served, when, why, and with which result.

In: entries. Out: ``<models>/<name>/.spikeless/journal.jsonl``, one JSON object a line,
only ever appended to, each line on the disk before the next step is taken. The order of
the lines counts, not their times: clocks jump.

Each line has ``schema``, ``event``, ``time``, ``user``, ``host`` and ``pid``, and the
fields of one of the classes below. Lines without ``schema`` are from before there was
one, and are read as schema 1. Readers skip events and fields that they do not know, so
that only a change of meaning needs a new schema.
"""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from spikeless.errors import FailedPrecondition
from spikeless.repository import layout
from spikeless.repository.models_config import Blocks

FILE_NAME = "journal.jsonl"
#: Names who changes something, where the user of the process says nothing: in a
#: container or a pipeline.
OPERATOR_VARIABLE = "SPIKELESS_OPERATOR"
SCHEMA = 1
#: The outcome of publishing (`outcomes`); changes name theirs.
PASSED = "gates passed"


@dataclass
class Findings:
    """What a trial (`spikeless.repository.trial`) found."""

    #: Seconds that the load took.
    load: float = 0.0
    #: Bytes that belong to the process alone after load and warmup (RssAnon).
    memory: int = 0
    #: Warmup records that were replayed.
    warmup: int = 0
    #: Golden requests that were answered rightly.
    golden: int = 0
    #: Warmup records of the stable version that were answered.
    stable_requests: int = 0
    #: Seconds of the first request after load and warmup; None where there is nothing
    #: to ask.
    first: float | None = None
    #: Median of the requests after it, in seconds.
    steady: float | None = None


@dataclass(frozen=True)
class Published:
    """A version has become visible."""

    version: int
    bytes: int
    #: The version that callers got then.
    stable: int | None = None
    #: Whether callers of the stable version may fail.
    allow_breaking: bool = False
    #: Names of the gates that it passed.
    gates: tuple[str, ...] = ()
    findings: Findings = field(default_factory=Findings)
    #: Where it was copied from: a path, or a name in a registry.
    source: str = ""
    #: The run that trained it, where the registry knows.
    run: str = ""


@dataclass(frozen=True)
class Step:
    """One state of ``models.config``, and what is checked when it is reached."""

    title: str
    blocks: Blocks
    #: Versions are loaded: servers take turns.
    loads: bool = False
    #: The servable under which the version is asked then; empty for none.
    ask: str = ""
    #: Compare it with the stable version and watch it, too.
    compare: bool = False


@dataclass(frozen=True)
class ChangeBegun:
    """A promotion or rollback has begun.

    It holds the whole plan, so that it can be resumed or undone.
    """

    id: str
    action: str
    version: int
    label: str
    #: The version that the label pointed at.
    previous: int | None = None
    reason: str = ""
    servers: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()

    @property
    def states(self) -> list[Blocks]:
        """The states of ``models.config``; the first is how things were before."""
        return [step.blocks for step in self.steps]


@dataclass(frozen=True)
class Requests:
    """Requests that were sent, and errors among them."""

    requests: float = 0.0
    errors: float = 0.0


@dataclass(frozen=True)
class Latencies(Requests):
    """The same, with latencies in milliseconds; None where no request was answered."""

    p50_ms: float | None = None
    p99_ms: float | None = None


@dataclass(frozen=True)
class Checked:
    """A server answered a version's requests."""

    #: The change that this belongs to.
    id: str
    server: str
    #: The model under which the version was asked.
    servable: str
    #: How many requests the version carries.
    requests: int
    #: What was measured where it was compared with the stable version.
    candidate: Latencies | None = None
    stable: Latencies | None = None


@dataclass(frozen=True)
class Soaked:
    """A version was watched on a server for some time."""

    #: The change that this belongs to.
    id: str
    server: str
    candidate: Latencies
    stable: Latencies
    #: Requests of real callers to the candidate, from the server's metrics.
    traffic: Requests


@dataclass(frozen=True)
class ChangeEnded:
    """A change has ended, or everything was put back."""

    id: str
    result: str
    error: str = ""


@dataclass(frozen=True)
class Removed:
    """A version was pruned."""

    version: int
    bytes: int


@dataclass(frozen=True)
class SentToStore:
    """A version has gone to a store."""

    version: int
    bytes: int
    #: Bytes that went to the store.
    sent: int
    #: The store's URL, without credentials.
    store: str
    #: The version that differences are from.
    base: int | None = None


@dataclass(frozen=True)
class CameFromStore:
    """A version has come from a store and become visible."""

    version: int
    bytes: int
    #: Bytes that came from the store.
    fetched: int
    #: The store's URL, without credentials.
    store: str
    #: SHA-256 of its manifest.
    manifest: str


Entry = Published | ChangeBegun | Checked | Soaked | ChangeEnded | Removed | SentToStore | CameFromStore
#: ``event`` of a line -> what it holds.
_EVENTS: dict[str, type[Entry]] = {
    "publish": Published,
    "begin": ChangeBegun,
    "check": Checked,
    "soak": Soaked,
    "end": ChangeEnded,
    "prune": Removed,
    "push": SentToStore,
    "pull": CameFromStore,
}
_NAMES = {kind: event for event, kind in _EVENTS.items()}
#: Fields that are JSON objects, or lists of them -> what they hold.
_NESTED: dict[str, type[Any]] = {
    "findings": Findings,
    "steps": Step,
    "candidate": Latencies,
    "stable": Latencies,
    "traffic": Requests,
}


class Journal:
    """The journal of one model; its file is made when something is written."""

    def __init__(self, models: str | os.PathLike[str], name: str) -> None:
        self.path = layout.state_directory(models, name) / FILE_NAME

    def append(self, entry: Entry) -> None:
        """Write one entry with the time, user, host and process added.

        Raises:
            FailedPrecondition: it could not be written.
        """
        fields = {
            "schema": SCHEMA,
            "event": _NAMES[type(entry)],
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "user": operator(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **dataclasses.asdict(entry),
        }
        line = json.dumps(fields, separators=(",", ":")).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                # A line that a crash or a full disk cut short stays alone on its line,
                # and is not read.
                if file.tell() and not self._ends_well():
                    line = b"\n" + line
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FailedPrecondition(f"cannot write {self.path}: {error.strerror}; make room") from None

    def _ends_well(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def entries(self) -> list[Entry]:
        """All entries of known events, oldest first, without lines that were cut short.

        Raises:
            FailedPrecondition: the file cannot be read, or a newer Spikeless wrote it.
        """
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FailedPrecondition(f"cannot read {self.path}: {error.strerror}") from None
        entries = (self._entry(number, line) for number, line in enumerate(lines, 1))
        return [entry for entry in entries if entry is not None]

    def _entry(self, number: int, line: bytes) -> Entry | None:
        try:
            fields = json.loads(line)
        except ValueError:
            return None
        if not isinstance(fields, dict) or "event" not in fields:
            return None
        try:
            if (schema := fields.get("schema", 1)) > SCHEMA:
                raise FailedPrecondition(
                    f"{self.path}: line {number} has schema {schema}, and this Spikeless reads up to "
                    f"{SCHEMA}: update Spikeless"
                )
            kind = _EVENTS.get(fields["event"])
            return None if kind is None else _build(kind, fields)
        except TypeError as error:
            raise FailedPrecondition(f"{self.path}: line {number} cannot be read: {error}") from None

    def unfinished(self) -> ChangeBegun | None:
        """The last change, when it has no end."""
        entries = self.entries()
        ended = {entry.id for entry in entries if isinstance(entry, ChangeEnded)}
        begun = [entry for entry in entries if isinstance(entry, ChangeBegun)]
        return begun[-1] if begun and begun[-1].id not in ended else None


def outcomes(entries: Iterable[Entry]) -> Iterator[tuple[Published | ChangeBegun, str]]:
    """What was published or changed, with the result, in the order of the ends."""
    begun: dict[str, ChangeBegun] = {}
    for entry in entries:
        if isinstance(entry, Published):
            yield entry, PASSED
        elif isinstance(entry, ChangeBegun):
            begun[entry.id] = entry
        elif isinstance(entry, ChangeEnded) and entry.id in begun:
            yield begun[entry.id], entry.result


def _build(kind: type[Any], fields: dict[str, Any]) -> Any:
    names = [one.name for one in dataclasses.fields(kind) if one.name in fields]
    return kind(**{name: _value(name, fields[name]) for name in names})


def _value(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_value(name, item) for item in value)
    return _build(_NESTED[name], value) if isinstance(value, dict) and name in _NESTED else value


def operator() -> str:
    """Who changes something: the user, or what `OPERATOR_VARIABLE` says."""
    if operator := os.environ.get(OPERATOR_VARIABLE):
        return operator
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
