"""Options that several sub-commands of ``spikeless bench`` share."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from spikeless import launch
from spikeless.bench.events import CHANGES, EVENTS, PUBLISH, UNLOAD
from spikeless.bench.protocols import GRPC, PROTOCOLS, Protocol
from spikeless.cli.options import SERVER, Duration, models_option
from spikeless.openloop.schedule import ARRIVALS

PATH = click.Path(path_type=Path)
MODEL_PATH = click.Path(path_type=Path, exists=True, file_okay=False)
POSITIVE = click.FloatRange(min=0, min_open=True)
TIME = Duration(positive=True)
COUNT = click.IntRange(min=1)
_REST_SERVER = "--rest-server is for --server with a protocol over HTTP, which needs it"


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


@dataclass(frozen=True)
class RunOptions:
    """What the options of `run_options` say, by their names; times in seconds."""

    name: str
    requests: Path | None
    target: str | None
    rest_server: str | None
    pid: int | None
    models: Path
    load_share: float | None
    replay: Path | None
    speed: float
    scenario: str
    duration: float
    settle: float
    slo_latency: float
    saved_models: tuple[Path, ...]
    publish_command: str | None
    event: str
    published_models: tuple[str, ...]
    publishes: int
    publish_every: float | None
    publish_at: float | None
    allocator: str | None
    server_flag: tuple[str, ...]
    floor: bool
    out: Path
    #: The other options of the load, which are fields of `bench.Settings`.
    load: Mapping[str, Any]

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> RunOptions:
        """What a command with these options was given."""
        own = {field.name for field in dataclasses.fields(cls)}
        load = {name: value for name, value in options.items() if name not in own}
        return cls(**{name: value for name, value in options.items() if name in own}, load=load)

    @property
    def swaps(self) -> bool:
        """Whether versions are published."""
        return bool(self.saved_models) or self.publish_command is not None

    @property
    def protocol(self) -> Protocol:
        return PROTOCOLS[self.load["protocol"]]

    @property
    def other_models(self) -> tuple[str, ...]:
        """Models beside `name` that versions are published of, each once."""
        return tuple(dict.fromkeys(self.published_models))

    def check(self) -> None:
        """Check what the options say of each other.

        Raises:
            click.UsageError: they do not go together.
        """
        if self.saved_models and self.publish_command is not None:
            raise click.UsageError("--publish and --publish-command exclude each other")
        given = (self.publish_at, self.publish_every, self.published_models or None)
        if not self.swaps and (
            any(one is not None for one in given) or self.publishes != 1 or self.event != PUBLISH
        ):
            raise click.UsageError(
                "--event, --publishes, --publish-at, --publish-every and --publish-model need --publish or "
                "--publish-command"
            )
        if self.speed != 1 and self.replay is None:
            raise click.UsageError("--speed is for --replay")
        if self.target is None:
            self._check_started()
        else:
            self._check_running()

    def _check_started(self) -> None:
        if self.pid is not None:
            raise click.UsageError("--pid is for --server: give that, too")
        if self.rest_server is not None:
            raise click.UsageError(_REST_SERVER)
        if self.protocol.only_embedded and launch.chosen_engine() != launch.EMBEDDED:
            raise click.UsageError(
                f"--protocol {self.protocol.name}: TensorFlow Serving, which {launch.ENGINE_VARIABLE} names, "
                "does not speak it; take the embedded engine, --protocol rest, or --server with one that does"
            )

    def _check_running(self) -> None:
        if self.event == UNLOAD and self.saved_models:
            raise click.UsageError(
                "which old versions a running server keeps loaded is its own matter: say with "
                "--publish-command how one is unloaded"
            )
        if self.allocator is not None or self.server_flag:
            raise click.UsageError(
                "--allocator and --server-flag are for a server that is started, not --server"
            )
        if self.protocol.is_http != (self.rest_server is not None):
            raise click.UsageError(_REST_SERVER)
