"""Reports: what each machine of a fleet says of itself, in the store that it follows.

In: JSON from a store, which may hold anything. Out: what it says, checked: sizes are
within limits, names are names, and texts have no control characters.

    <store>/.fleet/<node>.json    the last report of one machine, written by it alone
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import msgspec

from spikeless.errors import DataLoss, FailedPrecondition, NotFound, SpikelessError
from spikeless.store.changes import NODE_PATTERN, Node, Version, check_node
from spikeless.store.documents import Reader
from spikeless.store.objects import Store

FORMAT = 1
#: Of the versions of a model, so many of the newest are named.
MAX_VERSIONS = 50
MAX_MODELS = 1000
MAX_TEXT = 500
#: Seconds between two reports, at most.
MAX_EVERY = 3600.0
MAX_BYTES = 1 << 20

_FOLDER = ".fleet"
_SUFFIX = ".json"

_Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT, pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=1e18)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class NodeTraffic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests to a model on one machine, by its servers' metrics."""

    requests: _Amount = 0.0
    #: Requests that failed.
    errors: _Amount = 0.0
    #: Upper bound of the bucket that has the p99, in milliseconds; None without
    #: requests.
    p99_ms: _Amount | None = None

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0


class NodeModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model on one machine."""

    name: _Text
    #: Versions that are pulled.
    on_disk: Annotated[tuple[Version, ...], msgspec.Meta(max_length=MAX_VERSIONS)]
    #: Version -> its state on the machine's servers, with the error where there is one.
    states: Annotated[dict[Version, _Text], msgspec.Meta(max_length=MAX_VERSIONS)]
    #: Label -> the version that answers it on all of the machine's servers.
    labels: Annotated[dict[_Text, Version], msgspec.Meta(max_length=MAX_VERSIONS)]
    #: Why it does not have, or serve, what is promoted; empty where it does.
    error: _Text
    #: Whether its servers refused what is promoted: it is not tried again.
    refused: bool
    #: Seconds since labels last moved here.
    watched: _Amount
    #: Traffic since then, and in the time before; None where no metrics are read.
    since: NodeTraffic | None
    before: NodeTraffic | None


class NodeReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one machine says of itself."""

    format: int
    node: Node
    #: Goes up with each report.
    number: _Number
    #: When it was written by the machine's clock, in seconds since 1970.
    time: _Amount
    #: Seconds until the next one, at most, unless it is `busy`.
    every: Annotated[float, msgspec.Meta(gt=0, le=MAX_EVERY)]
    #: The number of the change in the store that the machine knows.
    change: _Number
    #: Whether it pulls or promotes just now.
    busy: bool
    #: How many servers it promotes on.
    servers: _Number
    models: Annotated[tuple[NodeModel, ...], msgspec.Meta(max_length=MAX_MODELS)]

    def model(self, name: str) -> NodeModel | None:
        """What it says of one model."""
        return next((model for model in self.models if model.name == name), None)


#: Reads a report.
READER = Reader(NodeReport, FORMAT)


def clean(text: str) -> str:
    """A text as reports may have it: one line, not too long."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())[:MAX_TEXT]


class Reports:
    """The reports in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, report: NodeReport) -> None:
        """Put a machine's report in place of its last one."""
        self._store.write(_path(report.node), msgspec.json.encode(report) + b"\n")

    def remove(self, node: str) -> None:
        """Take the report of a machine back: it follows the store no more."""
        self._store.remove(_path(node))

    def nodes(self) -> list[str]:
        """The machines that have a report."""
        names = (name.removesuffix(_SUFFIX) for name in self._store.names(_FOLDER) if name.endswith(_SUFFIX))
        return sorted(name for name in names if re.match(NODE_PATTERN, name))

    def read(self, node: str) -> NodeReport:
        """The last report of one machine.

        Raises:
            NotFound: there is none. DataLoss: it cannot be used.
            FailedPrecondition: a newer Spikeless wrote it.
        """
        where = self._store.show(_path(node))
        data = self._store.read(_path(node), MAX_BYTES)
        report = READER.read(data, where)
        if report.node != node:
            raise DataLoss(f"{where} cannot be used: it is of {report.node}")
        return report

    def read_all(self, nodes: list[str]) -> dict[str, NodeReport | SpikelessError]:
        """The last reports of machines, or why one cannot be used.

        Raises:
            Unavailable: the store does not answer.
        """

        def one(node: str) -> NodeReport | SpikelessError:
            try:
                return self.read(node)
            except NotFound:
                return NotFound("it has no report any more")
            except (DataLoss, FailedPrecondition) as error:
                return error

        with ThreadPoolExecutor(self._store.settings.workers, "reports") as pool:
            return dict(zip(nodes, pool.map(one, nodes), strict=True))


def _path(node: str) -> str:
    return f"{_FOLDER}/{check_node(node)}{_SUFFIX}"
