"""The load in Locust: one user per process, which drives one open-loop schedule.

In: Locust's ``--host HOST:PORT`` and the options below. Out: Locust's statistics, and
with ``--record`` a raw result with every request (`spikeless.bench.run_file`). With
workers (``--processes 2``, or ``--master`` and ``--worker``) the master gives all of
them one start and each a share of the one schedule. Each writes its own file, and
`spikeless bench merge` merges them.

Locust's own ``--otel`` exports metrics and logs of the load by OpenTelemetry; it needs
``pip install 'locust[otel]'``. ``--request-log`` is Locust's log of requests, for tools
that read CSV.

The user's thread is a real one, outside gevent: see `openloop`. Take percentiles from
the raw result: Locust's statistics are rounded and a few milliseconds late.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import gevent
import gevent.queue
import numpy as np
from locust import LoadTestShape, User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.contrib.csv_request_logger import CsvRequestLogger
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import LocalRunner, MasterRunner, Runner, WorkerRunner

from spikeless.bench.analysis import percentile
from spikeless.bench.load.connection import parse_target
from spikeless.bench.load.openloop import LINE_PREFIX, OpenLoop
from spikeless.bench.machine import describe_machine, source_commit
from spikeless.bench.replayed import ReplayedRequest, choose, read_requests
from spikeless.bench.run_file import Facts, Run, ServerFacts, Settings
from spikeless.bench.schedule import ARRIVALS
from spikeless.errors import Code, InvalidArgument, SpikelessError
from spikeless.launch import LOOPBACK

#: From the decision to start until the first request: the workers' time to get ready.
_LEAD_SECONDS = 1.0
_REPORT_SECONDS = 0.02
_LINE_SECONDS = 0.5
_SHARE, _DONE = "spikeless-share", "spikeless-done"


class _Load:
    """What this process knows of the run."""

    shares: gevent.queue.Queue[dict[str, Any]] = gevent.queue.Queue()
    shares_given = 0
    shares_done = 0


@events.init_command_line_parser.add_listener
def _options(parser: LocustArgumentParser) -> None:
    parser.set_defaults(web_host=LOOPBACK)  # Who wants others to see its page says so.
    group = parser.add_argument_group("Open loop", "The load of Spikeless; -u, -r and -t do not apply")
    add = group.add_argument
    add("--name", dest="model_name", default="boston", help="Name of the model")
    add(
        "--requests",
        default="",
        metavar="FILE",
        help="The requests to replay: a TFRecord file of PredictionLog, as the model's own "
        "assets.extra/tf_serving_warmup_requests",
    )
    add("--rate", type=float, default=300.0, help="Requests per second, of all workers together")
    add("--seconds", type=float, default=30.0, help="How long requests leave")
    add("--arrivals", choices=ARRIVALS, default="poisson", help="Poisson, evenly spaced, or in bursts")
    add("--seed", type=int, default=1, help="Seed of random arrivals and batch sizes")
    add("--batch-sizes", default="", help="Share of each batch size, such as 1:70,8:30")
    add("--timeout", type=float, default=10.0, help="Deadline of each request in seconds")
    add("--scenario", default="load", help="Name of the run in its record")
    add("--record", default="", metavar="FILE", help="Write every request to this .npz file")
    add("--request-log", default="", metavar="FILE", help="Write every request to this .csv file, too")


@events.init.add_listener
def _init(environment: Environment, runner: Runner, **_: Any) -> None:
    if isinstance(runner, WorkerRunner):
        runner.register_message(_SHARE, lambda msg, **_: _Load.shares.put(msg.data))
    elif isinstance(runner, MasterRunner):
        runner.register_message(_DONE, _share_done)
    try:
        _read(environment)
    except SpikelessError as error:
        if environment.web_ui is None:
            sys.exit(f"spikeless: error: {error}")


def _read(environment: Environment) -> tuple[Settings, list[ReplayedRequest]]:
    """The settings and the requests that the options name.

    Raises:
        SpikelessError: they are wrong.
    """
    options: Namespace = environment.parsed_options
    if not environment.host:
        raise InvalidArgument("no server to load: give --host HOST:PORT, for example 127.0.0.1:8500")
    if not options.requests:
        raise InvalidArgument(
            "no requests to send: give --requests FILE, the model's warmup file for example"
        )
    parse_target(environment.host)
    settings = Settings(
        model_name=options.model_name,
        requests=options.requests,
        rate=options.rate,
        seconds=options.seconds,
        arrivals=options.arrivals,
        seed=options.seed,
        batch_sizes=options.batch_sizes,
        timeout=options.timeout,
        processes=max(1, abs(options.processes or 1)),
        warm_seconds=0.0,
    )
    return settings, read_requests(settings.requests, settings.model_name)


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
            share = {"start": start, "index": index, "count": len(workers)}
            runner.send_message(_SHARE, share, client_id=worker)
    else:
        _Load.shares_given = 1
        _Load.shares.put({"start": start, "index": 0, "count": 1})
    _tell(start=start)


def _share_done(**_: Any) -> None:
    _Load.shares_done += 1


def _tell(**facts: Any) -> None:
    # One write, so that lines of several processes do not mix.
    os.write(1, f"{LINE_PREFIX}{json.dumps(facts)}\n".encode())


def _file_of(file: str, share: dict[str, Any]) -> Path:
    """The file of this process: as it is named, or numbered beside those of others."""
    path = Path(file)
    if share["count"] > 1:
        path = path.with_name(f"{path.stem}.worker-{share['index']}{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class OneUserPerProcess(LoadTestShape):
    """Starts one user in each process; ends the test when all have finished."""

    def tick(self) -> tuple[int, float] | None:
        if _Load.shares_given and _Load.shares_done >= _Load.shares_given:
            _Load.shares_given = 0
            return None
        users = max(1, self.runner.worker_count) if isinstance(self.runner, MasterRunner) else 1
        return users, users


class OpenLoopUser(User):
    """Drives one share of the schedule in a thread, and feeds Locust's statistics."""

    @task
    def drive(self) -> None:
        settings, requests = _read(self.environment)
        share = _Load.shares.get()
        # A share's requests are those that one process would send at these times.
        mine = slice(share["index"], None, share["count"])
        offsets = settings.schedule.offsets()
        numbers = choose(requests, len(offsets), settings.batch_sizes, settings.seed)
        load = OpenLoop(offsets[mine], requests, self.environment.host, settings.timeout, numbers[mine])
        log = None
        if self.environment.parsed_options.request_log:
            file = _file_of(self.environment.parsed_options.request_log, share)
            log = CsvRequestLogger(str(file), flush_interval=1000)
            log.register(self.environment)
        # A full collection during the run would look like a spike of the server.
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(0.0005)
        start = time.monotonic() + share["start"] - time.time()
        thread = gevent.get_hub().threadpool.spawn(load.run, start)
        try:
            self._follow(load, thread, start, share)
        finally:
            load.stop()
            thread.get()
            self._save(load, settings, share)
            if log is not None:
                log.close()
        runner = self.environment.runner
        if isinstance(runner, LocalRunner):
            _share_done()
        else:
            runner.send_message(_DONE, {})
        raise StopUser

    def _follow(self, load: OpenLoop, thread: Any, start: float, share: dict[str, Any]) -> None:
        fire = self.environment.events.request.fire
        columns = load.columns
        methods = [request.kind.name for request in load.requests]
        next_line = start
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
                    request_type="gRPC",
                    name=methods[columns.request[index]],
                    start_time=share["start"] + float(columns.intended[index]),
                    response_time=latency,
                    response_length=0,
                    exception=None if code == Code.OK else RuntimeError(code.name),
                    context={},
                )
            if time.monotonic() >= next_line:
                next_line += _LINE_SECONDS
                _tell(
                    worker=share["index"],
                    sent=load.sent,
                    failed=failed,
                    rate=len(recent) / _LINE_SECONDS,
                    p99_ms=round(percentile(np.array(recent), 0.99), 3) if recent else 0.0,
                    slowest_ms=round(max(recent, default=0.0), 3),
                )
                recent.clear()

    def _save(self, load: OpenLoop, settings: Settings, share: dict[str, Any]) -> None:
        options: Namespace = self.environment.parsed_options
        if not options.record:
            return
        path = _file_of(options.record, share)
        started = datetime.datetime.fromtimestamp(share["start"], datetime.timezone.utc)
        if path.exists():  # Of an earlier run, started from the web page for example.
            path = path.with_name(f"{path.stem}-{started:%Y%m%dT%H%M%SZ}.npz")
        facts = Facts(
            scenario=options.scenario,
            started=started.isoformat(timespec="milliseconds"),
            commit=source_commit(),
            settings=settings,
            machine=describe_machine(),
            server=ServerFacts(self.environment.host),
            generator=tuple(sys.argv),
        )
        Run(facts, load.columns.ended()).save(path)
