"""Watch the server during the load: version states by gRPC, memory and time from /proc.

In: an address, names of models, a process id. Out: the changes of state, and samples,
in seconds after the start of the run.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from spikeless.channels import ChannelOptions, channel
from spikeless.disk import proc
from spikeless.formats.protos import get_model_status_pb2, model_service_pb2_grpc

STATE_POLL_SECONDS = 0.05
SAMPLE_SECONDS = 0.1

#: Column -> dtype of the samples: seconds; bytes of private (RssAnon) and of
#: file-backed memory (RssFile); time of all processors since boot in clock ticks, and
#: how much of it the hypervisor gave to others.
SAMPLES: dict[str, Any] = {
    "t": np.float64,
    "rss_anon": np.int64,
    "rss_file": np.int64,
    "cpu_total": np.int64,
    "cpu_steal": np.int64,
}
#: What is recorded when the server no longer lists a version that it listed before.
GONE = "GONE"

_State = get_model_status_pb2.ModelVersionStatus.State


@dataclass(frozen=True)
class StateChange:
    """A version was first seen in `state` at `t`, up to one poll after the change."""

    t: float
    version: int
    state: str
    error: str = ""
    #: The model that it is a version of; empty: the one that is loaded with requests.
    model: str = ""


def label(model: str, version: int) -> str:
    """How a version is told: ``v3``, or of another model ``other v3``."""
    return f"{model} v{version}" if model else f"v{version}"


class Watcher:
    """Polls in threads while the block runs; a context manager.

    `others` are models beside `model_name` whose states are recorded, too. Without a
    `target` there are no states, and without the `pid` of a process on this machine no
    samples.
    """

    def __init__(self, target: str, model_name: str, pid: int | None, others: Sequence[str] = ()) -> None:
        self.changes: list[StateChange] = []
        self._samples: list[tuple[float, int, int, int, int]] = []
        #: The name in the record -> the request for its states.
        self._requests: dict[str, get_model_status_pb2.GetModelStatusRequest] = {}
        for recorded, name in (("", model_name), *((other, other) for other in others)):
            self._requests[recorded] = get_model_status_pb2.GetModelStatusRequest()
            self._requests[recorded].model_spec.name = name
        self._known: dict[tuple[str, int], str] = {}
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._channel: grpc.Channel | None = None
        if target:
            # With a local pool no other channel of this process shares the connection.
            options: ChannelOptions = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
            self._channel = channel(target, options)
            self._status = model_service_pb2_grpc.ModelServiceStub(self._channel).GetModelStatus
            self._threads.append(
                threading.Thread(target=self._every, args=(STATE_POLL_SECONDS, self._poll), daemon=True)
            )
        if pid is not None:
            sample = functools.partial(self._sample, pid)
            self._threads.append(
                threading.Thread(target=self._every, args=(SAMPLE_SECONDS, sample), daemon=True)
            )

    def __enter__(self) -> Watcher:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._channel is not None:
            self._channel.close()

    @property
    def states(self) -> dict[str, str]:
        """The last known state of each version, by its `label`."""
        known = dict(self._known)
        return {label(model, version): state for (model, version), state in sorted(known.items())}

    @property
    def private_memory(self) -> int | None:
        """The last sample in bytes; None without any."""
        return self._samples[-1][1] if self._samples else None

    def _every(self, period: float, action: Callable[[], None]) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            action()
            due = max(due + period, time.monotonic())
            self._stop.wait(due - time.monotonic())

    def _poll(self) -> None:
        for model, request in self._requests.items():
            try:
                versions = self._status(request, timeout=1.0).model_version_status
            except grpc.RpcError:
                continue  # Without an answer there is no state.
            self._seen(model, versions)

    def _seen(self, model: str, versions: Iterable[Any]) -> None:
        now = time.monotonic()
        seen = {version.version: version for version in versions}
        for number, version in seen.items():
            state = _State.Name(version.state)
            if self._known.get((model, number)) != state:
                self.changes.append(StateChange(now, number, state, version.status.error_message, model))
                self._known[model, number] = state
        for key in [key for key in self._known if key[0] == model and key[1] not in seen]:
            self.changes.append(StateChange(now, key[1], GONE, model=model))
            del self._known[key]

    def _sample(self, pid: int) -> None:
        try:
            memory, (ticks, stolen) = proc.server_memory(pid), proc.processor_ticks()
        except OSError:
            return  # The server is gone.
        file_backed = memory.get("RssFile", 0) + memory.get("RssShmem", 0)
        self._samples.append((time.monotonic(), memory.get("RssAnon", 0), file_backed, ticks, stolen))

    def state_changes(self, start: float) -> list[StateChange]:
        """The changes, in seconds after `start`; negative before it."""
        return [dataclasses.replace(change, t=change.t - start) for change in self.changes]

    def samples(self, start: float) -> dict[str, NDArray[Any]]:
        """The samples by column, in seconds after `start`."""
        columns = zip(*self._samples, strict=True) if self._samples else [()] * len(SAMPLES)
        table = {
            name: np.array(values, dtype)
            for (name, dtype), values in zip(SAMPLES.items(), columns, strict=True)
        }
        table["t"] -= start
        return table
