"""The changes of what a fleet serves: records in a store, and their copy for pullers.

In: a store, and changes. Out:

    <store>/.promotions/<n>.json one record for each change, with the whole of it
    <store>/models.config        the copy of the last one, which pullers poll

A record is written where none is, so of two changes at once the second begins again
from what the first made of it. The last record counts; its number is the first line of
``models.config``, so that this differs after every change. A change that was cut short
between the two is completed by the next one.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any, Literal

import msgspec

from spikeless.errors import (
    AlreadyExists,
    DataLoss,
    InvalidArgument,
    NotFound,
    SpikelessError,
    Unavailable,
)
from spikeless.formats.versions import MAX_VERSION
from spikeless.repository import journal, models_config
from spikeless.repository.models_config import ModelsConfig
from spikeless.store.documents import Reader
from spikeless.store.objects import Store

FORMAT = 1
#: Times that a change begins again before others are said to be in the way.
ROUNDS = 20
MAX_NODES = 10_000
#: The name of a machine, which is part of an object's.
NODE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\Z"

_FOLDER = ".promotions"
_SUFFIX = ".json"
_MAX_CONFIG_BYTES = 1 << 20
#: A record holds the configuration, escaped.
_MAX_RECORD_BYTES = 4 << 20
_HEADER = re.compile(rb"# change (\d{1,9})\n")

Version = Annotated[int, msgspec.Meta(ge=0, le=MAX_VERSION)]
MAX_TEXT = 1024
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Node = Annotated[str, msgspec.Meta(pattern=NODE_PATTERN)]


def this_node() -> str:
    """The name of this machine: its host name."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:128].lstrip("_.-")
    return name or "localhost"


def check_node(name: str) -> str:
    """The name of a machine.

    Raises:
        InvalidArgument: it is none.
    """
    if not re.match(NODE_PATTERN, name):
        raise InvalidArgument(
            f"{name!r} is no name of a machine: 1 to 128 letters, digits, '_', '-' and '.', the first a "
            "letter or digit; give one with --node"
        )
    return name


class Waves(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A promotion of one model that goes through a fleet in waves."""

    model: Text
    label: Text
    version: Version
    #: The version that the label points at outside of the waves.
    previous: Version
    #: What ``models.config`` says of the model on machines that have the version.
    block: str
    #: How many machines have the version after each wave, ``5`` or ``10%``.
    sizes: tuple[Text, ...]
    #: The machines that are the first wave by their names.
    first: Annotated[tuple[Node, ...], msgspec.Meta(max_length=MAX_NODES)]
    #: The machines of each wave so far; the last is the present one.
    nodes: Annotated[tuple[tuple[Node, ...], ...], msgspec.Meta(min_length=1, max_length=1000)]
    #: The number of the change with which the present wave began.
    change: int
    #: Who began it, where, and when, in seconds since 1970.
    user: Text
    host: Text
    time: float

    def wave_of(self, node: str) -> int:
        """The wave that a machine is in, from 1; 0 for none."""
        return next((number for number, nodes in enumerate(self.nodes, 1) if node in nodes), 0)

    @property
    def reached(self) -> list[str]:
        """All machines that have the version."""
        return [node for nodes in self.nodes for node in nodes]


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One change of what a fleet serves."""

    format: int
    #: From 1, without gaps.
    number: int
    #: A ``wave`` moves the label on some machines, the others on all.
    action: Literal["promote", "rollback", "wave"]
    model: Text
    label: Text
    version: Version
    #: The version that the label pointed at before.
    previous: Version | None
    reason: Text
    #: Who made it, where, and when, in seconds since 1970.
    user: Text
    host: Text
    time: float
    #: The text of ``models.config`` after it, for machines that no wave has reached.
    config: str
    #: The promotions that go on in waves, at most one of each model.
    waves: tuple[Waves, ...] = ()

    @property
    def content(self) -> bytes:
        """The store's ``models.config``."""
        return f"# change {self.number}\n{self.config}".encode()

    def waves_of(self, model: str) -> Waves | None:
        """The promotion of a model that goes on in waves."""
        return next((each for each in self.waves if each.model == model), None)


#: Reads a change.
READER = Reader(Change, FORMAT)


def after(last: Change | None, **fields: Any) -> Change:
    """The change that follows another one, made here and now.

    It leaves the promotions that go on in waves as they are, unless ``fields`` say
    otherwise.
    """
    fields["reason"] = fields["reason"][:MAX_TEXT]
    unchanged = {} if last is None else {"config": last.config, "waves": last.waves}
    return Change(
        format=FORMAT,
        number=1 if last is None else last.number + 1,
        user=journal.operator(),
        host=socket.gethostname(),
        time=time.time(),
        **(unchanged | fields),
    )


class Changes:
    """The changes of a store's fleet."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def last(self) -> Change | None:
        """The last change; a store may list late, so it is looked for by name, too."""
        numbers = [1]
        for name in self._store.names(_FOLDER):
            with suppress(ValueError):
                numbers.append(int(name.removesuffix(_SUFFIX)))
        last = None
        number = max(numbers)
        while (found := self.find(number)) is not None:
            last, number = found, number + 1
        return last

    def backwards(self, last: Change | None) -> Iterator[Change]:
        """A change and all before it."""
        change = last
        while change is not None:
            yield change
            change = self.find(change.number - 1)

    def find(self, number: int) -> Change | None:
        """A change by its number.

        Raises:
            DataLoss, FailedPrecondition: it cannot be used.
        """
        if number < 1:
            return None
        path = f"{_FOLDER}/{number}{_SUFFIX}"
        where = self._store.show(path)
        try:
            data = self._store.read(path, _MAX_RECORD_BYTES)
        except NotFound:
            return None
        change = READER.read(data, where)
        if change.number != number:
            raise DataLoss(f"{where} cannot be used: it is number {change.number}")
        return change

    def config_of(self, change: Change | None) -> ModelsConfig:
        """The ``models.config`` after a change."""
        if change is None:
            return ModelsConfig()
        return parse(change.config.encode(), self._store.show(f"{_FOLDER}/{change.number}{_SUFFIX}"))

    def add(self, change: Change) -> bool:
        """Record a change and publish it; False where another came first."""
        with suppress(AlreadyExists):
            self._store.create(f"{_FOLDER}/{change.number}{_SUFFIX}", msgspec.json.encode(change) + b"\n")
        # Stores without an exclusive write let the last of two win: see who did.
        if self.find(change.number) != change:
            return False
        self.publish()
        return True

    def publish(self) -> None:
        """Write ``models.config`` until it is the copy of the last record.

        Whoever changes something at the same time does the same, and the one who writes
        last has seen both records.
        """
        for _ in range(ROUNDS):
            last = self.last()
            if last is None or self._published() == last.content:
                return
            self._store.write(models_config.FILE_NAME, last.content)
        raise self.busy()

    def busy(self) -> Unavailable:
        """The error where others change something all the time."""
        return Unavailable(f"others promote in {self._store.shown} all the time; repeat the command")

    def published(self) -> tuple[ModelsConfig, Change | None]:
        """The fleet's ``models.config``, and the change that it is the copy of.

        Raises:
            NotFound: there is none. DataLoss: it cannot be used.
        """
        data = self._store.read(models_config.FILE_NAME, _MAX_CONFIG_BYTES)
        config = parse(data, self._store.show(models_config.FILE_NAME))
        header = _HEADER.match(data)
        change = self.find(int(header[1])) if header else None
        if change is None:
            return config, None
        # Whoever was killed while another changed something may have left an old copy.
        while (later := self.find(change.number + 1)) is not None:
            change = later
            config = self.config_of(change)
        return config, change

    def _published(self) -> bytes:
        try:
            return self._store.read(models_config.FILE_NAME, _MAX_CONFIG_BYTES)
        except (NotFound, DataLoss):
            return b""


def pinned(config: ModelsConfig, name: str) -> list[int]:
    """The versions of a model that a fleet serves."""
    model = config.model(name)
    return [] if model is None else sorted(model.model_version_policy.specific.versions)


def labels(config: ModelsConfig, name: str) -> dict[str, int]:
    """The labels of a model, and the versions at which they point."""
    model = config.model(name)
    return {} if model is None else dict(model.version_labels)


def parse(data: bytes, where: str) -> ModelsConfig:
    """A fleet's ``models.config``.

    Every model in it has versions, and labels that point at them.

    Raises:
        DataLoss: it cannot be used.
    """
    try:
        config = models_config.parse(data.decode())
        for name in config.names:
            versions = pinned(config, name)
            if not versions or not set(labels(config, name).values()) <= set(versions):
                raise InvalidArgument(f"{name} has no versions, or labels of others")
    except (SpikelessError, ValueError, RecursionError) as error:
        raise DataLoss(f"{where} cannot be used: {error}; promote a version again") from None
    return config
