"""Promotion beside what happens at the same moment: polls, unloads, slow requests."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from harness import put_version
from promotion_models import NAME, add_version, flawless, fleet_of, served, settings, start_server

from spikeless import launch
from spikeless.client import Client
from spikeless.errors import NotFound
from spikeless.formats.states import State
from spikeless.repository import models_config
from spikeless.repository.models_config import new_block, with_versions
from spikeless.rollout.fleet import states
from spikeless.rollout.promotion import promote, rollback

#: A model of which each new version tells that the server has polled the disk.
POLLED = "polled"
#: Some hundred milliseconds, and more on a slow machine.
SLOW = {"steps": np.asarray(1000, np.int32)}


@pytest.fixture
def unpinned(models: Path, scales: Path) -> Iterator[launch.ServerProcess]:
    """A server that serves the newest version of each of two models."""
    put_version(scales / "1", models / POLLED, 1)
    models_config.edit(models, {name: new_block(name, str(models / name)) for name in (NAME, POLLED)})
    with start_server(models) as server:
        yield server


@pytest.mark.parametrize("moment", ["checking", "reloading", "asking", "comparing", "moving stable"])
def test_what_is_published_in_a_promotion_answers_nobody_after_it(
    models: Path, unpinned: launch.ServerProcess, scales: Path, moment: str
) -> None:
    """The server may find the version just then; two polls later it has to be gone."""
    staged = add_version(scales / "3", models.parent / "staged", 3)
    said: list[str] = []

    def publish(line: str) -> None:
        said.append(line)
        if moment in line and staged.exists():
            staged.rename(models / NAME / "3")

    with Client(unpinned.target, timeout=60.0) as client, flawless(unpinned.target, labels=("",)):
        promote(models, NAME, 2, fleet_of(unpinned), settings(), publish)
        assert not staged.exists(), said
        for version in (2, 3):
            put_version(scales / str(version), models / POLLED, version)

            def has_polled(version: int = version) -> bool:
                assert served(client) == served(client, label="stable") == 2
                return served(client, POLLED) == version

            unpinned.wait_for(has_polled, "a poll of the disk")
        unpinned.wait_for(
            lambda: {one.version: one.state for one in states(client, NAME)}.get(3, State.END) is State.END,
            "version 3 to be unloaded",
        )


def test_a_canary_is_taken_away_and_given_back_under_a_slow_request(models: Path, saved_models: Path) -> None:
    """Its version is unloaded when the request ends; the next canary waits for that."""
    slow = "slow"
    for version in (1, 2):
        put_version(saved_models / "times_one", models / slow, version)
    block = with_versions(new_block(slow, str(models / slow)), [1], {"stable": 1})
    models_config.edit(models, {slow: block, NAME: None})
    answered = 0
    with (
        start_server(models, wait_for=slow) as server,
        Client(server.target, timeout=120) as client,
        ThreadPoolExecutor(1) as callers,
    ):
        for _ in range(15):
            assert promote(models, slow, 2, fleet_of(server), settings(canary=True)).result == "canary"
            call = callers.submit(client.predict, f"{slow}-canary", SLOW, "spin")
            rollback(models, slow, fleet_of(server), canary=True)
            try:
                call.result()
                answered += 1
            except NotFound:  # It came after the canary had gone.
                continue
    assert answered, "no request was in flight"
