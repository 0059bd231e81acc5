"""What happens to versions while a load runs: one vocabulary for runs and reports.

In: a name of `EVENTS`, as ``bench run --event`` and `Settings.event` have it. Out: what
it does, and how it is told.
"""

from __future__ import annotations

from dataclasses import dataclass

from spikeless.errors import InvalidArgument

PUBLISH, PUBLISH_ALL, STORM, UNLOAD, START = "publish", "publish-all", "storm", "unload", "start"


@dataclass(frozen=True)
class Event:
    """What happens, and between which moments the requests count as hit by it."""

    #: What it does, in the words of ``--event``'s help.
    meaning: str
    #: ``2 versions were`` and so on.
    done: str
    #: How one is told where it happens: ``publish v2``.
    verb: str = "publish"


EVENTS = {
    PUBLISH: Event("a version is published, of each published model in turn", "swapped"),
    PUBLISH_ALL: Event("a version of every --publish-model is published at once", "swapped, all at once"),
    STORM: Event("versions are published one after the other, as one event", "swapped in a storm"),
    UNLOAD: Event("an old version, loaded beside the one that answers, is unloaded", "unloaded", "unload"),
    START: Event("the server starts", "served after a start", "start"),
}
#: Those of a server that runs.
CHANGES = tuple(name for name in EVENTS if name != START)


def event(name: str) -> Event:
    """The event of this name.

    Raises:
        InvalidArgument: there is none.
    """
    if name not in EVENTS:
        raise InvalidArgument(f"unknown event {name!r}: choose one of {', '.join(EVENTS)}")
    return EVENTS[name]
