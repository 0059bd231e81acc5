"""Options that several sub-commands of ``spikeless bench`` share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from spikeless import launch
from spikeless.bench.events import CHANGES, EVENTS, PUBLISH
from spikeless.bench.protocols import GRPC, PROTOCOLS
from spikeless.cli.options import SERVER, Duration, models_option
from spikeless.openloop.schedule import ARRIVALS

PATH = click.Path(path_type=Path)
MODEL_PATH = click.Path(path_type=Path, exists=True, file_okay=False)
POSITIVE = click.FloatRange(min=0, min_open=True)
TIME = Duration(positive=True)
COUNT = click.IntRange(min=1)


class Percentage(click.ParamType[Any]):
    """``70%``."""

    name = "percentage"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", str(value).strip())
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is no share of a load: say 70%", param, ctx)
        return float(match[1]) / 100


class Slo(click.ParamType[Any]):
    """``p99.9=20ms``: a figure and its limit."""

    name = "figure=time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        figure, equals, limit = value.partition("=")
        if not equals:
            self.fail(f"{value!r} is no limit: say p99.9=20ms", param, ctx)
        return figure.strip(), TIME.convert(limit, param, ctx) * 1e3


def load_options(function: Any) -> Any:
    """The options of the load: ``--requests``, and fields of `bench.Settings`."""
    options = [
        click.option(
            "--requests", type=PATH, help="TFRecord file of PredictionLog with the requests to replay."
        ),
        click.option("--rate", type=POSITIVE, default=300.0, show_default=True, help="Requests per second."),
        click.option("--arrivals", type=click.Choice(ARRIVALS), default="poisson", show_default=True),
        click.option("--seed", default=1, show_default=True, help="Seed of random arrivals and batch sizes."),
        click.option(
            "--batch-sizes",
            default="",
            help="Share of each batch size among the requests, such as 1:70,8:30.",
        ),
        click.option(
            "--protocol",
            type=click.Choice(list(PROTOCOLS)),
            default=GRPC,
            show_default=True,
            help="How they are sent: gRPC, TensorFlow Serving's REST API, or the Open Inference Protocol's.",
        ),
        click.option("--url-path", default="", help="Where HTTP requests go.  [default: the protocol's]"),
        click.option(
            "--timeout",
            type=TIME,
            default="10s",
            show_default=True,
            help="Deadline of each request.",
        ),
        click.option(
            "--processes", type=COUNT, default=1, show_default=True, help="Processes of the load generator."
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def duration_option(default: str) -> Any:
    return click.option(
        "--duration", type=TIME, default=default, show_default=True, help="How long requests are sent."
    )


class Speed(click.ParamType[Any]):
    """``2x``: so many times as fast."""

    name = "factor"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*x?", str(value).strip())
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is no speed: say 2x", param, ctx)
        return float(match[1])


def run_options(*, publishes: int, duration: str) -> Any:
    """The options of a run beside those of its load, with these defaults."""
    options = [
        click.option(
            "--server",
            "target",
            type=SERVER,
            help="gRPC address of a running server.  [default: start one]",
        ),
        click.option("--rest-server", type=SERVER, help="Its HTTP address, for protocols over HTTP."),
        click.option(
            "--pid",
            type=int,
            help="Its process id, to sample its memory.  [default: who listens there, if on this machine]",
        ),
        models_option,
        click.option(
            "--load",
            "load_share",
            type=Percentage(),
            help="Share of what the server can do, such as 70%, instead of --rate: it is found first.",
        ),
        click.option(
            "--replay",
            type=PATH,
            help="Send the requests of this capture at the times at which they arrived, until its end.",
        ),
        click.option("--speed", type=Speed(), default="1x", show_default=True, help="How much faster."),
        click.option(
            "--scenario", default="load", show_default=True, help="Name that the report groups runs by."
        ),
        duration_option(duration),
        click.option(
            "--settle",
            type=Duration(),
            default="3s",
            show_default=True,
            help="Left out of the steady window.",
        ),
        click.option(
            "--slo-latency",
            type=TIME,
            default="10ms",
            show_default=True,
            help="Slower requests count as a spike.",
        ),
        click.option(
            "--publish",
            "saved_models",
            type=MODEL_PATH,
            multiple=True,
            help="SavedModel to publish as the next version. Several take turns.",
        ),
        click.option(
            "--publish-command", help="Command that publishes a version instead, or with unload unloads one."
        ),
        click.option(
            "--event",
            type=click.Choice(CHANGES),
            default=PUBLISH,
            show_default=True,
            help="What happens to versions: "
            + "; ".join(f"{name}: {EVENTS[name].meaning}" for name in CHANGES)
            + ".",
        ),
        click.option(
            "--publish-model",
            "published_models",
            multiple=True,
            help="Another model that versions are published of, while NAME is loaded. Several take turns.",
        ),
        click.option(
            "--publishes",
            type=COUNT,
            default=publishes,
            show_default=True,
            help="How often; of a storm: how many versions.",
        ),
        click.option(
            "--publish-every",
            type=TIME,
            help="Time between.  [default: an equal share of the load after the warm start; in a storm: 1s]",
        ),
        click.option("--publish-at", type=TIME, help="When the first.  [default: after 60 % of a share]"),
        click.option(
            "--allocator", type=click.Choice(launch.ALLOCATORS), help="Of that server.  [default: glibc]"
        ),
        click.option(
            "--server-flag", multiple=True, help="Another flag for the server that is started; repeatable."
        ),
        click.option("--floor/--no-floor", default=True, help="Measure the generator's own latency first."),
        click.option(
            "--out",
            type=PATH,
            default="reports/raw",
            show_default=True,
            help="Directory of the raw results.",
        ),
    ]

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return load_options(function)

    return decorate
