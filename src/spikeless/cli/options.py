"""Options that several sub-commands share."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from spikeless.errors import InvalidArgument
from spikeless.repository.models_config import STABLE
from spikeless.rollout.fleet import FleetSettings, parse_target, parse_targets
from spikeless.store.settings import StoreSettings

_Function = TypeVar("_Function", bound=Callable[..., Any])
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_FACTORS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class Duration(click.ParamType[Any]):
    """``30s``, ``10m``, ``1.5h``; a bare number is seconds."""

    name = "duration"

    def __init__(self, at_least: float = 0.0, *, positive: bool = False) -> None:
        self._at_least = at_least
        self._positive = positive

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = _DURATION.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no duration: say 30s, 10m or 1h", param, ctx)
        seconds = float(match[1]) * _UNITS[match[2] or "s"]
        if seconds < self._at_least:
            self.fail(f"{value} is too short: say {self._at_least:g}s or more", param, ctx)
        if self._positive and not seconds:
            self.fail("it must be more than 0", param, ctx)
        return seconds


class Ratio(click.ParamType[Any]):
    """``0.1%``, or ``0.001``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            self.fail(f"{value!r} is no share: say 0.1%", param, ctx)
        return share


class Size(click.ParamType[Any]):
    """``512MiB``, ``4GB``; a bare number is bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no size: say 512MiB or 4GB", param, ctx)
        return int(float(match[1]) * _FACTORS[(match[2] or "").lower()])


models_option = click.option(
    "--models",
    type=click.Path(path_type=Path),
    default="models",
    show_default=True,
    help="The model repository.",
)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Check everything, change nothing.")


class _Servers(click.ParamType[Any]):
    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except InvalidArgument as error:
            self.fail(str(error), param, ctx)


servers_option = click.option(
    "--servers",
    type=_Servers("servers", parse_targets),
    default="127.0.0.1:8500",
    show_default=True,
    help="gRPC addresses, HOST:PORT[,HOST:PORT...], or a file with one a line.",
)


running_servers_option = click.option(
    "--servers",
    type=_Servers("servers", parse_targets),
    help="gRPC addresses of this machine's servers, on which versions are promoted.",
)


PORT = click.IntRange(0, 65535)
#: ``HOST:PORT`` of one server.
SERVER = _Servers("server", parse_target)

server_option = click.option(
    "--server",
    type=SERVER,
    default="127.0.0.1:8500",
    show_default=True,
    help="gRPC address of the server, HOST:PORT.",
)


def _option(name: str, kind: Any, default: Any, text: str) -> Any:
    return click.option(name, type=kind, default=default, show_default=True, help=text)


def fleet_options(function: _Function) -> _Function:
    """``--servers`` and how they take turns; `fleet_settings` reads them."""
    for option in (
        _option("--patience", Duration(), "15s", "How long a server may be silent."),
        _option("--load-timeout", Duration(), "10m", "How long a load may take."),
        _option("--at-most", int, 1, "Servers that load at the same time."),
        _option("--stagger", Duration(), "0s", "Time between servers that load; up to half more at random."),
        servers_option,
    ):
        function = option(function)
    return function


def fleet_settings(options: dict[str, Any]) -> FleetSettings:
    """Take the options of `fleet_options` out of ``options``."""
    return FleetSettings(
        targets=options.pop("servers"),
        stagger=options.pop("stagger"),
        at_most=options.pop("at_most"),
        load_timeout=options.pop("load_timeout"),
        patience=options.pop("patience"),
    )


def store_options(function: _Function) -> _Function:
    """How a store is read and written; `store_settings` reads them."""
    for option in (
        _option("--timeout", Duration(positive=True), "60s", "How long one object may take."),
        click.option("--bandwidth", type=Size(), help="Bytes per second, such as 50MB.  [default: no limit]"),
        _option("--workers", click.IntRange(1, 64), 8, "Objects on their way at the same time."),
    ):
        function = option(function)
    return function


def store_settings(options: dict[str, Any]) -> StoreSettings:
    """Take the options of `store_options` out of ``options``."""
    return StoreSettings(
        workers=options.pop("workers"),
        bandwidth=options.pop("bandwidth") or None,
        timeout=options.pop("timeout"),
    )


label_option = click.option("--label", default=STABLE, show_default=True, help="The label that moves.")


def change_options(function: _Function) -> _Function:
    """What the commands that change a label share beside it."""
    for option in (
        fleet_options,
        models_option,
        json_option,
        dry_run_option,
        click.option("--reason", default="", help="Why, for the journal."),
    ):
        function = option(function)
    return function


store_option = click.option("--store", help="A whole fleet's: the URL of the store that it follows.")
#: Parameters that have a meaning with `store_option`.
_OF_A_STORE = ("name", "version", "store", "label", "reason", "as_json", "dry_run")


def _given() -> dict[str, str]:
    """The parameters on the command line, and the options that they are."""
    context = click.get_current_context()
    return {
        parameter.name or "": parameter.opts[0]
        for parameter in context.command.params
        if context.get_parameter_source(parameter.name or "") is click.core.ParameterSource.COMMANDLINE
    }


def check_needs_store(*names: str) -> None:
    """Refuse parameters that have a meaning with ``--store`` alone."""
    for name, option in _given().items():
        if name in names:
            raise click.UsageError(f"{option} is for machines that follow a store: give --store, too")


def check_only_of_a_store(*more: str) -> None:
    """Refuse options for servers, of which a store has none, but ``more`` of them."""
    for name, option in _given().items():
        if name not in (*_OF_A_STORE, *more):
            raise click.UsageError(
                f"{option} has no meaning with --store: machines that follow the store promote"
            )


def print_result(result: Any, as_json: bool) -> None:
    """A result, which is a dataclass, on standard output."""
    click.echo(json.dumps(dataclasses.asdict(result)) if as_json else result)


def tell(line: str) -> None:
    """A line of progress, on standard error."""
    click.echo(line, err=True)


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a stopped change is put back.

    Asked a second time, Ctrl-C ends the process where it is.
    """
    asked = threading.Event()

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
