"""What each remedy against the reload spike is worth: one more on each rung of a ladder.

In: SavedModels with warmup files. Out: a result directory with the raw result of each run, and ``summary.md``
with the table and the command that made it; `spikeless report` draws the page. The rungs are run in turns
(A B C, A B C, ...), each time on a new server with a new repository, in which the SavedModels are published
in turn, one version after the other, while the load runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from spikeless import bench, launch
from spikeless.bench import report
from spikeless.disk.atomic import DIRECTORY_MODE, write_atomically
from spikeless.errors import AlreadyExists, InvalidArgument
from spikeless.mapping import MapSettings, map_saved_model

_MODEL = "model"
#: Gigabytes take their time to load when the disk has to be read.
_READY_SECONDS = 900.0
_THREADS = ("--num_load_threads=1", "--num_unload_threads=1")


@dataclass(frozen=True)
class Rung:
    """A way to serve. key: its name on the command line. flags: of the server, in TensorFlow Serving's words.

    mapped: the parameters are mapped from files (``spikeless map``) and not restored. optimized: and the
    graph is optimised beforehand (``spikeless map --optimize``). engine: the only one that knows the flags.
    """

    key: str
    name: str
    flags: Sequence[str] = ()
    allocator: str = "glibc"
    mapped: bool = False
    optimized: bool = False
    engine: str | None = None

    @property
    def lacking(self) -> str | None:
        """What keeps it from being run here, or None."""
        if self.allocator == "jemalloc" and not launch.jemalloc_installed():
            return launch.JEMALLOC_REMEDY
        if self.engine not in (None, launch.chosen_engine()):
            return f"its flags are those of the {self.engine} engine"
        return None


#: The models always have their warmup files; switched off, it is as if they had none.
RUNGS = (
    Rung("stock", "stock", ("--enable_model_warmup=false",)),
    Rung("warmup", "+ warmup"),
    Rung("threads", "+ load/unload threads", _THREADS),
    Rung("jemalloc", "+ jemalloc", _THREADS, "jemalloc"),
    Rung("mapped", "+ mapped", _THREADS, "jemalloc", mapped=True),
    Rung("optimized", "+ optimised", _THREADS, "jemalloc", mapped=True, optimized=True),
    Rung(
        "yielding",
        "+ loads yield",
        (*_THREADS, "--load_threads_yield"),
        "jemalloc",
        mapped=True,
        optimized=True,
        engine=launch.EMBEDDED,
    ),
)


@dataclass(frozen=True)
class LadderSettings:
    """What `run` does.

    saved_models: are published in turn; give two (`spikeless.bench.staged`). requests: the file whose
    requests are replayed. out: the result directory, which must not exist. command: goes into the summary.
    rungs: from the lowest. rounds: how often all of them are run. publishes: versions published in each run,
    one every publish_every seconds. rate: requests per second. warm_seconds: left out of the steady window.
    """

    saved_models: Sequence[Path]
    requests: Path
    out: Path
    command: str
    rungs: Sequence[Rung] = RUNGS
    rounds: int = 2
    publishes: int = 5
    publish_every: float = 10.0
    rate: float = 200.0
    warm_seconds: float = 3.0

    def __post_init__(self) -> None:
        if not self.saved_models or not self.rungs or self.rounds < 1:
            raise InvalidArgument("a ladder needs a SavedModel, a rung and a round")

    def load(self, round: int) -> bench.Settings:
        """The load of a round: the same for all rungs, another one in the next round."""
        share = self.publish_every
        return bench.Settings(
            model_name=_MODEL,
            requests=str(self.requests),
            rate=self.rate,
            # In each share publishing comes after 60 %, so that it is quiet before, and over at the end.
            seconds=self.warm_seconds + self.publishes * share,
            seed=round,
            publish_at=self.warm_seconds + 0.6 * share,
            publishes=self.publishes,
            publish_every=share,
            warm_seconds=self.warm_seconds,
        )


def run(settings: LadderSettings, console: Console) -> Path:
    """Run the ladder and return the path of the summary. Results that are there stay when a run fails.

    Rungs that cannot be run on this machine are left out, which the summary says.

    Raises:
        AlreadyExists: there is something at ``settings.out``.
        SpikelessError: a model cannot be staged or served, the load generator failed.
    """
    if settings.out.exists():
        raise AlreadyExists(f"{settings.out} is there already and is not overwritten; give another --out")
    rungs = [rung for rung in settings.rungs if rung.lacking is None]
    notes = [f"Left out: {rung.name}, because {rung.lacking}." for rung in settings.rungs if rung.lacking]
    for note in notes:
        console.print(f"[yellow]{note}[/yellow]")
    if not rungs:
        raise InvalidArgument("none of the rungs can be run here")
    with bench.progress_bar("load generator's floor", bench.FLOOR_SECONDS, console) as progress:
        floor = bench.measure_floor(settings.load(1), progress=progress)
    results: list[Path] = []
    # Beside the models, so that versions can be hard links to them.
    with tempfile.TemporaryDirectory(prefix=".ladder-", dir=settings.saved_models[0].parent) as directory:
        work = Path(directory)
        work.chmod(DIRECTORY_MODE)
        models_of: dict[tuple[bool, bool], Sequence[Path]] = {(False, False): settings.saved_models}
        for form in {(rung.mapped, rung.optimized) for rung in rungs if rung.mapped}:
            models_of[form] = _mapped(settings.saved_models, work, form[1], console)
        for round in range(1, settings.rounds + 1):
            for rung in rungs:
                load = settings.load(round)
                saved_models = models_of[rung.mapped, rung.optimized]
                with (
                    _repository(work) as models,
                    bench.staged(saved_models, models, _MODEL, 1 + load.publishes, link=True) as publish,
                ):
                    publish()
                    with (
                        launch.start(_server(rung, models)) as server,
                        bench.progress_bar(f"{rung.name} ({round})", load.seconds, console) as progress,
                    ):
                        facts = bench.server_facts(server)
                        result = bench.run(rung.name, load, facts, publish, floor, progress)
                results.append(settings.out / f"{rung.key}-{round}.npz")
                settings.out.mkdir(parents=True, exist_ok=True)
                result.save(results[-1])
    summary = settings.out / "summary.md"
    write_atomically(summary, _summary(settings, results, notes).encode())
    return summary


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
        flags=(*bench.SERVER_FLAGS, *rung.flags),
        allocator=rung.allocator,
        log=models / "server.log",
        ready_timeout=_READY_SECONDS,
    )
    return launch.unoptimizing(settings, models) if rung.optimized else settings


def _mapped(saved_models: Sequence[Path], work: Path, optimize: bool, console: Console) -> list[Path]:
    """Mapped copies of the models."""
    copies = []
    for number, saved_model in enumerate(saved_models, start=1):
        copies.append(work / f"{'optimized' if optimize else 'mapped'}-{number}")
        with console.status(f"mapping {saved_model}"):
            map_saved_model(saved_model, copies[-1], MapSettings(optimize=optimize))
    return copies


def _summary(settings: LadderSettings, results: Sequence[Path], notes: Sequence[str]) -> str:
    scenarios = report.group([bench.read_run(path) for path in results])
    lines = [
        f"# {settings.out.name}",
        "",
        f"{settings.rounds} x {settings.publishes} reloads on each rung, which adds one remedy to the one "
        "before. Made by",
        "",
        "```sh",
        settings.command,
        "```",
        "",
        *notes,
        *([""] if notes else []),
        report.render_markdown(scenarios),
    ]
    return "\n".join(lines)
