"""What else happens to versions: storms, unloads, reloads of other models.

    SPIKELESS_SERVER=tensorflow_model_server make bench-events

In: SavedModels with warmup files. Out: a result directory with the raw runs of two
rungs of the ladder under each event, the known remedies and all of them, and
``summary.md``. Events and rungs take turns. What a start costs is measured by
`spikeless bench ladder --event start`.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from spikeless import bench, launch
from spikeless.bench import events, ladder, report
from spikeless.bench.rungs import RUNGS, Rung
from spikeless.disk.atomic import DIRECTORY_MODE
from spikeless.errors import SpikelessError
from spikeless.warmup import warmup_file

_PATH = click.Path(path_type=Path)
_MODEL, _OTHERS = "model", ("other", "another")
_READY_SECONDS = 300.0

#: What happens when. Between two changes there is quiet time to compare them with.
_EVENTS: dict[str, dict[str, Any]] = {
    events.STORM: {"seconds": 75.0, "publish_at": 35.0, "publishes": 20, "publish_every": 1.0},
    events.UNLOAD: {"seconds": 45.0, "publish_at": 7.0, "publishes": 6, "publish_every": 6.3},
    events.PUBLISH_ALL: {"seconds": 60.0, "publish_at": 9.0, "publishes": 4, "publish_every": 13.3},
}


def plan(event: str, requests: Path, rate: float, round: int) -> bench.Settings:
    """The load of a round, the same for all rungs; the seed is its number."""
    others = _OTHERS if event == events.PUBLISH_ALL else ()
    load = {"rate": rate, "seed": round, "published_models": others, **_EVENTS[event]}
    return bench.Settings(_MODEL, str(requests), event=event, **load)


def rungs() -> Sequence[Rung]:
    """The known remedies, and all that can be had here."""
    known = next(rung for rung in RUNGS if rung.key == "jemalloc")
    best = [rung for rung in RUNGS if rung.on_ladder and rung.lacking is None][-1]
    return [
        dataclasses.replace(known, title="warmup, load threads, jemalloc"),
        dataclasses.replace(best, key="all", title="all remedies"),
    ]


def measure(
    settings: bench.Settings,
    rung: Rung,
    saved_models: Sequence[Path],
    work: Path,
    note: str,
    console: Console,
) -> bench.Run:
    """One run, on a server and a repository of its own in `work`.

    The SavedModels are served as they are: `ladder.prepared` for the rung.

    Raises:
        SpikelessError: a model cannot be staged or served, or the load failed.
    """
    others, versions = settings.published_models, list[int]()
    with ExitStack() as stack:
        models = stack.enter_context(ladder.repository(work))
        if settings.event == events.UNLOAD:
            unloadable = bench.unloadable(saved_models, models, _MODEL, settings.publishes)
            served, publish = stack.enter_context(unloadable)
            versions += served
        else:
            names = others or (_MODEL,)
            count = len(names) * (1 + settings.publishes)
            publish = stack.enter_context(bench.staged_in_turn(saved_models, models, names, count, link=True))
            for _ in names:
                publish()
        if others:
            with bench.staged(saved_models, models, _MODEL, 1, link=True) as first:
                first()
        config = stack.enter_context(bench.served_config(models, (_MODEL, *others), versions))
        launched = launch.LaunchSettings(
            flags=(*bench.SERVER_FLAGS, f"--model_config_file={config}"),
            wait_for=(_MODEL, *others),
            allocator=rung.allocator,
            log=models / "server.log",
            ready_timeout=_READY_SECONDS,
        )
        title = f"{settings.event}, {rung.title}"
        server = stack.enter_context(launch.start(rung.serving(launched, models)))
        with bench.progress_bar(title, settings.seconds, console) as progress:
            facts = bench.server_facts(server, note)
            return bench.run(title, settings, facts, publish, progress=progress)


def summary(out: Path, command: str) -> str:
    """The tables of the results in `out`."""
    scenarios = report.group([bench.read_run(path) for path in sorted(out.glob("*.npz"))])
    head = [f"# {out.name}", "", "Each event in turns with two rungs of the ladder. Made by", ""]
    return "\n".join([*head, "```sh", command, "```", "", report.render_markdown(scenarios)])


@click.command()
@click.argument("saved_models", type=_PATH, nargs=-1, required=True)
@click.option("--requests", type=_PATH, help="To replay.  [default: the first model's warmup file]")
@click.option("--rate", default=200.0, show_default=True, help="Requests per second.")
@click.option("--rounds", default=2, show_default=True, help="How often all take turns.")
@click.option("--event", "chosen", type=click.Choice(list(_EVENTS)), multiple=True, help="Only this one.")
@click.option("--engine-note", default="", envvar="SPIKELESS_ENGINE_NOTE")
@click.option("--out", type=_PATH, help="[default: benchmarks/results/<date>-<engine>-events]")
def main(
    saved_models: tuple[Path, ...],
    requests: Path | None,
    rate: float,
    rounds: int,
    chosen: tuple[str, ...],
    engine_note: str,
    out: Path | None,
) -> None:
    """Measure each event on the engine that SPIKELESS_SERVER names."""
    now = datetime.datetime.now(datetime.timezone.utc)
    out = out or Path("benchmarks/results") / f"{now:%Y-%m-%d}-{Path(launch.chosen_engine()).name}-events"
    if out.exists():
        raise SystemExit(f"error: {out} is there already and is not overwritten; give another --out")
    console, requests = Console(stderr=True), requests or warmup_file(saved_models[0])
    try:
        # Beside the models, so that versions can be hard links to them.
        with tempfile.TemporaryDirectory(prefix=".events-", dir=saved_models[0].parent) as directory:
            work = Path(directory)
            work.chmod(DIRECTORY_MODE)
            served = [(rung, ladder.prepared(saved_models, work, rung.mapping, console)) for rung in rungs()]
            for round, event, (rung, models) in itertools.product(
                range(1, rounds + 1), chosen or _EVENTS, served
            ):
                load = plan(event, requests, rate, round)
                run = measure(load, rung, models, work, engine_note, console)
                out.mkdir(parents=True, exist_ok=True)
                run.save(out / f"{event}-{rung.key}-{round}.npz")
    except SpikelessError as error:
        raise SystemExit(f"error: {error}") from None
    text = summary(out, shlex.join(["python", *sys.argv]))
    (out / "summary.md").write_text(text)
    click.echo(text)


if __name__ == "__main__":
    main()
