"""``spikeless bench``: measure latency under load while versions are swapped."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from spikeless import bench, launch
from spikeless.bench import gate, ladder, report
from spikeless.bench.capacity import find_capacity
from spikeless.bench.load.generator_floor import built_in_requests
from spikeless.bench.report.judgement import judgement_junit, judgement_markdown, show_judgement
from spikeless.bench.rungs import LADDER
from spikeless.cli.options import SERVER, Duration, json_option, models_option
from spikeless.disk.atomic import DIRECTORY_MODE, write_atomically
from spikeless.errors import InvalidArgument, NotFound
from spikeless.formats.savedmodel import EXTRA_DIRECTORY
from spikeless.openloop.schedule import ARRIVALS
from spikeless.repository import checks, layout, models_config
from spikeless.warmup.records import WARMUP_FILE, warmup_file

_PATH = click.Path(path_type=Path)
_ENGINE_NOTE_VARIABLE = "SPIKELESS_ENGINE_NOTE"
_MODEL_PATH = click.Path(path_type=Path, exists=True, file_okay=False)
_POSITIVE = click.FloatRange(min=0, min_open=True)
_TIME = Duration(positive=True)
_COUNT = click.IntRange(min=1)


class _Share(click.ParamType[Any]):
    """``70%``."""

    name = "percentage"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", str(value).strip())
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is no share of a load: say 70%", param, ctx)
        return float(match[1]) / 100


class _Slo(click.ParamType[Any]):
    """``p99.9=20ms``: a figure and its limit."""

    name = "figure=time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        figure, equals, limit = value.partition("=")
        if not equals:
            self.fail(f"{value!r} is no limit: say p99.9=20ms", param, ctx)
        return figure.strip(), _TIME.convert(limit, param, ctx) * 1e3


@click.group()
def command() -> None:
    """Measure latency under open-loop load while versions are swapped."""


def _load_options(function: Any) -> Any:
    """The options of the load: ``--requests``, and fields of `bench.Settings`."""
    options = [
        click.option(
            "--requests", type=_PATH, help="TFRecord file of PredictionLog with the requests to replay."
        ),
        click.option("--rate", type=_POSITIVE, default=300.0, show_default=True, help="Requests per second."),
        click.option("--arrivals", type=click.Choice(ARRIVALS), default="poisson", show_default=True),
        click.option("--seed", default=1, show_default=True, help="Seed of random arrivals and batch sizes."),
        click.option(
            "--batch-sizes",
            default="",
            help="Share of each batch size among the requests, such as 1:70,8:30.",
        ),
        click.option(
            "--timeout",
            type=_TIME,
            default="10s",
            show_default=True,
            help="Deadline of each request.",
        ),
        click.option(
            "--processes", type=_COUNT, default=1, show_default=True, help="Processes of the load generator."
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _duration_option(default: str) -> Any:
    return click.option(
        "--duration", type=_TIME, default=default, show_default=True, help="How long requests are sent."
    )


def _run_options(*, publishes: int, duration: str) -> Any:
    """The options of a run beside those of its load, with these defaults."""
    options = [
        click.option(
            "--server",
            "target",
            type=SERVER,
            help="gRPC address of a running server.  [default: start one]",
        ),
        click.option(
            "--pid",
            type=int,
            help="Its process id, to sample its memory.  [default: who listens there, if on this machine]",
        ),
        models_option,
        click.option(
            "--load",
            "load_share",
            type=_Share(),
            help="Share of what the server can do, such as 70%, instead of --rate: it is found first.",
        ),
        click.option(
            "--scenario", default="load", show_default=True, help="Name that the report groups runs by."
        ),
        _duration_option(duration),
        click.option(
            "--settle",
            type=Duration(),
            default="3s",
            show_default=True,
            help="Left out of the steady window.",
        ),
        click.option(
            "--slo-latency",
            type=_TIME,
            default="10ms",
            show_default=True,
            help="Slower requests count as a spike.",
        ),
        click.option(
            "--publish",
            "saved_models",
            type=_MODEL_PATH,
            multiple=True,
            help="SavedModel to publish as the next version. Several take turns.",
        ),
        click.option("--publish-command", help="Command that publishes a version instead."),
        click.option(
            "--publish-model",
            "published_models",
            multiple=True,
            help="Another model that versions are published of, while NAME is loaded. Several take turns.",
        ),
        click.option(
            "--publishes",
            type=_COUNT,
            default=publishes,
            show_default=True,
            help="How many versions to publish.",
        ),
        click.option(
            "--publish-every",
            type=_TIME,
            help="Time between versions.  [default: an equal share of the load after the warm start]",
        ),
        click.option("--publish-at", type=_TIME, help="When the first.  [default: after 60 % of a share]"),
        click.option(
            "--allocator", type=click.Choice(launch.ALLOCATORS), help="Of that server.  [default: glibc]"
        ),
        click.option(
            "--server-flag", multiple=True, help="Another flag for the server that is started; repeatable."
        ),
        click.option("--floor/--no-floor", default=True, help="Measure the generator's own latency first."),
        click.option(
            "--out",
            type=_PATH,
            default="reports/raw",
            show_default=True,
            help="Directory of the raw results.",
        ),
    ]

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return _load_options(function)

    return decorate


@command.command("run")
@click.argument("name")
@_run_options(publishes=1, duration="30s")
@json_option
def run_command(as_json: bool, **options: Any) -> None:
    """Drive load against a server and write one raw result.

    Without --server a server is started on MODELS/NAME and stopped afterwards;
    SPIKELESS_SERVER names its engine. With --publish or --publish-command the next
    version is published while the load runs, with --publishes several. By default the
    requests are those of the newest version's warmup file.
    """
    path, result = _measured(**options)
    summary = bench.analyse(result)
    if as_json:
        click.echo(json.dumps({"result": str(path), **dataclasses.asdict(summary)}, indent=1))
    else:
        report.show(report.group([result]))
        click.echo(path)


def _measured(
    *,
    name: str,
    requests: Path | None,
    target: str | None,
    pid: int | None,
    models: Path,
    load_share: float | None,
    scenario: str,
    duration: float,
    settle: float,
    slo_latency: float,
    saved_models: tuple[Path, ...],
    publish_command: str | None,
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
    """Check the options of `_run_options`, measure, and save the result."""
    if saved_models and publish_command is not None:
        raise click.UsageError("--publish and --publish-command exclude each other")
    swaps = bool(saved_models) or publish_command is not None
    published_models = tuple(dict.fromkeys(published_models))
    given = (publish_at, publish_every, published_models or None)
    if not swaps and (any(one is not None for one in given) or publishes != 1):
        raise click.UsageError(
            "--publishes, --publish-at, --publish-every and --publish-model need --publish or "
            "--publish-command"
        )
    if target is None and pid is not None:
        raise click.UsageError("--pid is for --server: give that, too")
    if target is not None and (allocator is not None or server_flag):
        raise click.UsageError("--allocator and --server-flag are for a server that is started, not --server")
    share = max(0.0, duration - settle) / publishes or duration
    settings = _settings(
        requests=str(requests or _own_requests(models, name)),
        model_name=name,
        seconds=duration,
        publish_at=(settle + 0.6 * share if publish_at is None else publish_at) if swaps else None,
        publishes=publishes,
        publish_every=share if publish_every is None else publish_every,
        published_models=published_models,
        warm_seconds=settle,
        slo_ms=1e3 * slo_latency,
        **load,
    )
    bench.check_requests(settings)
    for saved_model in saved_models:
        checks.check_files(saved_model)
    flags = (*bench.SERVER_FLAGS, *server_flag)
    launched = launch.LaunchSettings(name, models / name, flags=flags, allocator=allocator or "glibc")
    if target is None:
        _check_server(launched, models, (name, *published_models))
    publish = None if publish_command is None else bench.publisher(publish_command)
    facts = None
    if target is not None:
        for other in published_models:
            bench.running_server(target, other, pid)
        facts = bench.running_server(target, name, pid)
    if out.exists() and not out.is_dir():
        raise InvalidArgument(f"{out} is no directory: give one with --out")
    console = Console(stderr=True)
    if facts is not None and load_share is None and (warning := bench.refusal(facts, settings.rate)):
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
        if saved_models:
            publish = stack.enter_context(
                bench.staged_in_turn(saved_models, models, published_models or (name,), publishes)
            )
        if target is None and published_models:
            config = stack.enter_context(_models_config(models, (name, *published_models)))
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
            found = find_capacity(settings, facts, lambda probe: click.echo(f"capacity: {probe}", err=True))
            settings = dataclasses.replace(settings, rate=round(found.rate * load_share, 1))
            notes.append(f"the rate is {load_share:.0%} of what the server keeps up with, {found}")
            click.echo(f"capacity: {notes[-1]}", err=True)
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


@command.command("gate")
@click.argument("name", required=False)
@click.option(
    "--slo",
    "slos",
    type=_Slo(),
    multiple=True,
    help="Limit of p50, p99, p99.9 or max during reloads, such as p99.9=20ms; repeatable.",
)
@click.option("--spike-ratio", type=_POSITIVE, help="Limit of p99.9 during reloads relative to quiet time.")
@click.option(
    "--errors",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="How many requests may fail.",
)
@click.option("--baseline", type=_PATH, multiple=True, help="Earlier result to compare with; repeatable.")
@click.option(
    "--baseline-ratio",
    type=_POSITIVE,
    default=1.25,
    show_default=True,
    help="Limit of the same figures relative to those of the baseline.",
)
@click.option("--run", "runs", type=_PATH, multiple=True, help="Judge this result instead; repeatable.")
@click.option("--junit", type=_PATH, help="Write the verdict to this file as JUnit XML.")
@click.option("--markdown", type=_PATH, help="Write it to this file as Markdown, for a pull request.")
@_run_options(publishes=12, duration="60s")
@json_option
def gate_command(
    name: str | None,
    slos: tuple[tuple[str, float], ...],
    spike_ratio: float | None,
    errors: int,
    baseline: tuple[Path, ...],
    baseline_ratio: float,
    runs: tuple[Path, ...],
    junit: Path | None,
    markdown: Path | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Judge swaps under load by limits, for CI.

    Exits with 0 when every limit is held, with 1 when one is broken, and with 3 when it
    is too noisy to tell, which is no pass. The swaps of NAME are measured as by `bench
    run`, with --publish or --publish-command; with --run earlier results of one
    scenario are read instead. Figures are those of all reloads together, with 95 %
    intervals.
    """
    swaps = bool(options["saved_models"]) or options["publish_command"] is not None
    if swaps == bool(runs):
        raise click.UsageError("give --publish or --publish-command to measure swaps, or --run to read them")
    if swaps == (name is None):
        raise click.UsageError("NAME is the model to measure: give it with --publish, and not with --run")
    limits = gate.Limits(dict(slos), spike_ratio, errors, baseline_ratio)
    for path in (junit, markdown):
        if path is not None and not path.absolute().parent.is_dir():
            raise InvalidArgument(f"{path} cannot be written: its directory does not exist")
    before = _read(baseline)
    results = _read(runs)
    if name is not None:
        path, result = _measured(name=name, **options)
        click.echo(path, err=True)
        results = [result]
    judgement = gate.judge(results, limits, before)
    if junit is not None:
        write_atomically(junit, judgement_junit(judgement))
    if markdown is not None:
        write_atomically(markdown, judgement_markdown(judgement).encode())
    if as_json:
        told = {"outcome": judgement.outcome, **dataclasses.asdict(judgement)}
        click.echo(json.dumps(told, indent=1))
    else:
        show_judgement(judgement, Console(width=None if sys.stdout.isatty() else 10_000))
    return judgement.outcome.exit_code


def _read(results: Sequence[Path]) -> list[bench.Run]:
    return [bench.read_run(file) for result in results for file in bench.result_files(result)]


@command.command("floor")
@_load_options
@_duration_option(f"{bench.FLOOR_SECONDS:g}s")
@json_option
def floor_command(requests: Path | None, duration: float, as_json: bool, **load: Any) -> None:
    """Measure the load generator's own latency on a server that answers at once."""
    with ExitStack() as stack:
        settings = _settings(
            requests=str(requests or stack.enter_context(built_in_requests())),
            model_name="floor",
            seconds=duration,
            warm_seconds=0.0,
            **load,
        )
        progress = stack.enter_context(bench.progress_bar("floor", duration))
        measured = bench.measure_floor(settings, duration, progress)
    click.echo(json.dumps(dataclasses.asdict(measured), indent=1) if as_json else report.floor_text(measured))


@command.command("ladder")
@click.argument("saved_models", type=_MODEL_PATH, nargs=-1, required=True)
@click.option("--title", required=True, help="Ends the name of the result directory.")
@click.option("--requests", type=_PATH, help="As in `run`.  [default: the first model's warmup file]")
@click.option(
    "--rung",
    "rungs",
    type=click.Choice([rung.key for rung in LADDER]),
    multiple=True,
    help="Only this rung; repeatable.  [default: all]",
)
@click.option("--rounds", type=_COUNT, default=2, show_default=True, help="How often all rungs take turns.")
@click.option(
    "--publishes", type=_COUNT, default=5, show_default=True, help="Versions published in each run."
)
@click.option("--publish-every", type=_TIME, default="10s", show_default=True, help="Time between versions.")
@click.option("--rate", type=_POSITIVE, default=200.0, show_default=True, help="Requests per second.")
@click.option(
    "--out", type=_PATH, help="The result directory.  [default: benchmarks/results/<date>-<engine>-<title>]"
)
@click.option("--resume", is_flag=True, help="Keep the results that are in --out, and run what is missing.")
@click.option(
    "--engine-note",
    default="",
    envvar=_ENGINE_NOTE_VARIABLE,
    help=f"What else results say of the engine, such as how it was built.  [env: {_ENGINE_NOTE_VARIABLE}]",
)
def ladder_command(
    saved_models: tuple[Path, ...],
    title: str,
    requests: Path | None,
    rungs: tuple[str, ...],
    rounds: int,
    publishes: int,
    publish_every: float,
    rate: float,
    out: Path | None,
    resume: bool,
    engine_note: str,
) -> None:
    """Measure what each remedy against the reload spike is worth.

    SPIKELESS_SERVER names the engine. Each rung adds one remedy to the rung before. The
    SAVED_MODELS must have warmup files; they are published in turn while the load runs.
    A reload must take less than half of --publish-every, or there is no quiet time to
    compare it with.
    """
    for saved_model in saved_models:
        checks.check_files(saved_model)
    now = datetime.datetime.now(datetime.timezone.utc)
    settings = ladder.LadderSettings(
        saved_models=saved_models,
        requests=requests or warmup_file(saved_models[0]),
        out=out or Path("benchmarks/results") / f"{now:%Y-%m-%d}-{Path(launch.chosen_engine()).name}-{title}",
        command=shlex.join(["spikeless", *sys.argv[1:]]),
        rungs=tuple(rung for rung in LADDER if not rungs or rung.key in rungs),
        rounds=rounds,
        publishes=publishes,
        publish_every=publish_every,
        rate=rate,
        resume=resume,
        engine_note=engine_note,
    )
    click.echo(ladder.run(settings, Console(stderr=True)).read_text())
    click.echo(settings.out)


@command.command("merge")
@click.argument("merged", type=_PATH)
@click.argument("parts", type=_PATH, nargs=-1, required=True)
def merge_command(merged: Path, parts: tuple[Path, ...]) -> None:
    """Merge the files that the workers of one run wrote into MERGED."""
    if merged.exists():
        raise InvalidArgument(f"{merged} is there already and is not overwritten")
    bench.merge([bench.read_run(part) for part in parts]).save(merged)
    click.echo(merged)


@command.command("hdr")
@click.argument("results", type=_PATH, nargs=-1, required=True)
def hdr_command(results: tuple[Path, ...]) -> None:
    """Write an HdrHistogram log beside each of the raw RESULTS.

    It has a histogram of latencies in nanoseconds for each second, tagged "reload"
    inside the windows of reloads, for tools that read such logs.
    """
    from spikeless.bench.hdr import SUFFIX, write_hdr

    for file in (file for result in results for file in bench.result_files(result)):
        log = file.with_suffix(SUFFIX)
        write_hdr(bench.read_run(file), log)
        click.echo(log)


def _settings(**fields: Any) -> bench.Settings:
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
def _models_config(models: Path, names: Sequence[str]) -> Iterator[Path]:
    """What makes a server serve these models; gone at the end of the block."""
    blocks = "\n".join(
        f"  config {{ name: {json.dumps(name)} base_path: {json.dumps(str((models / name).absolute()))} "
        'model_platform: "tensorflow" }'
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
