"""``spikeless bench ladder``."""

from __future__ import annotations

import datetime
import shlex
import sys
from pathlib import Path

import click
from rich.console import Console

from spikeless import launch
from spikeless.bench import ladder
from spikeless.bench.events import PUBLISH, START
from spikeless.bench.rungs import LADDER
from spikeless.cli.bench.options import COUNT, MODEL_PATH, PATH, POSITIVE, TIME, Percentage
from spikeless.repository import checks
from spikeless.warmup.records import warmup_file

_ENGINE_NOTE_VARIABLE = "SPIKELESS_ENGINE_NOTE"


@click.command("ladder")
@click.argument("saved_models", type=MODEL_PATH, nargs=-1, required=True)
@click.option("--title", required=True, help="Ends the name of the result directory.")
@click.option("--requests", type=PATH, help="As in `run`.  [default: the first model's warmup file]")
@click.option(
    "--rung",
    "rungs",
    type=click.Choice([rung.key for rung in LADDER]),
    multiple=True,
    help="Only this rung; repeatable.  [default: all]",
)
@click.option(
    "--event",
    type=click.Choice((PUBLISH, START)),
    default=PUBLISH,
    show_default=True,
    help=f"What is measured: swaps ({PUBLISH}), or from exec to the first answers ({START}).",
)
@click.option("--rounds", type=COUNT, default=2, show_default=True, help="How often all rungs take turns.")
@click.option("--publishes", type=COUNT, default=5, show_default=True, help="Versions published in each run.")
@click.option("--publish-every", type=TIME, default="10s", show_default=True, help="Time between versions.")
@click.option("--rate", type=POSITIVE, default=200.0, show_default=True, help="Requests per second.")
@click.option(
    "--load",
    "load_share",
    type=Percentage(),
    help="Share of what the server can do on the lowest rung, such as 70%, instead of --rate.",
)
@click.option(
    "--out", type=PATH, help="The result directory.  [default: benchmarks/results/<date>-<engine>-<title>]"
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
    event: str,
    rounds: int,
    publishes: int,
    publish_every: float,
    rate: float,
    load_share: float | None,
    out: Path | None,
    resume: bool,
    engine_note: str,
) -> None:
    """Measure what each remedy against the reload spike is worth.

    SPIKELESS_SERVER names the engine. Each rung adds one remedy to the rung before. The
    SAVED_MODELS must have warmup files; they are published in turn while the load runs.
    A reload must take less than half of --publish-every, or there is no quiet time to
    compare it with. With --event start each round starts the server once, with requests
    from its exec on.

    SAVED_MODELS may be mapped already, for models that do not fit on the disk twice:
    each rung takes those that were mapped, or mapped and optimised, as it says, and
    maps the others itself.
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
        event=event,
        rounds=rounds,
        publishes=publishes,
        publish_every=publish_every,
        rate=rate,
        load_share=load_share,
        resume=resume,
        engine_note=engine_note,
    )
    click.echo(ladder.run(settings, Console(stderr=True)).read_text())
    click.echo(settings.out)
