"""The open loop as a user of Locust: one in each process, one schedule for all.

In: a subclass of `OpenLoopUser` and Locust's ``--host HOST:PORT``. Out: Locust's
statistics, and `OpenLoopUser.ended` with what happened to each call. With workers
(``--processes 2``, or ``--master`` and ``--worker``) the master gives all of them one
start and each a share of the one schedule, so that together they send what one process
would. Locust's ``-u``, ``-r`` and ``-t`` do not apply. A locustfile must have
`OneUserPerProcess` among its names.

The user's thread is a real one, outside gevent: see `spikeless.openloop.loop`. Take
percentiles from the columns: Locust's statistics are rounded and a few milliseconds
late.
"""

from __future__ import annotations

import gc
import ssl
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import gevent
import gevent.queue
import numpy as np
from locust import LoadTestShape, User, events, task
from locust.env import Environment
from locust.event import EventHook
from locust.exception import StopUser
from locust.runners import LocalRunner, MasterRunner, Runner, WorkerRunner

from spikeless.errors import Code, InvalidArgument
from spikeless.openloop.http1 import HttpLink
from spikeless.openloop.link import GrpcLink, Link
from spikeless.openloop.loop import Call, OpenLoop, Request
from spikeless.openloop.schedule import Schedule

__all__ = [
    "Call",
    "HttpLink",
    "OneUserPerProcess",
    "OpenLoopUser",
    "Schedule",
    "Share",
    "progressed",
    "start_chosen",
]

#: From the decision to start until the first request: the workers' time to get ready.
_LEAD_SECONDS = 1.0
_REPORT_SECONDS = 0.02
#: How often `progressed` is fired.
PROGRESS_SECONDS = 0.5
_SHARE, _DONE = "spikeless-share", "spikeless-done"

#: Fired once, where the start is chosen, with ``start``: the ``time.time`` of offset
#: zero.
start_chosen = EventHook()
#: Fired twice a second in each process, with ``worker``, the number of calls ``sent``
#: and ``failed``, and the latencies (``recent``, milliseconds) since the last time.
progressed = EventHook()


@dataclass(frozen=True)
class Share:
    """What a process sends: every `count`-th call, from number `index` on."""

    #: The ``time.time`` of offset zero.
    start: float
    index: int
    count: int

    @property
    def calls(self) -> slice:
        """Which calls of the schedule are its own."""
        return slice(self.index, None, self.count)


class _Load:
    """What this process knows of the run."""

    shares: gevent.queue.Queue[Share] = gevent.queue.Queue()
    shares_given = 0
    shares_done = 0


@events.init.add_listener
def _init(runner: Runner, **_: Any) -> None:
    if isinstance(runner, WorkerRunner):
        runner.register_message(_SHARE, lambda msg, **_: _Load.shares.put(Share(**msg.data)))
    elif isinstance(runner, MasterRunner):
        runner.register_message(_DONE, _share_done)


@events.test_start.add_listener
def _start(environment: Environment, **_: Any) -> None:
    """Choose the moment of offset zero, and give each worker its share."""
    runner = environment.runner
    if isinstance(runner, WorkerRunner):
        return
    start = time.time() + _LEAD_SECONDS
    _Load.shares_done = 0
    if isinstance(runner, MasterRunner):
        workers = sorted(runner.clients.keys())
        _Load.shares_given = len(workers)
        for index, worker in enumerate(workers):
            share = Share(start, index, len(workers))
            runner.send_message(_SHARE, asdict(share), client_id=worker)
    else:
        _Load.shares_given = 1
        _Load.shares.put(Share(start, 0, 1))
    start_chosen.fire(start=start)


def _share_done(environment: Environment, msg: Any, **_: Any) -> None:
    _end_share(environment, msg.data["failed"])


def _end_share(environment: Environment, failed: bool) -> None:
    if failed:
        environment.process_exit_code = 1
    _Load.shares_done += 1


class OneUserPerProcess(LoadTestShape):
    """Starts one user in each process; ends the test when all have finished."""

    def tick(self) -> tuple[int, float] | None:
        if _Load.shares_given and _Load.shares_done >= _Load.shares_given:
            _Load.shares_given = 0
            return None
        users = max(1, self.runner.worker_count) if isinstance(self.runner, MasterRunner) else 1
        return users, users


class OpenLoopUser(User):
    """Drives a share of the schedule in a thread, and feeds Locust's statistics.

    A subclass sets `schedule` and `calls`, or overrides `load`.
    """

    abstract = True
    schedule = Schedule(rate=100.0, seconds=10.0)
    #: Sent in turn.
    calls: Sequence[Request] = ()
    #: `HttpLink` makes it POST over HTTP/1.1 instead of gRPC.
    link: type[Link] = GrpcLink
    #: The deadline of each call, in seconds.
    timeout = 10.0
    #: For a gRPC server with TLS: whom to trust, and what to show.
    tls: ssl.SSLContext | None = None

    def load(self, share: Share) -> OpenLoop:
        """What this process sends; nothing has been sent yet.

        Raises:
            InvalidArgument: there are no calls, or ``--host`` is no ``host:port``.
        """
        if not self.calls:
            raise InvalidArgument(f"{type(self).__name__} has no calls to send")
        offsets = self.schedule.offsets()
        numbers = np.arange(len(offsets)) % len(self.calls)
        mine = share.calls
        target = self.environment.host or ""
        return OpenLoop(offsets[mine], self.calls, target, self.timeout, numbers[mine], self.link, self.tls)

    def ended(self, load: OpenLoop, share: Share) -> None:
        """The run is over, or was stopped; ``load.columns.ended()`` has its calls."""

    @task
    def drive(self) -> None:
        """Locust's task: the whole run. One that fails ends the test for all."""
        share = _Load.shares.get()
        failed = False
        try:
            self._drive(share)
        except Exception:
            failed = True
            raise
        finally:
            runner = self.environment.runner
            if isinstance(runner, LocalRunner):
                _end_share(self.environment, failed)
            else:
                runner.send_message(_DONE, {"failed": failed})
        raise StopUser

    def _drive(self, share: Share) -> None:
        load = self.load(share)
        # A full collection during the run would look like a spike of the server.
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(0.0005)
        thread = gevent.get_hub().threadpool.spawn(load.run, time.monotonic() + share.start - time.time())
        try:
            self._follow(load, thread, share)
        finally:
            load.stop()
            thread.get()
            self.ended(load, share)

    def _follow(self, load: OpenLoop, thread: Any, share: Share) -> None:
        fire = self.environment.events.request.fire
        columns = load.columns
        names = [request.name for request in load.requests]
        next_progress = time.monotonic() + share.start - time.time()
        failed = 0
        recent: list[float] = []
        while not thread.ready() or load.finished:
            gevent.sleep(_REPORT_SECONDS)
            while load.finished:
                index = load.finished.popleft()
                code = Code(columns.code[index])
                latency = float(columns.latency[index]) * 1e3
                failed += code != Code.OK
                recent.append(latency)
                fire(
                    request_type=self.link.kind,
                    name=names[columns.request[index]],
                    start_time=share.start + float(columns.intended[index]),
                    response_time=latency,
                    response_length=0,
                    exception=None if code == Code.OK else RuntimeError(code.name),
                    context={},
                )
            if time.monotonic() >= next_progress:
                next_progress += PROGRESS_SECONDS
                progressed.fire(worker=share.index, sent=load.sent, failed=failed, recent=recent)
                recent = []
