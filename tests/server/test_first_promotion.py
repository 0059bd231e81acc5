"""The first promotion in a fresh clone, on servers that no models.config describes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from harness import POLL
from places import ROOT
from promotion_models import NAME, add_version, fleet_of, model_of, served, settings
from trained_models import spikeless

from spikeless import launch
from spikeless.client import Client
from spikeless.errors import FailedPrecondition
from spikeless.repository import models_config
from spikeless.repository.models_config import new_block
from spikeless.rollout.promotion import PromotionError, promote, rollback

FLAGS = (POLL, "--max_num_load_retries=0")
ELSEWHERE = f"/nowhere/{NAME}"


@pytest.fixture
def clone(scales: Path, tmp_path: Path) -> Path:
    """A repository with a version, and without a models.config."""
    models = tmp_path / "models"
    add_version(scales / "1", models, 1)
    return models


def serve_all(models: Path, *flags: str) -> launch.ServerProcess:
    """A server of all that is in the folder of the one model."""
    return launch.start(launch.LaunchSettings(NAME, models / NAME, flags=(*FLAGS, *flags)))


def test_a_server_of_one_model_can_be_promoted_on(clone: Path, scales: Path) -> None:
    with serve_all(clone) as server, Client(server.target, timeout=60.0) as client:
        add_version(scales / "2", clone, 2, expected=3.0)
        with pytest.raises(PromotionError, match="everything is as it was"):
            promote(clone, NAME, 2, fleet_of(server), settings())
        server.wait_for(lambda: served(client) == 2, "the highest version, as before")
        add_version(scales / "3", clone, 3)
        server.wait_for(lambda: served(client) == 3, "a version that is published later")
        promote(clone, NAME, 3, fleet_of(server), settings())
        assert served(client, label="stable") == 3
        assert model_of(clone).base_path == str(clone / NAME)


def test_servers_of_every_folder_can_be_promoted_on(clone: Path, scales: Path, tmp_path: Path) -> None:
    """As in containers: without models.config they got a list of all folders."""
    shutil.copytree(clone / NAME, clone / "other")
    folders = tmp_path / "folders.config"
    blocks = "\n".join(new_block(name, str(clone / name)) for name in (NAME, "other"))
    folders.write_text(f"model_config_list {{ {blocks} }}")
    settings_of = launch.LaunchSettings(
        flags=(POLL, f"--model_config_file={folders}"), wait_for=[NAME, "other"]
    )
    with launch.start(settings_of) as server, Client(server.target, timeout=60.0) as client:
        add_version(scales / "3", clone, 3)
        promote(clone, NAME, 3, fleet_of(server), settings(), dry_run=True)
        assert not (clone / "models.config").exists()
        promote(clone, NAME, 3, fleet_of(server), settings())
        assert served(client, label="stable") == 3
        assert served(client, name="other") == 1, "it is served as before"
        assert models_config.read(clone).names == ["other", NAME]
        # A model that is published later is added by its first promotion.
        shutil.copytree(clone / "other", clone / "third")
        done = spikeless("publish", scales / "2", "third", "--models", clone, "--allow-cold", "--no-load")
        assert "`spikeless promote third 2` adds it" in done.stderr, done.stderr
        promote(clone, "third", 2, fleet_of(server), settings())
        assert served(client, name="third", label="stable") == 2
        assert served(client, name="other") == 1


def test_another_model_of_the_same_name_is_left_alone(clone: Path, tmp_path: Path) -> None:
    shutil.copytree(clone / NAME, clone / "other")
    shutil.copytree(clone / NAME / "1", tmp_path / "elsewhere" / "9")
    folders = tmp_path / "folders.config"
    blocks = [new_block(NAME, str(clone / NAME)), new_block("other", str(tmp_path / "elsewhere"))]
    folders.write_text(f"model_config_list {{ {' '.join(blocks)} }}")
    flags = (POLL, f"--model_config_file={folders}")
    with launch.start(launch.LaunchSettings(flags=flags, wait_for=[NAME, "other"])) as server:
        with pytest.raises(FailedPrecondition, match="serves another other than"):
            promote(clone, NAME, 1, fleet_of(server), settings())
        assert not (clone / "models.config").exists()


def test_a_configuration_for_other_paths_changes_nothing(clone: Path, scales: Path) -> None:
    """As in containers: the file says /models, the server runs outside."""
    models_config.edit(clone, {NAME: new_block(NAME, ELSEWHERE)})
    text = (clone / "models.config").read_text()
    with serve_all(clone) as server, Client(server.target, timeout=60.0) as client:
        with pytest.raises(FailedPrecondition) as caught:
            promote(clone, NAME, 1, fleet_of(server), settings())
        for part in (str(clone / NAME), ELSEWHERE, "nothing was changed", "correct base_path in"):
            assert part in str(caught.value)
        with pytest.raises(FailedPrecondition, match="nothing was changed"):
            rollback(clone, NAME, fleet_of(server), version=1)
        assert (clone / "models.config").read_text() == text
        add_version(scales / "2", clone, 2)
        server.wait_for(lambda: served(client) == 2, "a version that is published later")


def git(folder: Path, *arguments: str) -> str:
    # Whoever the tree belongs to.
    command = ["git", "-c", "safe.directory=*", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the tree is no clone")
def test_promotion_leaves_a_clone_as_git_knows_it(clone: Path, scales: Path) -> None:
    """No tracked file is changed, and no new one is to be committed."""
    tracked = git(ROOT, "ls-files", ".gitignore", "models").splitlines()
    assert "models/.gitignore" in tracked
    for name in tracked:
        shutil.copy(ROOT / name, clone.parent / name)
    git(clone.parent, "init", "--quiet")
    git(clone.parent, "add", "--force", "--", *tracked)
    before = git(clone.parent, "status", "--porcelain", "--", *tracked, "models")
    assert len(before.splitlines()) == len(tracked)
    with serve_all(clone) as server:
        for number, canary in ((2, False), (3, True)):
            done = spikeless(
                "publish", scales / str(number), NAME, "--models", clone, "--allow-cold", "--no-load"
            )
            assert done.returncode == 0, done.stderr
            promote(clone, NAME, number, fleet_of(server), settings(canary=canary))
        rollback(clone, NAME, fleet_of(server), canary=True)
        rollback(clone, NAME, fleet_of(server), version=2)
    assert (clone / "models.config").exists()
    assert git(clone.parent, "status", "--porcelain", "--", *tracked, "models") == before


@pytest.mark.usefixtures("embedded")  # TensorFlow Serving ends without its configuration.
def test_a_path_that_the_server_does_not_see_changes_nothing(clone: Path) -> None:
    flag = f"--model_config_file={clone / 'models.config'}"
    with launch.start(launch.LaunchSettings(flags=(*FLAGS, flag))) as server:
        with pytest.raises(FailedPrecondition, match=r"does not see version 1 .*/nowhere.*--serving-root"):
            promote(clone, NAME, 1, fleet_of(server), settings(serving_root="/nowhere"))
        assert not (clone / "models.config").exists()


@pytest.mark.usefixtures("embedded")  # TensorFlow Serving ends without its configuration.
def test_a_clone_without_models_config(clone: Path) -> None:
    flag = f"--model_config_file={clone / 'models.config'}"
    with (
        launch.start(launch.LaunchSettings(flags=(*FLAGS, flag))) as server,
        Client(server.target, timeout=60.0) as client,
    ):
        assert "no model is served until one is promoted" in server.log_tail()
        promote(clone, NAME, 1, fleet_of(server), settings())
        assert served(client, label="stable") == 1
    with (
        launch.start(
            launch.LaunchSettings(
                flags=(*FLAGS, flag, "--allow_version_labels_for_unavailable_models"), wait_for=[NAME]
            )
        ) as server,
        Client(server.target, timeout=60.0) as client,
    ):
        assert served(client, label="stable") == 1, "after a restart, too"


@pytest.mark.usefixtures("embedded")  # TensorFlow Serving gives no model new versions meanwhile.
def test_a_missing_base_path_is_logged_once(clone: Path, scales: Path) -> None:
    blocks = {name: new_block(name, str(clone / name)) for name in (NAME, "other")}
    (clone / "other").mkdir()
    shutil.copytree(scales / "1", clone / "other" / "1")
    models_config.edit(clone, blocks)
    flag = f"--model_config_file={clone / 'models.config'}"
    with launch.start(launch.LaunchSettings(flags=(*FLAGS, flag), wait_for=[*blocks])) as server:
        (clone / NAME).rename(clone / "away")
        with Client(server.target, timeout=60.0) as client:
            for version in (2, 3, 4):  # Each is found by a later poll.
                (clone / "other" / str(version - 1)).rename(clone / "other" / str(version))
                server.wait_for(lambda: client.statuses("other")[-1].version >= version, "a poll")  # noqa: B023
            assert served(client) == 1, "what is loaded stays"
        assert server.log_path.read_text().count("Could not find base path") == 1
