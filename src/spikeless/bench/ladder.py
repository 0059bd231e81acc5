"""What each remedy against the reload spike is worth: each rung of a ladder adds one.

In: SavedModels with warmup files. Out: a result directory with the raw result of each
run, and ``summary.md`` with the table and the command that made it; `spikeless report`
draws the page. The rungs take turns (A B C, A B C, ...). Each run has a new server and
a new repository, in which the SavedModels are published in turn while the load runs.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from spikeless import bench, launch
from spikeless.bench import report
from spikeless.bench.events import PUBLISH, START
from spikeless.bench.replayed import read_requests
from spikeless.bench.rungs import LADDER, Rung
from spikeless.disk.atomic import DIRECTORY_MODE, write_atomically
from spikeless.errors import AlreadyExists, InvalidArgument
from spikeless.formats.savedmodel import VARIABLES_DIRECTORY
from spikeless.mapping import MapSettings, map_saved_model

_MODEL = "model"
#: Enough for gigabytes that have to be read from disk.
_READY_SECONDS = 900.0


@dataclass(frozen=True)
class LadderSettings:
    """What `run` does."""

    #: Published in turn; give two (see `spikeless.bench.staged`).
    saved_models: Sequence[Path]
    #: The file whose requests are replayed.
    requests: Path
    #: The result directory, which must not exist, unless `resume` is set.
    out: Path
    #: The command line that the summary names.
    command: str
    #: From the lowest.
    rungs: Sequence[Rung] = LADDER
    #: What is measured: `PUBLISH`, or `START` with one start in each round.
    event: str = PUBLISH
    #: How often all rungs are run.
    rounds: int = 2
    #: Versions published in each run.
    publishes: int = 5
    #: Seconds between two versions.
    publish_every: float = 10.0
    #: Requests per second.
    rate: float = 200.0
    #: Seconds at the start that are left out of the steady window.
    warm_seconds: float = 3.0
    #: Keep the results in `out` of an earlier call with the same settings, and run what
    #: is missing.
    resume: bool = False
    #: What else the results say of the engine, such as how it was built.
    engine_note: str = ""

    def __post_init__(self) -> None:
        if not self.saved_models or not self.rungs or self.rounds < 1:
            raise InvalidArgument("a ladder needs a SavedModel, a rung and a round")
        _ = self.load(1)  # Raises when it cannot be run.

    def load(self, round: int) -> bench.Settings:
        """The load of a round, the same for all rungs; the seed is its number."""
        if self.event == START:
            return bench.Settings(
                model_name=_MODEL,
                requests=str(self.requests),
                rate=self.rate,
                seconds=_READY_SECONDS,
                seed=round,
                event=START,
                warm_seconds=0.0,
            )
        share = self.publish_every
        return bench.Settings(
            model_name=_MODEL,
            requests=str(self.requests),
            rate=self.rate,
            # Publishing comes after 60 % of each share: quiet time before, time to end
            # after.
            seconds=self.warm_seconds + self.publishes * share,
            seed=round,
            publish_at=self.warm_seconds + 0.6 * share,
            publishes=self.publishes,
            publish_every=share,
            warm_seconds=self.warm_seconds,
        )


def run(settings: LadderSettings, console: Console) -> Path:
    """Run the ladder and return the path of the summary.

    When a run fails, the results of the earlier ones stay. Rungs that cannot be run on
    this machine are left out, and the summary names them.

    Raises:
        AlreadyExists: there is something at ``settings.out``.
        InvalidArgument: no rung can be run here, or the results to resume are of other
            settings.
        SpikelessError: a model cannot be staged or served, or the load generator
            failed.
    """
    if settings.out.exists() and not settings.resume:
        raise AlreadyExists(
            f"{settings.out} is there already and is not overwritten; give another --out, or --resume"
        )
    rungs = [rung for rung in settings.rungs if rung.lacking is None]
    notes = [f"Left out: {rung.title}, because {rung.lacking}." for rung in settings.rungs if rung.lacking]
    for note in notes:
        console.print(f"[yellow]{note}[/yellow]")
    if not rungs:
        raise InvalidArgument("none of the rungs can be run here")
    read_requests(settings.requests, _MODEL)  # Fails here rather than after the floor.
    turns = [(round, rung) for round in range(1, settings.rounds + 1) for rung in rungs]
    results = [_result(settings, round, rung) for round, rung in turns]
    missing = [turn for turn in turns if not _is_there(settings, *turn)]
    if missing:
        _run(settings, missing, console)
    summary = settings.out / "summary.md"
    write_atomically(summary, _summary(settings, results, notes).encode())
    return summary


def _run(settings: LadderSettings, turns: Sequence[tuple[int, Rung]], console: Console) -> None:
    """Run these rungs of these rounds, and save each result."""
    with bench.progress_bar("load generator's floor", bench.FLOOR_SECONDS, console) as progress:
        floor = bench.measure_floor(settings.load(1), progress=progress)
    # Beside the models, so that versions can be hard links to them.
    with tempfile.TemporaryDirectory(prefix=".ladder-", dir=settings.saved_models[0].parent) as directory:
        work = Path(directory)
        work.chmod(DIRECTORY_MODE)
        prepared = {
            mapping: _prepared(settings.saved_models, work, mapping, console)
            for mapping in dict.fromkeys(rung.mapping for _, rung in turns)
        }
        for round, rung in turns:
            published = len(settings.load(round).publish_moments)
            with (
                _repository(work) as models,
                bench.staged(prepared[rung.mapping], models, _MODEL, 1 + published, link=True) as publish,
            ):
                publish()
                server = _server(rung, models)
                result = _measured(settings, round, rung, server, publish, floor, console)
            settings.out.mkdir(parents=True, exist_ok=True)
            result.save(_result(settings, round, rung))


def _measured(
    settings: LadderSettings,
    round: int,
    rung: Rung,
    launched: launch.LaunchSettings,
    publish: Callable[[], object],
    floor: bench.Floor,
    console: Console,
) -> bench.Run:
    load, title = settings.load(round), f"{rung.title} ({round})"
    if settings.event == START:
        with console.status(f"starting {title}"):
            return bench.start_under_load(rung.title, load, launched, floor, settings.engine_note)
    with (
        launch.start(launched) as server,
        bench.progress_bar(title, load.seconds, console) as progress,
    ):
        facts = bench.server_facts(server, settings.engine_note)
        return bench.run(rung.title, load, facts, publish, floor, progress)


def _result(settings: LadderSettings, round: int, rung: Rung) -> Path:
    return settings.out / f"{rung.key}-{round}.npz"


def _is_there(settings: LadderSettings, round: int, rung: Rung) -> bool:
    """Whether an earlier call saved this result."""
    path = _result(settings, round, rung)
    if not path.exists():
        return False
    load = dataclasses.replace(bench.read_run(path).facts.settings, requests=str(settings.requests))
    if settings.event == START:  # It ended when the server answered.
        load = dataclasses.replace(load, seconds=settings.load(round).seconds)
    if load != settings.load(round):
        raise InvalidArgument(f"{path} is the result of another load; give another --out")
    return True


@contextmanager
def _repository(work: Path) -> Iterator[Path]:
    """A new model repository, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="models-", dir=work) as directory:
        models = Path(directory)
        models.chmod(DIRECTORY_MODE)
        yield models


def _server(rung: Rung, models: Path) -> launch.LaunchSettings:
    settings = launch.LaunchSettings(
        _MODEL,
        models / _MODEL,
        flags=bench.SERVER_FLAGS,
        allocator=rung.allocator,
        log=models / "server.log",
        ready_timeout=_READY_SECONDS,
    )
    return rung.serving(settings, models)


def _prepared(
    saved_models: Sequence[Path], work: Path, mapping: MapSettings | None, console: Console
) -> Sequence[Path]:
    """The models as they are, or copies in `work` that are mapped."""
    if mapping is None:
        return saved_models
    directory = Path(tempfile.mkdtemp(prefix="mapped-", dir=work))
    copies = [directory / str(number) for number, _ in enumerate(saved_models, start=1)]
    for saved_model, copy in zip(saved_models, copies, strict=True):
        with console.status(f"mapping {saved_model}"):
            map_saved_model(saved_model, copy, mapping)
    return copies


def _parameters(saved_model: Path) -> int:
    """Bytes of a model's parameters, as its checkpoint holds them."""
    files = (saved_model / VARIABLES_DIRECTORY).glob("*.data-*")
    return sum(file.stat().st_size for file in files)


def _summary(settings: LadderSettings, results: Sequence[Path], notes: Sequence[str]) -> str:
    scenarios = report.group([bench.read_run(path) for path in results])
    lines = [
        f"# {settings.out.name}",
        "",
        f"{_measurements(settings)} on each rung, which adds one remedy to the one before. Made by",
        "",
        "```sh",
        settings.command,
        "```",
        "",
        *notes,
        *([""] if notes else []),
    ]
    if settings.event != START:
        lines += [report.render_goal(scenarios, _parameters(settings.saved_models[0])), ""]
    return "\n".join([*lines, report.render_markdown(scenarios)])


def _measurements(settings: LadderSettings) -> str:
    if settings.event == START:
        return f"{settings.rounds} starts"
    return f"{settings.rounds} x {settings.publishes} reloads"
