"""The benchmark of storms, unloads and other models, small: each event happens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import benchmark_scripts
import pytest
from rich.console import Console

from spikeless import bench
from spikeless.bench import ladder
from spikeless.bench.events import PUBLISH_ALL, STORM, UNLOAD
from spikeless.errors import Code

benchmark = benchmark_scripts.fixture("events")


@pytest.fixture(scope="module")
def made(benchmark: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import make_embedding_model

    directory: Path = tmp_path_factory.mktemp("events") / "made"
    make_embedding_model.make(directory, 1 << 20, "module", versions=2)
    return directory


@pytest.mark.parametrize(
    ("event", "done", "number"),
    [(STORM, "storm v2 to v3", 0), (UNLOAD, "unload v1", 1), (PUBLISH_ALL, "publish other, another", 1)],
)
def test_each_event_happens(
    benchmark: Any,
    made: Path,
    tmp_path_factory: pytest.TempPathFactory,
    event: str,
    done: str,
    number: int,
) -> None:
    rung = benchmark.rungs()[number]
    planned = benchmark.plan(event, made / "requests", 20.0, 1)
    short = dataclasses.replace(
        planned,
        seconds=10.0,
        warm_seconds=1.0,
        publish_at=3.0,
        publishes=2 if event == STORM else 1,
        publish_every=1.0,
    )
    work = tmp_path_factory.mktemp("work")
    models = ladder.prepared([made / "1", made / "2"], work, rung.mapping, Console(stderr=True))
    run = benchmark.measure(short, rung, models, work, "", Console(stderr=True))
    assert set(run.requests["code"]) == {Code.OK}
    (reload,) = bench.analyse(run).reloads
    assert reload.happened
    assert reload.what.startswith(done)
    assert not list(work.glob("models-*")), "it tidies up"


def test_every_event_has_quiet_time_to_compare_with(benchmark: Any) -> None:
    for event in benchmark._EVENTS:
        planned = benchmark.plan(event, Path("requests"), 200.0, 1)
        moments = planned.publish_moments
        assert planned.warm_seconds < moments[0]
        assert moments[-1] < planned.seconds - 5
