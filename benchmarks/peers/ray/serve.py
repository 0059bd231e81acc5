"""Ray Serve: a deployment with ``tf.saved_model.load``, one replica for each processor.

Replicas take no whole processor of Ray's account each, which would leave none for its
proxy. Requests are answered in a thread, as the documentation ("Asyncio and
concurrency best practices in Ray Serve") asks of what blocks.

A version is changed as the documentation says ("Updating Applications In-Place" and
"Dynamically change parameters without restarting replicas"): a new ``user_config``,
which ``reconfigure`` of each replica gets. HUP does so.
"""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import sys
from typing import Any

import ray
import versions
from ray import serve
from starlette.requests import Request

_REPLICAS = len(os.sched_getaffinity(0))


@serve.deployment(num_replicas=_REPLICAS, ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=32)
class Peer:
    """The deployment."""

    def reconfigure(self, config: dict[str, Any]) -> None:
        self._predict = versions.load(versions.models() / config["version"])

    async def __call__(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        return {"outputs": await asyncio.to_thread(self._predict, body["inputs"]["ids"])}


def deploy() -> None:
    version = versions.newest().name
    deployment: Any = Peer
    configured = deployment.options(user_config={"version": version})
    serve.run(configured.bind(), name="peer", route_prefix="/predict")


def main() -> None:
    told: queue.SimpleQueue[int] = queue.SimpleQueue()
    variables = {name: os.environ[name] for name in ("PEER_MODELS", "PYTHONPATH")}
    ray.init(include_dashboard=False, num_cpus=_REPLICAS, runtime_env={"env_vars": variables})
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda signum, frame: told.put(signum))
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    deploy()
    while told.get() == signal.SIGHUP:
        deploy()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
