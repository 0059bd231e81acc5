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
from spikeless.bench.capacity import share_of_capacity
from spikeless.bench.events import PUBLISH, START
from spikeless.bench.folding import unfit
from spikeless.bench.replayed import read_requests
from spikeless.bench.rungs import LADDER, Rung
from spikeless.disk.atomic import DIRECTORY_MODE, write_atomically
from spikeless.errors import AlreadyExists, InvalidArgument
from spikeless.formats.savedmodel import VARIABLES_DIRECTORY
from spikeless.mapping import MapSettings, is_mapped, map_saved_model, read_manifest

_MODEL = "model"
#: Enough for gigabytes that have to be read from disk.
_READY_SECONDS = 900.0


@dataclass(frozen=True)
class LadderSettings:
    """What `run` does."""

    #: Published in turn; give two (see `spikeless.bench.staged`). Those that are mapped
    #: already are for the rungs that would map them so.
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
    #: What the summary says of them, after "reloads".
    compared: str = "on each rung, which adds one remedy to the one before"
    #: How often all rungs are run.
    rounds: int = 2
    #: Versions published in each run.
    publishes: int = 5
    #: Seconds between two versions.
    publish_every: float = 10.0
    #: Requests per second.
    rate: float = 200.0
    #: Share of what the server keeps up with on the first rung, instead of `rate`.
    load_share: float | None = None
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
        if self.event == START and self.load_share is not None:
            raise InvalidArgument("what a server can do is searched while it runs: start it at a given rate")
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
    lacking = {rung: _lacking(settings, rung) for rung in settings.rungs}
    rungs = [rung for rung, reason in lacking.items() if reason is None]
    notes = [f"Left out: {rung.title}, because {reason}." for rung, reason in lacking.items() if reason]
    for note in notes:
        console.print(f"[yellow]{note}[/yellow]")
    if not rungs:
        raise InvalidArgument("none of the rungs can be run here")
    read_requests(settings.requests, _MODEL)  # Fails here rather than after the floor.
    turns = [(round, rung) for round in range(1, settings.rounds + 1) for rung in rungs]
    results = [_result(settings, round, rung) for round, rung in turns]
    searched: Sequence[str] = ()
    there = next((path for path in results if path.exists()), None)
    if settings.load_share is not None and there is not None:
        earlier = bench.read_run(there).facts
        if not earlier.notes:
            raise InvalidArgument(f"{there} is the result of another load; give another --out")
        settings, searched = dataclasses.replace(settings, rate=earlier.settings.rate), earlier.notes
    missing = [turn for turn in turns if not _is_there(settings, *turn)]
    if missing:
        _run(settings, missing, searched, console)
    summary = settings.out / "summary.md"
    write_atomically(summary, _summary(settings, results, notes).encode())
    return summary


def _run(
    settings: LadderSettings,
    turns: Sequence[tuple[int, Rung]],
    searched: Sequence[str],
    console: Console,
) -> None:
    """Run these rungs of these rounds, and save each result.

    `searched` says how the rate of earlier results was found, where it was.
    """
    # Beside the models, so that versions can be hard links to them.
    with tempfile.TemporaryDirectory(prefix=".ladder-", dir=settings.saved_models[0].parent) as directory:
        work = Path(directory)
        work.chmod(DIRECTORY_MODE)
        served = {
            mapping: prepared(settings.saved_models, work, mapping, console)
            for mapping in dict.fromkeys(rung.mapping for _, rung in turns)
        }
        if settings.load_share is not None and not searched:
            first = turns[0][1]
            rate, note = _found_rate(settings, first, served[first.mapping], work, console)
            settings, searched = dataclasses.replace(settings, rate=rate), (note,)
        with bench.progress_bar("load generator's floor", bench.FLOOR_SECONDS, console) as progress:
            floor = bench.measure_floor(settings.load(1), progress=progress)
        for round, rung in turns:
            published = len(settings.load(round).publish_moments)
            with (
                repository(work) as models,
                bench.staged(served[rung.mapping], models, _MODEL, 1 + published, link=True) as publish,
            ):
                publish()
                server = _server(rung, models)
                result = _measured(settings, round, rung, server, publish, floor, searched, console)
            settings.out.mkdir(parents=True, exist_ok=True)
            result.save(_result(settings, round, rung))
            if settings.event != START:
                console.print(f"{rung.title} ({round}): {usable(result)}", soft_wrap=True)


def usable(run: bench.Run) -> str:
    """How many reloads of a run can be compared, and what to change, in words."""
    reloads = bench.analyse(run).reloads
    used = sum(unfit(reload) is None for reload in reloads)
    text = f"{used} of {len(reloads)} reloads can be used"
    if short := [reload.window for reload in reloads if reload.control is None]:
        longest = max(window.end - window.begin for window in short)
        text += (
            f"; for {len(short)} the quiet time before was too short: "
            f"give --publish-every more than {2 * longest:.1f}s"
        )
    return text


def _found_rate(
    settings: LadderSettings, rung: Rung, saved_models: Sequence[Path], work: Path, console: Console
) -> tuple[float, str]:
    """The rate that is the wanted share of what a server of this rung keeps up with."""
    assert settings.load_share is not None
    with repository(work) as models, bench.staged(saved_models, models, _MODEL, 1, link=True) as publish:
        publish()
        with launch.start(_server(rung, models)) as server:
            facts = bench.server_facts(server)
            return share_of_capacity(settings.load(1), facts, settings.load_share, console.print)


def _measured(
    settings: LadderSettings,
    round: int,
    rung: Rung,
    launched: launch.LaunchSettings,
    publish: Callable[[], object],
    floor: bench.Floor,
    notes: Sequence[str],
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
        return bench.run(rung.title, load, facts, publish, floor, progress, notes)


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
def repository(work: Path) -> Iterator[Path]:
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


def _lacking(settings: LadderSettings, rung: Rung) -> str | None:
    """What keeps a rung from being run here, with these models; or None."""
    if not _mapped_so(settings.saved_models, rung.mapping) and not _mapped_so(settings.saved_models, None):
        return "no model is given that it could serve: those that are mapped are mapped otherwise"
    return rung.lacking


def _mapped_so(saved_models: Sequence[Path], mapping: MapSettings | None) -> Sequence[Path]:
    """Those of the models that are mapped already as this says; None: not at all."""
    return [
        path
        for path in saved_models
        if (read_manifest(path).optimized if is_mapped(path) else None)
        is (mapping.optimize if mapping is not None else None)
    ]


def prepared(
    saved_models: Sequence[Path], work: Path, mapping: MapSettings | None, console: Console
) -> Sequence[Path]:
    """The models as they are, or copies in `work` that are mapped."""
    if ready := _mapped_so(saved_models, mapping):
        return ready
    saved_models = _mapped_so(saved_models, None)
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
        f"{_measurements(settings)} {settings.compared}. Made by",
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
