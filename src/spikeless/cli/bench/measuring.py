"""One measured run, as `bench run` and `bench gate` make it of their options."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from spikeless import bench, launch
from spikeless.bench import events
from spikeless.bench.capacity import share_of_capacity
from spikeless.cli.bench.options import RunOptions
from spikeless.errors import InvalidArgument, NotFound
from spikeless.formats.savedmodel import EXTRA_DIRECTORY
from spikeless.openloop.schedule import RECORDED
from spikeless.repository import checks, layout, models_config
from spikeless.warmup.records import WARMUP_FILE, warmup_file


def measured(options: RunOptions) -> tuple[Path, bench.Run]:
    """Check the options, measure, and save the result.

    Raises:
        click.UsageError: options do not go together.
        SpikelessError: files are not what they have to be, or the run failed.
    """
    options.check()
    models, name, others = options.models, options.name, options.other_models
    settings = _settings(options)
    bench.check_requests(settings)
    for saved_model in options.saved_models:
        checks.check_files(saved_model)
    flags = (*bench.SERVER_FLAGS, *options.server_flag)
    launched = launch.LaunchSettings(
        name,
        models / name,
        rest=options.protocol.is_http,
        flags=flags,
        allocator=options.allocator or "glibc",
    )
    if options.target is None:
        _check_server(launched, models, (name, *others))
    publish = None if options.publish_command is None else bench.publisher(options.publish_command)
    facts = None if options.target is None else _running(options, options.target)
    if options.out.exists() and not options.out.is_dir():
        raise InvalidArgument(f"{options.out} is no directory: give one with --out")
    console = Console(stderr=True)
    if facts is not None:
        _warn(options, facts, settings, console)
    notes = []
    with ExitStack() as stack:
        versions: Sequence[int] = ()
        if options.saved_models and options.event == events.UNLOAD:
            unloadable = bench.unloadable(options.saved_models, models, name, options.publishes)
            versions, publish = stack.enter_context(unloadable)
        elif options.saved_models:
            names = others or (name,)
            count = options.publishes * (len(names) if options.event == events.PUBLISH_ALL else 1)
            publish = stack.enter_context(bench.staged_in_turn(options.saved_models, models, names, count))
        if options.target is None and (others or versions):
            config = stack.enter_context(bench.served_config(models, (name, *others), versions))
            launched = dataclasses.replace(
                launched,
                model_name=None,
                model_base_path=None,
                wait_for=(name, *others),
                flags=(*flags, f"--model_config_file={config}"),
            )
        if options.load_share is not None:
            facts = facts or bench.server_facts(stack.enter_context(launch.start(launched)))
            rate, note = share_of_capacity(
                settings, facts, options.load_share, lambda text: click.echo(text, err=True)
            )
            settings = dataclasses.replace(settings, rate=rate)
            notes.append(note)
        floor = None
        if options.floor:
            with bench.progress_bar("floor", bench.FLOOR_SECONDS, console) as progress:
                floor = bench.measure_floor(settings, progress=progress)
        facts = facts or bench.server_facts(stack.enter_context(launch.start(launched)))
        with bench.progress_bar(options.scenario, settings.seconds, console) as progress:
            result = bench.run(options.scenario, settings, facts, publish, floor, progress, notes)
    path = bench.result_path(options.out, result)
    path.parent.mkdir(parents=True, exist_ok=True)
    result.save(path)
    return path, result


def _settings(options: RunOptions) -> bench.Settings:
    """The load, and when versions are published."""
    load, requests, duration = dict(options.load), options.requests, options.duration
    if options.replay is not None:
        load |= _recorded(options.replay, options.name, options.speed, duration)
        requests, duration = options.replay, load.pop("seconds")
    storm = options.event == events.STORM
    share = max(0.0, duration - options.settle) / (1 if storm else options.publishes) or duration
    first, every = options.settle + 0.6 * share, 1.0 if storm else share
    if options.publish_at is not None:
        first = options.publish_at
    return checked_settings(
        requests=str(requests or _own_requests(options.models, options.name)),
        model_name=options.name,
        seconds=duration,
        publish_at=first if options.swaps else None,
        event=options.event,
        publishes=options.publishes,
        publish_every=every if options.publish_every is None else options.publish_every,
        published_models=options.other_models,
        warm_seconds=options.settle,
        slo_ms=1e3 * options.slo_latency,
        **load,
    )


def _running(options: RunOptions, target: str) -> bench.ServerFacts:
    """What is known of the server that ``--server`` names."""
    for other in options.other_models:
        bench.running_server(target, other, options.pid)
    facts = bench.running_server(target, options.name, options.pid)
    return dataclasses.replace(facts, rest_target=options.rest_server or "")


def _warn(options: RunOptions, facts: bench.ServerFacts, settings: bench.Settings, console: Console) -> None:
    """Say what a running server will make of the load, and of what is published."""
    warnings = []
    # Servers queue what comes over HTTP.
    if options.load_share is None and not options.protocol.is_http:
        warnings.append(bench.refusal(facts, settings.rate))
    pinned = [one for one in options.other_models or (options.name,) if _pinned(options.models, one)]
    if options.saved_models and pinned:
        warnings.append(
            f"{options.models / models_config.FILE_NAME} pins the versions of {', '.join(pinned)}: a server "
            "that reads it loads what is published only when it is promoted, and nothing is swapped before; "
            "measure that with --publish-command"
        )
    for warning in filter(None, warnings):
        console.print(f"[yellow]{escape(warning)}[/yellow]", highlight=False, soft_wrap=True)


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
