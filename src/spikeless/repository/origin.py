"""Where a version comes from.

In: what `spikeless.repository.publishing.stage` is told of its source. Out: a line of
the journal; and for a version from a registry its
``assets.extra/spikeless_origin.json``, which becomes visible with the version and goes
wherever that is copied.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from spikeless.errors import DataLoss
from spikeless.formats.savedmodel import EXTRA_DIRECTORY
from spikeless.repository.journal import Findings

FILE_NAME = f"{EXTRA_DIRECTORY}/spikeless_origin.json"
#: Bytes; a larger file is none of ours.
_MAX_SIZE = 1 << 20


@dataclass(frozen=True)
class Origin:
    """A source that has a name of its own, such as a version in a model registry."""

    #: Such as ``models:/ctr/3``.
    source: str
    #: The run that trained it; empty where that is not known.
    run: str = ""
    #: When the registry got it, in milliseconds since 1970: another registry has a
    #: version of the same name, but not of the same moment.
    created: int = 0


@dataclass(frozen=True)
class Taken:
    """What a version says of itself."""

    origin: Origin
    #: Names of the gates that it passed.
    gates: tuple[str, ...] = ()
    findings: Findings = field(default_factory=Findings)


def write(version: Path, taken: Taken) -> None:
    """Add the file to a version that is not visible yet."""
    file = version / FILE_NAME
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(dataclasses.asdict(taken)) + "\n")


def read(version: Path) -> Taken | None:
    """What a version says of itself; None where it does not come from a registry.

    Raises:
        DataLoss: the file cannot be read.
    """
    file = version / FILE_NAME
    try:
        with open(file, "rb") as content:
            fields = json.loads(content.read(_MAX_SIZE))
        return Taken(Origin(**fields["origin"]), tuple(fields["gates"]), Findings(**fields["findings"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataLoss(f"{file} cannot be read: {error}; publish the version again") from None
