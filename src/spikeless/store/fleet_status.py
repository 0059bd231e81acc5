"""What a fleet serves: what is promoted in a store, beside what its machines report.

In: a store. Out: for each promoted model its labels, the waves that it is in, and a row
for each machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from spikeless.errors import NotFound, SpikelessError, nearest
from spikeless.repository.models_config import STABLE
from spikeless.store import promotions
from spikeless.store.changes import labels
from spikeless.store.health import Health, Silence, Standing, table
from spikeless.store.objects import Store
from spikeless.store.promotions import Promoted
from spikeless.store.reports import NodeReport, Reports

#: Seconds for which a machine may be silent, or three reports if that is longer.
_PATIENCE = 15.0


@dataclass(frozen=True)
class FleetStatus:
    """One promoted model, and how each machine does with it."""

    name: str
    #: For machines that no wave has reached.
    labels: dict[str, int]
    #: The version that goes through the fleet in waves, and the present wave; None
    #: without.
    promoting: int | None
    wave: int | None
    nodes: list[Standing]

    @property
    def agrees(self) -> bool:
        """Whether every machine serves what it should."""
        return all(one.health is Health.WELL for one in self.nodes)

    def __str__(self) -> str:
        text = ", ".join(f"{label} is version {version}" for label, version in sorted(self.labels.items()))
        waves = "" if self.promoting is None else f"; wave {self.wave} of version {self.promoting}"
        return f"{self.name}: {text}{waves}\n" + (
            table(self.nodes) if self.nodes else "  no machine reports: see `spikeless pull --report`"
        )


def fleet_status(store: str, name: str | None = None) -> list[FleetStatus]:
    """What machines serve of one promoted model, or of all.

    Raises:
        NotFound: the model is not promoted.
        SpikelessError: the store does not answer, or what is promoted cannot be used.
    """
    opened = Store(store)
    promoted = promotions.read(opened)
    known = promoted.config.names
    if name is not None and name not in known:
        raise NotFound(
            f"{opened.shown} has no promoted {name}, only: {', '.join(known) or 'none'}{nearest(name, known)}"
        )
    reports = Reports(opened)
    said = reports.read_all(reports.nodes())
    silence = Silence(_PATIENCE)
    found = []
    for each in [name] if name is not None else known:
        waves = next((waves for waves in promoted.waves if waves.model == each), None)
        nodes = [_standing(promoted, each, node, report, silence) for node, report in said.items()]
        found.append(
            FleetStatus(
                each,
                labels(promoted.config, each),
                None if waves is None else waves.version,
                None if waves is None else len(waves.nodes),
                nodes,
            )
        )
    return found


def _standing(
    promoted: Promoted, name: str, node: str, report: NodeReport | SpikelessError, silence: Silence
) -> Standing:
    wave = promoted.wave_of(node, name)
    if not isinstance(report, NodeReport):
        return Standing(node, wave, Health.SILENT, str(report))
    model = report.model(name)
    wanted = labels(promoted.of(node), name)
    here = {} if model is None else model.labels
    wrong = sorted(label for label in wanted if here.get(label) != wanted[label])
    health, text = Health.WELL, ""
    if silence.is_silent(report) and not report.busy:
        health, text = Health.SILENT, "it does not report any more"
    elif model is None:
        health, text = Health.WAITING, f"it does not follow {name}"
    elif model.refused:
        health, text = Health.BAD, f"it refused what is promoted: {model.error}"
    elif report.servers and wrong:
        why = f"{wrong[0]} is not version {wanted[wrong[0]]}: {model.error or 'not yet'}"
        health, text = Health.WAITING, why
    elif model.error:
        health, text = Health.WAITING, model.error
    return Standing(node, wave, health, text, here.get(STABLE), model, silence.seconds(report), report.change)
