"""The server as the image starts and ends it: what breaks one model stops no other.

``docker/entrypoint`` runs outside a container here, with whichever engine is tested.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from entrypoint import container
from harness import ENGINE, IS_EMBEDDED, put_version, run_server, states
from places import ROOT
from promotion_models import fleet_of, model_of, settings

from spikeless import launch
from spikeless.disk import proc
from spikeless.formats.states import State
from spikeless.repository import models_config
from spikeless.repository.models_config import new_block, with_versions
from spikeless.rollout.promotion import promote
from spikeless.rollout.status import status

pytestmark = pytest.mark.skipif(ENGINE == launch.DOCKER, reason="it is in the image")


def put_half_a_version(models: Path, version: int) -> None:
    """What a copy by hand leaves when it is interrupted."""
    (models / str(version)).mkdir(parents=True)


def put_version_without_variables(saved_model: Path, models: Path, version: int) -> None:
    """What such a copy leaves when it got as far as the graph."""
    shutil.rmtree(put_version(saved_model, models, version) / "variables")


@pytest.fixture
def repository(scales: Path, tmp_path: Path) -> Path:
    """Models of which only ``whole`` is as it should be."""
    models = tmp_path / "models"
    put_version(scales / "1", models / "whole", 1)
    # The newest version is broken; the one before is not.
    put_version(scales / "1", models / "newest", 1)
    put_half_a_version(models / "newest", 2)
    # So it is, with a label on it.
    put_version(scales / "1", models / "labelled", 1)
    put_half_a_version(models / "labelled", 2)
    # There is nothing to go back to, or nothing at all.
    put_half_a_version(models / "broken", 1)
    (models / "empty").mkdir()
    blocks = {name: new_block(name, str(models / name)) for name in ("whole", "newest", "broken", "empty")}
    blocks["labelled"] = with_versions(new_block("labelled", str(models / "labelled")), [1, 2], {"stable": 2})
    models_config.edit(models, blocks)
    return models


def test_broken_versions_stop_neither_the_server_nor_other_models(repository: Path, scales: Path) -> None:
    with container(repository) as running:
        for name in ("whole", "newest", "labelled"):
            running.wait_states(name, v1=State.AVAILABLE)
            assert running.answers(name) == 1
        assert running.answers("labelled", label="stable") == 1
        # What is left out, the server's own states say, and the log.
        running.wait_states("newest", v1=State.AVAILABLE, v2=State.END)
        running.wait_states("labelled", v1=State.AVAILABLE, v2=State.END)
        running.wait_states("broken", v1=State.END)
        (failed,) = running.client.statuses("broken")
        assert "saved_model.pb" in str(failed.error) or ".pb" in str(failed.error)
        text = running.log.read_text()
        for line in ("newest", "labelled", "broken", "empty"):
            assert any(line in said and ("left out" in said or "instead" in said or "starts with" in said)
                       for said in text.splitlines()), text  # fmt: skip
        code, said = running.health()
        if IS_EMBEDDED:
            assert running.client.is_serving()
        assert (code, "whole newest" in said, "cannot be served: " in said) == (0, True, True), said

        # And what comes later is served.
        put_version(scales / "3", repository / "newest", 3)
        running.wait_states("newest", v3=State.AVAILABLE)
        put_version(scales / "2", repository / "empty", 1)
        running.wait_states("empty", v1=State.AVAILABLE)
        assert (running.answers("newest"), running.answers("empty")) == (3, 2)


def test_versions_without_their_variables_are_not_served(scales: Path, tmp_path: Path) -> None:
    """TensorFlow Serving would load them, and then fail every request."""
    models = tmp_path / "models"
    put_version(scales / "1", models / "whole", 1)
    for name in ("newest", "labelled"):
        put_version(scales / "1", models / name, 1)
        put_version_without_variables(scales / "2", models / name, 2)
    put_version_without_variables(scales / "2", models / "broken", 1)
    blocks = {name: new_block(name, str(models / name)) for name in ("whole", "newest", "broken")}
    blocks["labelled"] = with_versions(new_block("labelled", str(models / "labelled")), [1, 2], {"stable": 2})
    models_config.edit(models, blocks)
    with container(models) as running:
        for name in ("whole", "newest", "labelled"):
            running.wait_states(name, v1=State.AVAILABLE)
        index = models / "newest" / "2" / "variables" / "variables.index"
        running.wait_for(lambda: f"{index} is missing" in running.log.read_text(), "the cause in the log")
        # It stays so: the whole configuration is sent again and again meanwhile.
        running.wait_for(lambda: "newest" in running.health()[1], "health")
        for name in ("whole", "newest", "labelled"):
            assert running.answers(name) == 1
        assert running.answers("labelled", label="stable") == 1
        assert State.AVAILABLE not in states(running.client, "broken").values()
        for name, version in (("newest", 2), ("labelled", 2), ("broken", 1)):
            (report,) = status(models, name, ())
            assert any(
                line.startswith(f"version {version} is not whole: ") and "variables.index is missing" in line
                for line in report.disagreements
            ), report.disagreements
        # A version after it, or one that is whole after all, is served.
        put_version(scales / "3", models / "newest", 3)
        running.wait_states("newest", v3=State.AVAILABLE)
        assert running.answers("newest") == 3


def test_nothing_but_a_version_without_its_variables_is_nothing(scales: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    put_version_without_variables(scales / "1", models / "only", 1)
    with container(models) as running:
        assert running.process.wait(120) != 0
        assert "variables.index is missing" in running.log.read_text()


def test_a_label_is_on_what_answers_when_its_version_fails_late(scales: Path, tmp_path: Path) -> None:
    """TensorFlow Serving listens as soon as one version of each model is available."""
    models = tmp_path / "models"
    put_version(scales / "1", models / "late", 1)
    extra = put_version(scales / "2", models / "late", 2) / "assets.extra"
    extra.mkdir()
    (extra / "tf_serving_warmup_requests").write_bytes(b"no record " * 9)
    block = with_versions(new_block("late", str(models / "late")), [1, 2], {"stable": 2})
    models_config.edit(models, {"late": block})
    with container(models) as running:
        running.wait_for(lambda: running.answers("late", label="stable") == 1, "the version that loads")
        running.wait_states("late", v1=State.AVAILABLE, v2=State.END)
        assert running.answers("late", label="stable") == 1


def test_what_is_broken_keeps_no_model_from_being_promoted(repository: Path, scales: Path) -> None:
    """Not the others, and not itself; until then its states say what is missing."""
    with container(repository) as running:
        for name in ("whole", "newest", "labelled"):
            running.wait_states(name, v1=State.AVAILABLE)
        running.wait_states("labelled", v1=State.AVAILABLE, v2=State.END)
        fleet = fleet_of(f"127.0.0.1:{running.port}")
        said: list[str] = []
        put_version(scales / "2", repository / "whole", 2)
        promote(repository, "whole", 2, fleet, settings(), said.append)
        assert any(
            "label stable of labelled stays on version 1: version 2 is not av" in line for line in said
        )
        assert (running.answers("whole", label="stable"), running.answers("labelled", label="stable")) == (
            2,
            1,
        )
        (report,) = status(repository, "labelled", tuple(fleet.targets))
        assert any("should serve version 2 as labelled" in line for line in report.disagreements)
        assert any("takes it for version 1" in line for line in report.disagreements)

        put_version(scales / "3", repository / "labelled", 3)
        outcome = promote(repository, "labelled", 3, fleet, settings())
        assert (outcome.version, outcome.previous) == (3, 1)
        running.wait_for(lambda: running.answers("labelled", label="stable") == 3, "what was promoted")
        assert dict(model_of(repository, "labelled").version_labels) == {"stable": 3}
        (report,) = status(repository, "labelled", tuple(fleet.targets))
        assert report.disagreements == ()


def test_a_file_that_is_polled_changes_what_can_be_changed(repository: Path, scales: Path) -> None:
    with container(repository, "--model_config_file_poll_wait_seconds=1") as running:
        running.wait_states("labelled", v1=State.AVAILABLE, v2=State.END)
        put_version(scales / "2", repository / "more", 2)
        models_config.edit(repository, {"more": new_block("more", str(repository / "more"))})
        running.wait_states("more", v2=State.AVAILABLE)
        assert running.answers("labelled", label="stable") == 1


def test_the_embedded_engine_does_so_by_itself(embedded: None, repository: Path, tmp_path: Path) -> None:
    flags = (
        f"--model_config_file={repository / 'models.config'}",
        "--max_num_load_retries=0",
        "--file_system_poll_wait_seconds=1",
        "--allow_version_labels_for_unavailable_models=true",
    )
    with run_server(tmp_path / "server.log", *flags, wait_for=["whole", "newest", "labelled"]) as running:
        assert states(running.client, "newest") == {1: State.AVAILABLE, 2: State.END}
        assert states(running.client, "broken") == {1: State.END}
        assert states(running.client, "empty") == {}
        assert running.client.version_of("labelled", "stable") == 1
        log = running.server.log_path.read_text()
        assert "version 1 of newest is served instead: {name: newest version: 2} due to error" in log
        assert "broken is left out" in log


def test_one_model_without_a_configuration_file(repository: Path) -> None:
    with container(repository, MODEL_NAME="newest") as running:
        running.wait_states("newest", v1=State.AVAILABLE, v2=State.END)
        assert running.answers("newest") == 1


@pytest.mark.parametrize("precision", ["bfloat16", "float8"])
def test_the_precision_reaches_the_server(scales: Path, tmp_path: Path, precision: str) -> None:
    """In the platform configuration; TensorFlow Serving says which it does not know."""
    models = tmp_path / "models"
    put_version(scales / "1", models / "whole", 1)
    with container(models, f"--mixed_precision={precision}", MODEL_NAME="whole") as running:
        running.wait_states("whole", v1=State.AVAILABLE)
        assert running.answers("whole") == 1
        refused = "precision is not supported" in running.log.read_text()
        assert refused == (precision == "float8" and not IS_EMBEDDED)


def test_a_server_with_nothing_to_serve_ends_with_the_reason(tmp_path: Path) -> None:
    put_half_a_version(tmp_path / "models" / "broken", 1)
    with container(tmp_path / "models") as running:
        assert running.process.wait(120) not in (0, None)
        assert "did not become available" in running.log.read_text()


@pytest.mark.parametrize("flags", [("--no_such_flag=1",), ("--port", "9000"), ("bash",)])
def test_flags_that_the_server_has_not_are_refused(tmp_path: Path, flags: tuple[str, ...]) -> None:
    with container(tmp_path / "models", *flags) as running:
        assert running.process.wait(120) == 1
        assert "entrypoint: error: " in running.log.read_text()


def test_it_drains_until_a_second_signal(scales: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    put_version(scales / "1", models / "whole", 1)
    with container(models, DRAIN="600") as running:
        running.wait_states("whole", v1=State.AVAILABLE)
        running.wait_for(lambda: running.health()[0] == 0, "the health check to pass")
        running.process.terminate()
        running.wait_for(lambda: running.health()[0] == 1, "the health check to fail")
        assert running.answers("whole") == 1, "it still answers"
        assert "about to end" in running.health()[1]
        if IS_EMBEDDED:
            assert not running.client.is_serving()
        running.process.terminate()
        assert running.process.wait(120) == 0


def test_a_server_that_was_stopped_is_killed(scales: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    put_version(scales / "1", models / "whole", 1)
    with container(models) as running:
        running.wait_states("whole", v1=State.AVAILABLE)
        assert proc.server_of(running.process.pid) == running.server_pid(), "what bench and exporter watch"
        os.kill(running.server_pid(), signal.SIGSTOP)
        assert running.process.wait(120) == 128 + signal.SIGKILL
        assert "the server is stopped (SIGSTOP): killing it" in running.log.read_text()


@pytest.mark.skipif(
    shutil.which("unshare") is None or os.geteuid() != 0, reason="a process namespace of its own takes root"
)
def test_as_the_first_process_it_leaves_no_zombies(scales: Path, tmp_path: Path) -> None:
    """What a health check leaves that timed out: a process without a parent."""
    models = tmp_path / "models"
    put_version(scales / "1", models / "whole", 1)
    orphan = tmp_path / "orphan"
    script = tmp_path / "orphans"
    script.write_text(
        "#!/bin/bash\n"
        f"(until [[ -e {tmp_path}/go ]]; do sleep 0.1; done; bash -c 'sleep 0.1 & echo $! > {orphan}') &\n"
        f"exec {ROOT}/docker/entrypoint \"$@\"\n"
    )  # fmt: skip
    script.chmod(0o755)
    environment = {"SPIKELESS_ALLOCATOR": "glibc"}
    with container(models, **environment) as template:
        command = ["unshare", "--pid", "--fork", "--mount-proc", str(script), *template.process.args[1:]]  # type: ignore[index]
        template.process.terminate()
        template.process.wait(120)
        process = subprocess.Popen(
            command, env=template.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            template.process = process
            template.wait_states("whole", v1=State.AVAILABLE)
            (tmp_path / "go").touch()
            template.wait_for(orphan.exists, "the orphan")
            namespace = next(
                int(pid)
                for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            )

            def zombies() -> list[str]:
                return [
                    path.parent.name
                    for path in Path("/proc").glob("[0-9]*/stat")
                    if _parent_and_state(path) == (str(namespace), "Z")
                ]

            template.wait_for(lambda: not zombies(), "the orphan to be reaped")
            os.kill(namespace, signal.SIGTERM)
            assert process.wait(120) == 0
        finally:
            process.kill()
            process.wait()


def _parent_and_state(stat: Path) -> tuple[str, str]:
    try:
        state, parent = stat.read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "", ""
    return parent, state
