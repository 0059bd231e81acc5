"""One measured run, as `bench run` and `bench gate` make it of their options."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from spikeless import bench, launch
from spikeless.bench import events
from spikeless.bench.capacity import share_of_capacity
from spikeless.bench.protocols import PROTOCOLS
from spikeless.disk.atomic import DIRECTORY_MODE
from spikeless.errors import InvalidArgument, NotFound
from spikeless.formats.savedmodel import EXTRA_DIRECTORY
from spikeless.openloop.schedule import RECORDED
from spikeless.repository import checks, layout, models_config
from spikeless.warmup.records import WARMUP_FILE, warmup_file


def measured(
    *,
    name: str,
    requests: Path | None,
    target: str | None,
    rest_server: str | None,
    pid: int | None,
    models: Path,
    load_share: float | None,
    replay: Path | None,
    speed: float,
    scenario: str,
    duration: float,
    settle: float,
    slo_latency: float,
    saved_models: tuple[Path, ...],
    publish_command: str | None,
    event: str,
    published_models: tuple[str, ...],
    publishes: int,
    publish_every: float | None,
    publish_at: float | None,
    allocator: str | None,
    server_flag: tuple[str, ...],
    floor: bool,
    out: Path,
    **load: Any,
) -> tuple[Path, bench.Run]:
    """Check the options of `run_options`, measure, and save the result."""
    if saved_models and publish_command is not None:
        raise click.UsageError("--publish and --publish-command exclude each other")
    swaps = bool(saved_models) or publish_command is not None
    published_models = tuple(dict.fromkeys(published_models))
    given = (publish_at, publish_every, published_models or None)
    if not swaps and (any(one is not None for one in given) or publishes != 1 or event != events.PUBLISH):
        raise click.UsageError(
            "--event, --publishes, --publish-at, --publish-every and --publish-model need --publish or "
            "--publish-command"
        )
    if target is not None and event == events.UNLOAD and saved_models:
        raise click.UsageError(
            "which old versions a running server keeps loaded is its own matter: say with --publish-command "
            "how one is unloaded"
        )
    if target is None and pid is not None:
        raise click.UsageError("--pid is for --server: give that, too")
    if target is not None and (allocator is not None or server_flag):
        raise click.UsageError("--allocator and --server-flag are for a server that is started, not --server")
    is_http = PROTOCOLS[load["protocol"]].is_http
    if (target is not None and is_http) != (rest_server is not None):
        raise click.UsageError("--rest-server is for --server with a protocol over HTTP, which needs it")
    if replay is not None:
        recorded = _recorded(replay, name, speed, duration)
        load, duration = {**load, **recorded}, recorded["seconds"]
        requests = replay
    elif speed != 1:
        raise click.UsageError("--speed is for --replay")
    storm = event == events.STORM
    share = max(0.0, duration - settle) / (1 if storm else publishes) or duration
    every = 1.0 if storm else share
    settings = checked_settings(
        requests=str(requests or _own_requests(models, name)),
        model_name=name,
        publish_at=(settle + 0.6 * share if publish_at is None else publish_at) if swaps else None,
        event=event,
        publishes=publishes,
        publish_every=every if publish_every is None else publish_every,
        published_models=published_models,
        warm_seconds=settle,
        slo_ms=1e3 * slo_latency,
        **{"seconds": duration, **load},
    )
    bench.check_requests(settings)
    for saved_model in saved_models:
        checks.check_files(saved_model)
    flags = (*bench.SERVER_FLAGS, *server_flag)
    launched = launch.LaunchSettings(
        name, models / name, rest=is_http, flags=flags, allocator=allocator or "glibc"
    )
    if target is None:
        _check_server(launched, models, (name, *published_models))
    publish = None if publish_command is None else bench.publisher(publish_command)
    facts = None
    if target is not None:
        for other in published_models:
            bench.running_server(target, other, pid)
        facts = bench.running_server(target, name, pid)
        facts = dataclasses.replace(facts, rest_target=rest_server or "")
    if out.exists() and not out.is_dir():
        raise InvalidArgument(f"{out} is no directory: give one with --out")
    console = Console(stderr=True)
    # Servers queue what comes over HTTP.
    may_refuse = facts is not None and load_share is None and not is_http
    if facts is not None and may_refuse and (warning := bench.refusal(facts, settings.rate)):
        console.print(f"[yellow]{escape(warning)}[/yellow]", highlight=False, soft_wrap=True)
    pinned = [one for one in published_models or (name,) if _pinned(models, one)]
    if target is not None and saved_models and pinned:
        console.print(
            f"[yellow]{escape(str(models / models_config.FILE_NAME))} pins the versions of "
            f"{escape(', '.join(pinned))}: a server that reads it loads what is published only when it is "
            "promoted, and nothing is swapped before; measure that with --publish-command[/yellow]",
            highlight=False,
            soft_wrap=True,
        )
    notes = []
    with ExitStack() as stack:
        versions: Sequence[int] = ()
        if saved_models and event == events.UNLOAD:
            unloadable = bench.unloadable(saved_models, models, name, publishes)
            versions, publish = stack.enter_context(unloadable)
        elif saved_models:
            names = published_models or (name,)
            count = publishes * (len(names) if event == events.PUBLISH_ALL else 1)
            publish = stack.enter_context(bench.staged_in_turn(saved_models, models, names, count))
        if target is None and (published_models or versions):
            config = stack.enter_context(_models_config(models, (name, *published_models), versions))
            launched = dataclasses.replace(
                launched,
                model_name=None,
                model_base_path=None,
                wait_for=(name, *published_models),
                flags=(*flags, f"--model_config_file={config}"),
            )
        if facts is None and load_share is not None:
            facts = bench.server_facts(stack.enter_context(launch.start(launched)))
        if facts is not None and load_share is not None:
            rate, note = share_of_capacity(
                settings, facts, load_share, lambda text: click.echo(text, err=True)
            )
            settings = dataclasses.replace(settings, rate=rate)
            notes.append(note)
        measured = None
        if floor:
            with bench.progress_bar("floor", bench.FLOOR_SECONDS, console) as progress:
                measured = bench.measure_floor(settings, progress=progress)
        if facts is None:
            facts = bench.server_facts(stack.enter_context(launch.start(launched)))
        with bench.progress_bar(scenario, duration, console) as progress:
            result = bench.run(scenario, settings, facts, publish, measured, progress, notes)
    path = bench.result_path(out, result)
    path.parent.mkdir(parents=True, exist_ok=True)
    result.save(path)
    return path, result


def _recorded(capture: Path, name: str, speed: float, duration: float) -> dict[str, Any]:
    """The load of a recording; with --duration, of its first part."""
    context = click.get_current_context()

    def given(option: str) -> bool:
        return context.get_parameter_source(option) is not click.core.ParameterSource.DEFAULT

    for option in ("requests", "rate", "arrivals", "batch_sizes", "load_share"):
        if given(option):
            named = next(one.opts[0] for one in context.command.params if one.name == option)
            raise click.UsageError(f"--replay has its own requests and times: leave {named} out")
    recording = bench.read_recording(capture, name)
    seconds = recording.seconds / speed
    if given("duration"):
        if duration > seconds:
            raise click.UsageError(f"the recording lasts {seconds:.1f} s at this speed: --duration is longer")
        seconds = duration
    if recording.others:
        click.echo(f"{recording.others:,} records of other models are left out", err=True)
    return {"arrivals": RECORDED, "speed": speed, "rate": recording.rate * speed, "seconds": seconds}


def checked_settings(**fields: Any) -> bench.Settings:
    """The settings of a load; what does not go together is wrong usage."""
    try:
        return bench.Settings(**fields)
    except InvalidArgument as error:
        raise click.UsageError(str(error)) from None


def _pinned(models: Path, name: str) -> bool:
    """Whether ``models.config`` says which versions of a model are served."""
    model = models_config.read(models).model(name) if models.is_dir() else None
    return model is not None and model.model_version_policy.HasField("specific")


@contextmanager
def _models_config(models: Path, names: Sequence[str], versions: Sequence[int]) -> Iterator[Path]:
    """What makes a server serve these models; gone at the end of the block.

    Of each model it is the newest version, or all of `versions`.
    """
    listed = " ".join(f"versions: {version}" for version in versions)
    policy = f"model_version_policy {{ specific {{ {listed} }} }} " if versions else ""
    blocks = "\n".join(
        f"  config {{ name: {json.dumps(name)} base_path: {json.dumps(str((models / name).absolute()))} "
        f'model_platform: "tensorflow" {policy}}}'
        for name in names
    )
    with tempfile.TemporaryDirectory(prefix="spikeless-bench-") as directory:
        Path(directory).chmod(DIRECTORY_MODE)
        config = Path(directory) / "models.config"
        config.write_text(f"model_config_list {{\n{blocks}\n}}\n")
        yield config


def _check_server(settings: launch.LaunchSettings, models: Path, names: Sequence[str]) -> None:
    """Raise what starting it would raise, without starting it.

    The embedded engine's flags are checked as `spikeless serve` checks them.
    """
    for name in names:
        if not layout.versions(models, name):
            raise NotFound(f"{models} has no version of {name}: publish one, or give --models")
    if settings.allocator == "jemalloc" and not launch.jemalloc_installed():
        raise NotFound(launch.JEMALLOC_REMEDY)
    launch.ServerProcess(dataclasses.replace(settings, log=Path(os.devnull)))  # Finds the engine.
    if launch.chosen_engine() == launch.EMBEDDED:
        from spikeless.cli import serve

        serve.command.make_context("spikeless serve", list(settings.flags))


def _own_requests(models: Path, name: str) -> Path:
    """The warmup file of the newest version that has one."""
    for directory in reversed(layout.versions(models, name).values()):
        if (file := warmup_file(directory)).is_file():
            return file
    if similar := layout.similar_name(models, name):
        raise NotFound(f"{models} has no model {name}{similar}")
    raise NotFound(
        f"no version of {name} in {models} has a warmup file ({EXTRA_DIRECTORY}/{WARMUP_FILE}): "
        "build one with `spikeless warmup build`, or name the requests with --requests"
    )
