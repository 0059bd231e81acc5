"""The embedded engine: a server like TensorFlow Serving over TensorFlow's C runtime.

In: the values of flags. Out: listening ports.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from spikeless import runtime
from spikeless.engine import configuration, reflection, transport
from spikeless.engine.configuration import ConfigFile
from spikeless.engine.core import ServerCore
from spikeless.engine.flags import ServerFlags, channel_arguments
from spikeless.engine.grpc_api import (
    InferenceServicer,
    ModelServicer,
    PredictionServicer,
    add_inference_service,
    add_prediction_service,
)
from spikeless.engine.handlers import MAX_REQUEST_BYTES, Calls
from spikeless.engine.loader import ModelLoader
from spikeless.engine.open_inference import OpenInference
from spikeless.errors import Internal, Unavailable
from spikeless.formats import open_inference_messages
from spikeless.formats.kinds import SERVICE
from spikeless.formats.protos import model_service_pb2_grpc
from spikeless.formats.states import State, VersionStatus

if TYPE_CHECKING:  # imported where they are used: a server without them saves the memory of their libraries
    from spikeless.engine.metrics import Metrics
    from spikeless.engine.rest_server import RestServer
    from spikeless.engine.workers.replica import Replica

_log = logging.getLogger(__name__)
#: Services whose health is the server's: the first two are TensorFlow Serving's names.
_SERVICES = ("ModelService", "PredictionService", SERVICE, open_inference_messages.SERVICE)


def _bind(server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    try:
        if credentials is not None:
            return int(server.add_secure_port(address, credentials))
        return int(server.add_insecure_port(address))
    except RuntimeError:
        raise Unavailable(f"cannot listen on {address}: is it right, and free?") from None


class Ports(NamedTuple):
    """Where a server listens."""

    grpc: int
    #: None without a REST API.
    rest: int | None


class Server:
    """The core and its transports: start (returns the bound ports), wait, stop."""

    def __init__(self, flags: ServerFlags, supervisor: socket.socket | None = None) -> None:
        """One of several workers is told by ``supervisor`` what to serve."""
        configuration.check_named(flags)
        self._flags = flags
        self._credentials: grpc.ServerCredentials | None = None
        if flags.ssl_config_file:
            from spikeless.engine import tls

            self._credentials = tls.credentials(flags.ssl_config_file)
        self._metrics: Metrics | None = None
        if flags.monitoring_config_file:
            from spikeless.engine.metrics import Metrics, read_monitoring_path

            if path := read_monitoring_path(flags.monitoring_config_file):
                self._metrics = Metrics(path)
        loader = ModelLoader(flags, self._metrics)
        self.core: ServerCore | Replica
        if supervisor is None:
            self.core = ServerCore(loader, flags)
        else:
            from spikeless.engine.workers.replica import Replica

            self.core = Replica(loader, flags, supervisor, self._metrics)
        if self._metrics is not None:
            self.core.add_listener(self._metrics.version_changed)
        self._rest: RestServer | None = None
        self._health = health.HealthServicer()
        self._grpc: grpc.Server | None = None
        self._draining = False
        self._stopping = threading.Event()
        self._stopped = threading.Event()
        # What ended it, or failed while it stopped.
        self._failures: list[str] = []

    def start(self) -> Ports | None:
        """Load the models, then listen. Returns None when it was stopped meanwhile.

        Raises:
            SpikelessError: a wrong configuration, a model that cannot be loaded, or a
                port that is taken.
        """
        try:
            self.core.add_listener(self._version_changed)
            if isinstance(self.core, ServerCore):
                self.core.start(configuration.initial(self._flags))
            else:
                self.core.start()
            # Whatever lives now lives on; the collector need not visit it again.
            gc.collect()
            gc.freeze()
            runtime.return_free_memory()
            return None if self._stopping.is_set() else self._listen()
        except BaseException:
            self.stop(0.0)
            raise

    def _listen(self) -> Ports:
        # REST first: who finds the gRPC port open finds both.
        rest = self._listen_rest() if self._flags.rest_api_port else None
        threads = self._flags.grpc_max_threads
        options: dict[str, int | str] = {
            "grpc.so_reuseport": int(self._flags.workers > 1),
            "grpc.max_receive_message_length": MAX_REQUEST_BYTES,
            "grpc.max_send_message_length": -1,
            **dict(channel_arguments(self._flags.grpc_channel_arguments)),
        }
        pool = ThreadPoolExecutor(threads, thread_name_prefix="grpc")
        server: grpc.Server
        if self._credentials is None and transport.SUPPORTED_OPTIONS.issuperset(options):
            server = transport.FastServer(pool, threads, options, failed=self._end)
        else:
            server = grpc.server(pool, maximum_concurrent_rpcs=threads, options=list(options.items()))
        calls = Calls(self.core, "GRPC", self._metrics)
        add_prediction_service(PredictionServicer(calls), server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(calls), server)
        add_inference_service(InferenceServicer(OpenInference(calls, self._is_ready)), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable(server)
        port = _bind(server, f"{self._flags.host}:{self._flags.port}", self._credentials)
        if self._flags.grpc_socket_path:
            _bind(server, f"unix:{self._flags.grpc_socket_path}", self._credentials)
        self._update_health()
        server.start()
        self._grpc = server
        if isinstance(self.core, ServerCore):
            ConfigFile(self._flags, self.core, self._stopping, self._update_health).start()
        else:
            self.core.listens()
        _log.info("Running gRPC ModelServer at %s:%d ...", self._flags.host, port)
        return Ports(port, rest)

    def _listen_rest(self) -> int:
        from spikeless.engine.rest_api import RestApi
        from spikeless.engine.rest_server import RestServer

        calls = Calls(self.core, "REST", self._metrics)
        self._rest = RestServer(RestApi(calls, self._flags, self._is_ready), self._flags, failed=self._end)
        port = self._rest.start()
        _log.info("Exporting HTTP/REST API at:%s:%d ...", self._flags.host, port)
        return port

    def _version_changed(self, name: str, status: VersionStatus) -> None:
        self._set_health(f"{name}/{status.version}", status.state is State.AVAILABLE)
        self._set_health(name, bool(self.core.available(name)))
        self._update_health()

    def _set_health(self, service: str, serving: bool) -> None:
        response = health_pb2.HealthCheckResponse
        self._health.set(service, response.SERVING if serving else response.NOT_SERVING)

    def _is_ready(self) -> bool:
        """Whether every model that can be loaded has an available version."""
        names = self.core.model_names()
        available = [name for name in names if self.core.available(name)]
        coming = any(
            status.state in (State.START, State.LOADING)
            for name in set(names) - set(available)
            for status in self.core.version_statuses(name)
        )
        leaving = self._draining or self._stopping.is_set()
        return (bool(available) or not names) and not coming and not leaving

    def _update_health(self) -> None:
        serving = self._is_ready()
        for service in ("", *_SERVICES):
            self._set_health(service, serving)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the server has stopped; False after ``timeout`` seconds.

        Raises:
            Internal: a part of the server failed, before or while it stopped.
        """
        stopped = self._stopped.wait(timeout)
        if self._failures:
            raise Internal("; ".join(self._failures))
        return stopped

    def drain(self, seconds: float) -> None:
        """Say that it is not ready any more, and go on answering for some time."""
        self._draining = True
        self._health.enter_graceful_shutdown()
        self._stopping.wait(seconds)

    def stop(self, grace: float) -> None:
        """Take no new requests, let others end within ``grace`` seconds, unload.

        A part that fails keeps no other from stopping; `wait` tells.
        """
        if self._stopping.is_set():
            self._stopped.wait()
            return
        self._stopping.set()
        self._attempt(self._health.enter_graceful_shutdown)
        # Both drain at the same time.
        draining = self._attempt(self._grpc.stop, grace) if self._grpc is not None else None
        if self._rest is not None:
            self._attempt(self._rest.stop, grace)
        if draining is not None:
            self._attempt(draining.wait)
        self._attempt(self.core.stop)
        self._stopped.set()

    def _end(self, error: Exception) -> None:
        """Have the process stopped, as it always is, because a part has failed."""
        self._failures.append(f"{type(error).__name__}: {error}")
        os.kill(os.getpid(), signal.SIGTERM)

    def _attempt(self, part: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return part(*arguments)
        except Exception as error:
            _log.exception("while stopping")
            self._failures.append(f"while stopping: {type(error).__name__}: {error}")
