"""Spikeless: swap TensorFlow Serving models under live traffic, with no latency spike.

What users import is here: ``spikeless.publish(...)``, ``spikeless.warmup.build(...)``.
A name is imported when it is first used, so that ``import spikeless`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spikeless import bench as bench
    from spikeless import errors as errors
    from spikeless import launch as launch
    from spikeless import registry as registry
    from spikeless import warmup as warmup
    from spikeless.bench import report as report
    from spikeless.client import Client as Client
    from spikeless.errors import SpikelessError as SpikelessError
    from spikeless.mapping import MapSettings as MapSettings
    from spikeless.mapping import map_saved_model as map_saved_model
    from spikeless.repository.gates import GateSettings as GateSettings
    from spikeless.repository.publishing import publish as publish
    from spikeless.rollout.fleet import FleetSettings as FleetSettings
    from spikeless.rollout.promotion import PromotionSettings as PromotionSettings
    from spikeless.rollout.promotion import promote as promote
    from spikeless.rollout.promotion import rollback as rollback
    from spikeless.rollout.prune import prune as prune
    from spikeless.rollout.status import status as status
    from spikeless.store.pull import PullSettings as PullSettings
    from spikeless.store.pull import pull as pull
    from spikeless.store.push import push as push
    from spikeless.store.settings import StoreSettings as StoreSettings

__version__ = "0.1.0"

#: Public name -> where it is; with a colon, an attribute of that module. As above.
_HOMES = {
    "Client": "spikeless.client:Client",
    "FleetSettings": "spikeless.rollout.fleet:FleetSettings",
    "GateSettings": "spikeless.repository.gates:GateSettings",
    "MapSettings": "spikeless.mapping:MapSettings",
    "PromotionSettings": "spikeless.rollout.promotion:PromotionSettings",
    "PullSettings": "spikeless.store.pull:PullSettings",
    "SpikelessError": "spikeless.errors:SpikelessError",
    "StoreSettings": "spikeless.store.settings:StoreSettings",
    "bench": "spikeless.bench",
    "errors": "spikeless.errors",
    "launch": "spikeless.launch",
    "map_saved_model": "spikeless.mapping:map_saved_model",
    "promote": "spikeless.rollout.promotion:promote",
    "prune": "spikeless.rollout.prune:prune",
    "publish": "spikeless.repository.publishing:publish",
    "pull": "spikeless.store.pull:pull",
    "push": "spikeless.store.push:push",
    "registry": "spikeless.registry",
    "report": "spikeless.bench.report",
    "rollback": "spikeless.rollout.promotion:rollback",
    "status": "spikeless.rollout.status:status",
    "warmup": "spikeless.warmup",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    home = importlib.import_module(module)
    return getattr(home, attribute) if attribute else home


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
