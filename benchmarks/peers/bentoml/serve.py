"""BentoML: a service with ``tf.saved_model.load``, by ``bentoml serve``.

BentoML's documentation ("Parallelize requests handling") has ``workers`` to use several
processors, here one for each.

A version is changed by a new deployment ("Manage Deployments"), which on one machine is
a restart: HUP to ``bentoml serve`` makes its process manager restart the workers on the
socket that stays open.
"""

from __future__ import annotations

import os
from typing import Any

import bentoml
import versions


@bentoml.service(workers=len(os.sched_getaffinity(0)), traffic={"timeout": 60})
class Peer:
    """The service."""

    def __init__(self) -> None:
        self._predict = versions.load(versions.newest())

    @bentoml.api(route="/predict")
    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"outputs": self._predict(inputs["ids"])}
