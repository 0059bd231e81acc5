"""Apply what is promoted in a store to this machine.

In: the fleet's ``models.config`` (`spikeless.store.promotions`), whose versions are on
this disk. Out: ``<models>/models.config`` with the same versions and labels.

Where servers are running, that is a promotion or rollback as on a single machine
(`spikeless.rollout.promotion`): the version is tried on them first, they are told of
each step, and everything is put back where one fails. Without servers the file is
written as a whole, for those that start afterwards.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from pathlib import Path

from spikeless.disk.locks import model_lock
from spikeless.formats.versions import list_versions
from spikeless.mapping.manifest import absolute, here
from spikeless.repository import layout, models_config
from spikeless.repository.journal import ChangeBegun, ChangeEnded, Journal, Step
from spikeless.repository.models_config import Blocks, ModelsConfig, new_block, with_versions
from spikeless.rollout import plans
from spikeless.rollout.fleet import FleetSettings
from spikeless.rollout.promotion import PromotionSettings, promote, rollback
from spikeless.store.changes import labels, pinned


def pending(models: Path, name: str, fleet: ModelsConfig) -> dict[str, int]:
    """The labels of a model that point elsewhere here, and where they should."""
    mine = labels(models_config.read(models), name) if models.is_dir() else {}
    return {label: version for label, version in labels(fleet, name).items() if mine.get(label) != version}


def apply(
    models: Path,
    name: str,
    fleet: ModelsConfig,
    *,
    store: str,
    servers: FleetSettings | None,
    serving_root: str | None,
    progress: Callable[[str], None] = lambda line: None,
    interrupted: threading.Event | None = None,
) -> None:
    """Serve the versions of a model that are promoted.

    Args:
        store: what the store is called, for the journal.
        servers: the running servers of this machine; None where none runs.
        serving_root: the absolute path at which servers see the repository; where it is
            here by default.

    Raises:
        PromotionError: a server refused the version; everything was put back.
        SpikelessError: a server does not answer, or ``models.config`` cannot be
            written.
    """
    reason = f"promoted in {store}"
    if servers is None:
        _write(models, name, fleet, f"{absolute(serving_root)}" if serving_root else here(models), reason)
        return
    for label, version in sorted(pending(models, name, fleet).items()):
        now = labels(models_config.read(models), name).get(label)
        if now is not None and version < now:
            rollback(
                models,
                name,
                servers,
                version=version,
                label=label,
                reason=reason,
                progress=progress,
                interrupted=interrupted,
            )
        else:
            settings = PromotionSettings(
                label=label, keep_previous=False, serving_root=serving_root, reason=reason
            )
            promote(models, name, version, servers, settings, progress, interrupted)


def _write(models: Path, name: str, fleet: ModelsConfig, root: str, reason: str) -> None:
    """Write ``models.config`` for servers that start afterwards.

    It lists the other models of the repository, too: a server serves no model that it
    does not list.
    """
    if not fleet.names:
        return
    with model_lock(layout.state_directory(models, name), name, wait=True):
        config = models_config.read(models)
        others: Blocks = {
            other: new_block(other, f"{root}/{other}")
            for other in layout.model_names(models)
            if other not in config.names and other not in fleet.names and list_versions(models / other)
        }
        if others:
            models_config.edit(models, others)
        canary = name + plans.CANARY_SUFFIX
        before: Blocks = {each: config.block(each) for each in (name, canary)}
        journal = Journal(models, name)
        for label, version in sorted(pending(models, name, fleet).items()):
            block = before[name] or new_block(name, f"{root}/{name}")
            after: Blocks = {
                name: with_versions(block, pinned(fleet, name), labels(fleet, name)),
                canary: None,
            }
            begun = ChangeBegun(
                id=secrets.token_hex(8),
                action=plans.PROMOTE,
                version=version,
                label=label,
                previous=labels(config, name).get(label),
                reason=reason,
                steps=(Step("as it was", before), Step("as it is in the store", after)),
            )
            journal.append(begun)
            models_config.edit(models, after)
            journal.append(ChangeEnded(begun.id, plans.PROMOTED))
