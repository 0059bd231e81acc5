"""The load of a benchmark in Locust: `spikeless.openloop.user` with requests of models.

In: Locust's ``--host [grpcs://]HOST:PORT`` and the options below. Out: Locust's
statistics, and with ``--record`` a raw result with every request
(`spikeless.bench.run_file`). Each worker writes its own file, and `spikeless bench
merge` merges them.

Locust's own ``--otel`` exports metrics and logs of the load by OpenTelemetry; it needs
``pip install 'locust[otel]'``. ``--request-log`` is Locust's log of requests, for tools
that read CSV.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from locust import events
from locust.argument_parser import LocustArgumentParser
from locust.contrib.csv_request_logger import CsvRequestLogger
from locust.env import Environment

from spikeless.bench.analysis import percentile
from spikeless.bench.load import LINE_PREFIX
from spikeless.bench.machine import describe_machine, source_commit
from spikeless.bench.protocols import GRPC, PROTOCOLS
from spikeless.bench.recorded import planned
from spikeless.bench.run_file import Facts, Run, ServerFacts, Settings
from spikeless.channels import endpoint
from spikeless.errors import InvalidArgument, SpikelessError
from spikeless.launch import LOOPBACK
from spikeless.openloop.connection import parse_target
from spikeless.openloop.http1 import HttpLink
from spikeless.openloop.link import GrpcLink
from spikeless.openloop.loop import OpenLoop
from spikeless.openloop.schedule import ARRIVALS, RECORDED
from spikeless.openloop.user import (
    PROGRESS_SECONDS,
    OneUserPerProcess,
    OpenLoopUser,
    Share,
    progressed,
    start_chosen,
)

__all__ = ["OneUserPerProcess", "ReplayingUser"]


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
    add(
        "--arrivals",
        choices=[*ARRIVALS, RECORDED],
        default="poisson",
        help="Poisson, evenly spaced, in bursts, or as the requests were recorded",
    )
    add("--speed", type=float, default=1.0, help="How much faster than they were recorded")
    add("--seed", type=int, default=1, help="Seed of random arrivals and batch sizes")
    add("--batch-sizes", default="", help="Share of each batch size, such as 1:70,8:30")
    add("--protocol", choices=PROTOCOLS, default=GRPC, help="gRPC, or a protocol over HTTP")
    add("--url-path", default="", help="Where requests over HTTP go instead of the protocol's own path")
    add("--timeout", type=float, default=10.0, help="Deadline of each request in seconds")
    add("--scenario", default="load", help="Name of the run in its record")
    add("--record", default="", metavar="FILE", help="Write every request to this .npz file")
    add("--request-log", default="", metavar="FILE", help="Write every request to this .csv file, too")


@events.init.add_listener
def _init(environment: Environment, **_: Any) -> None:
    try:
        planned(_settings(environment))
    except SpikelessError as error:
        if environment.web_ui is None:
            sys.exit(f"spikeless: error: {error}")


def _settings(environment: Environment) -> Settings:
    """What the options say.

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
    parse_target(endpoint(environment.host)[0])
    return Settings(
        model_name=options.model_name,
        requests=options.requests,
        rate=options.rate,
        seconds=options.seconds,
        arrivals=options.arrivals,
        speed=options.speed,
        seed=options.seed,
        batch_sizes=options.batch_sizes,
        protocol=options.protocol,
        url_path=options.url_path,
        timeout=options.timeout,
        processes=max(1, abs(options.processes or 1)),
        warm_seconds=0.0,
    )


def _tell(**facts: Any) -> None:
    # One write, so that lines of several processes do not mix.
    os.write(1, f"{LINE_PREFIX}{json.dumps(facts)}\n".encode())


@start_chosen.add_listener
def _tell_start(start: float, **_: Any) -> None:
    _tell(start=start)


@progressed.add_listener
def _tell_progress(worker: int, sent: int, failed: int, recent: list[float], **_: Any) -> None:
    _tell(
        worker=worker,
        sent=sent,
        failed=failed,
        rate=len(recent) / PROGRESS_SECONDS,
        p99_ms=round(percentile(np.array(recent), 0.99), 3) if recent else 0.0,
        slowest_ms=round(max(recent, default=0.0), 3),
    )


def _file_of(file: str, share: Share) -> Path:
    """The file of this process: as it is named, or numbered beside those of others."""
    path = Path(file)
    if share.count > 1:
        path = path.with_name(f"{path.stem}.worker-{share.index}{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _server(environment: Environment) -> ServerFacts:
    host = environment.host or ""
    is_http = PROTOCOLS[environment.parsed_options.protocol].is_http
    return ServerFacts("", rest_target=host) if is_http else ServerFacts(host)


class ReplayingUser(OpenLoopUser):
    """Replays the requests of a model, and records them."""

    _log: CsvRequestLogger | None = None

    def load(self, share: Share) -> OpenLoop:
        settings = _settings(self.environment)
        plan = planned(settings)
        if self.environment.parsed_options.request_log:
            file = _file_of(self.environment.parsed_options.request_log, share)
            self._log = CsvRequestLogger(str(file), flush_interval=1000)
            self._log.register(self.environment)
        mine = share.calls
        self.link = HttpLink if PROTOCOLS[settings.protocol].is_http else GrpcLink
        target, tls = endpoint(self.environment.host)
        return OpenLoop(
            plan.offsets[mine],
            plan.requests,
            target,
            settings.timeout,
            plan.numbers[mine],
            self.link,
            tls,
        )

    def ended(self, load: OpenLoop, share: Share) -> None:
        self._save(load, share)
        if self._log is not None:
            self._log.close()

    def _save(self, load: OpenLoop, share: Share) -> None:
        options: Namespace = self.environment.parsed_options
        if not options.record:
            return
        path = _file_of(options.record, share)
        started = datetime.datetime.fromtimestamp(share.start, datetime.timezone.utc)
        if path.exists():  # Of an earlier run, started from the web page for example.
            path = path.with_name(f"{path.stem}-{started:%Y%m%dT%H%M%SZ}.npz")
        facts = Facts(
            scenario=options.scenario,
            started=started.isoformat(timespec="milliseconds"),
            commit=source_commit(),
            settings=_settings(self.environment),
            machine=describe_machine(),
            server=_server(self.environment),
            generator=tuple(sys.argv),
        )
        Run(facts, load.columns.ended()).save(path)
