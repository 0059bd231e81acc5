"""What each part of the library that keeps loads apart from requests is worth.

    SPIKELESS_SERVER=tensorflow_model_server make bench-isolation

In: SavedModels with warmup files. Out: a result directory as `spikeless bench ladder`
writes it, in which the rungs are: nothing, each part of ``docker/isolate`` alone, all
but each, and all of them. All serve the same versions, mapped and optimised.
"""

from __future__ import annotations

import dataclasses
import datetime
import shlex
import sys
from pathlib import Path

import click
from rich.console import Console

from spikeless import launch
from spikeless.bench import ladder
from spikeless.bench.rungs import RUNGS, Rung
from spikeless.errors import SpikelessError
from spikeless.warmup import warmup_file

_PATH = click.Path(path_type=Path)


def rungs() -> list[Rung]:
    """Nothing, each part alone, all but each, all."""
    none, whole = (next(rung for rung in RUNGS if rung.key == key) for key in ("optimized", "isolated"))
    parts = launch.ISOLATE_PARTS
    alone = [
        dataclasses.replace(
            whole,
            key=f"only-{part}",
            title=f"only {part}",
            isolate_without=tuple(p for p in parts if p != part),
        )
        for part in parts
    ]
    without = [
        dataclasses.replace(whole, key=f"no-{part}", title=f"all but {part}", isolate_without=(part,))
        for part in parts
    ]
    return [
        dataclasses.replace(none, title="nothing"),
        *alone,
        *without,
        dataclasses.replace(whole, title="all"),
    ]


@click.command()
@click.argument("saved_models", type=_PATH, nargs=-1, required=True)
@click.option("--requests", type=_PATH, help="To replay.  [default: the first model's warmup file]")
@click.option("--rate", default=1000.0, show_default=True, help="Requests per second.")
@click.option("--rounds", default=2, show_default=True, help="How often all take turns.")
@click.option("--publishes", default=5, show_default=True, help="Reloads in each run.")
@click.option("--publish-every", default=4.3, show_default=True, help="Seconds between two.")
@click.option("--part", "parts", multiple=True, help="Only rungs with this in their name; repeatable.")
@click.option("--engine-note", default="", envvar="SPIKELESS_ENGINE_NOTE")
@click.option("--out", type=_PATH, help="[default: benchmarks/results/<date>-<engine>-isolation]")
def main(
    saved_models: tuple[Path, ...],
    requests: Path | None,
    rate: float,
    rounds: int,
    publishes: int,
    publish_every: float,
    parts: tuple[str, ...],
    engine_note: str,
    out: Path | None,
) -> None:
    """Measure each part of docker/isolate on the engine that SPIKELESS_SERVER names."""
    now = datetime.datetime.now(datetime.timezone.utc)
    engine = Path(launch.chosen_engine()).name
    try:
        settings = ladder.LadderSettings(
            saved_models=saved_models,
            requests=requests or warmup_file(saved_models[0]),
            out=out or Path("benchmarks/results") / f"{now:%Y-%m-%d}-{engine}-isolation",
            command=shlex.join(["python", *sys.argv]),
            rungs=[rung for rung in rungs() if not parts or any(part in rung.key for part in parts)],
            compared="with each part of docker/isolate alone, with all but each, with all and with none",
            rounds=rounds,
            publishes=publishes,
            publish_every=publish_every,
            rate=rate,
            engine_note=engine_note,
        )
        click.echo(ladder.run(settings, Console(stderr=True)).read_text())
    except SpikelessError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
