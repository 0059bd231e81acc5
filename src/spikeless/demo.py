"""The whole pipeline: train, warm, publish, serve, swap under load, report.

In: a clone of the project (its ``training/`` and ``warmup/`` folders). Out: a folder
with a report, the raw results, the model repositories and the server logs. Two
scenarios, without and with a warmup file, take turns (A, B, A, B). Each run has a new
server and a new repository, and version 2 is published while the load runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console

from spikeless import bench, launch, warmup
from spikeless.bench import report
from spikeless.bench.rungs import LOAD_THREADS
from spikeless.disk import children
from spikeless.errors import FailedPrecondition, InvalidArgument, NotFound
from spikeless.repository import publishing

MODEL = "boston"
SCENARIOS = ("no warmup", "warmup")
SAMPLES = Path("warmup") / MODEL / "samples.jsonl"
SCRIPT = "factorization_machine"
TRAINING_SCRIPT = Path("training") / f"train_{SCRIPT}.py"
#: Version 2 comes after five ninths of the load, and enough steady time before it.
SHORTEST_SECONDS = 6.0


@dataclass(frozen=True)
class DemoSettings:
    """What `run` does; the defaults suit two cores and take five minutes."""

    #: The clone: where ``training/`` and ``warmup/`` are.
    root: Path = Path(".")
    #: Reports go to ``<reports>/<time>/``.
    reports: Path = Path("reports")
    #: Requests per second, and for how many seconds in each run.
    rate: float = 300.0
    seconds: float = 18.0
    publish_at: float = 10.0
    #: How often each scenario is run.
    repeats: int = 2
    batch_sizes: tuple[int, ...] = (1, 8, 32)

    def __post_init__(self) -> None:
        _ = self.load("")  # Raises when it cannot be run.
        if self.repeats < 1:
            raise InvalidArgument(f"repeats must be 1 or more, not {self.repeats}")

    def load(self, requests: str) -> bench.Settings:
        """The load of each run, with the requests of that file."""
        return bench.Settings(
            model_name=MODEL,
            requests=requests,
            rate=self.rate,
            seconds=self.seconds,
            publish_at=self.publish_at,
        )


def run(settings: DemoSettings, console: Console) -> Path:
    """Run the demo and return the path of the report's page.

    Raises:
        NotFound: ``settings.root`` is no clone of the project.
        SpikelessError: a stage failed.
    """
    for needed in (TRAINING_SCRIPT, SAMPLES):
        if not (settings.root / needed).is_file():
            raise NotFound(f"{settings.root / needed} is missing: run the demo in a clone of the project")
    started = time.monotonic()
    directory = _new_directory(settings.reports)
    allocator, notes = _allocator(console)
    saved_models = _train_and_warm(settings, directory, console)

    load = settings.load(str(warmup.warmup_file(saved_models["warmup"][0])))
    with bench.progress_bar("load generator's floor", bench.FLOOR_SECONDS, console) as progress:
        floor = bench.measure_floor(load, progress=progress)
    results: list[Path] = []
    for repeat in range(1, settings.repeats + 1):
        for scenario in SCENARIOS:
            name = f"{scenario.replace(' ', '-')}-{repeat}"
            with (
                _served(directory / "models" / name, saved_models[scenario], directory, allocator) as swap,
                bench.progress_bar(f"{scenario} ({repeat})", settings.seconds, console) as progress,
            ):
                server, publish = swap
                facts = bench.server_facts(server)
                result = bench.run(scenario, load, facts, publish, floor, progress, notes)
            path = directory / "results" / f"{name}.npz"
            path.parent.mkdir(exist_ok=True)
            result.save(path)
            results.append(path)

    page = report.write(results, directory)
    report.show(report.group([bench.read_run(path) for path in results]), console)
    console.print(f"done in {time.monotonic() - started:.0f} s; the report: [bold]{page}[/bold]")
    return page


def _new_directory(reports: Path) -> Path:
    directory = reports / datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    directory.mkdir(parents=True)
    return directory


def _allocator(console: Console) -> tuple[str, list[str]]:
    """jemalloc if it is installed, else glibc, and a note about that for the report."""
    if launch.jemalloc_installed():
        return "jemalloc", []
    note = f"measured with glibc's allocator, because {launch.JEMALLOC_REMEDY}"
    console.print(f"[yellow]{launch.JEMALLOC_REMEDY}; going on with glibc[/yellow]")
    return "glibc", [note]


def _train_and_warm(settings: DemoSettings, directory: Path, console: Console) -> dict[str, list[Path]]:
    """The SavedModels of versions 1 and 2 for each scenario.

    The scenarios have the same exports, with a warmup file or without.
    """
    models: dict[str, list[Path]] = {scenario: [] for scenario in SCENARIOS}
    for version in (1, 2):
        with console.status(f"training version {version}"):
            export = _train(settings.root, directory / "runs", seed=version)
        cold = directory / "without-warmup" / str(version)
        shutil.copytree(export / "saved_model", cold, ignore=shutil.ignore_patterns("assets.extra"))
        file = warmup.build(
            export / "saved_model",
            warmup.BuildSettings(
                samples=(warmup.SampleFile(settings.root / SAMPLES),),
                batch_sizes=settings.batch_sizes,
                model_name=MODEL,
            ),
        )
        models["no warmup"].append(cold)
        models["warmup"].append(export / "saved_model")
        console.print(f"version {version}: trained and exported, warmup file of {file.stat().st_size} bytes")
    return models


def _train(root: Path, runs: Path, seed: int) -> Path:
    """Run the training script and return its run directory."""
    before = set(runs.glob(f"{SCRIPT}-*"))
    command = [sys.executable, "-m", "spikeless", "train", "--training", str(root / TRAINING_SCRIPT.parent)]
    done = children.run(
        [*command, SCRIPT, "--seed", str(seed), "--runs", str(runs)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    if done.returncode:
        raise FailedPrecondition(f"training failed:\n{(done.stderr or done.stdout)[-2000:]}")
    (new,) = set(runs.glob(f"{SCRIPT}-*")) - before
    return new


@contextmanager
def _served(
    models: Path, saved_models: list[Path], directory: Path, allocator: str
) -> Iterator[tuple[launch.ServerProcess, Callable[[], Path]]]:
    """A server on version 1, and a callable that publishes version 2.

    Version 2 is staged and checked beforehand; in production another machine does that.
    """
    first, second = saved_models
    publishing.publish(first, models, MODEL)
    with publishing.stage(second, models, MODEL) as candidate:
        settings = launch.LaunchSettings(
            MODEL,
            models / MODEL,
            flags=(*bench.SERVER_FLAGS, *LOAD_THREADS),
            allocator=allocator,
            log=directory / "logs" / f"{models.name}.log",
        )
        with launch.start(settings) as server:
            yield server, candidate.publish
