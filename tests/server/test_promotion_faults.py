"""Promotion when servers die, hang or restart, disks are full, and clocks jump."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta, timezone, tzinfo
from pathlib import Path

import pytest
from harness import ENGINE, IS_EMBEDDED, POLL_SECONDS
from promotion_models import (
    NAME,
    Load,
    add_version,
    block_of,
    flawless,
    fleet_of,
    labels_of,
    served,
    settings,
    start_server,
    write_config,
)

from spikeless import launch
from spikeless.client import Client
from spikeless.errors import FailedPrecondition, SpikelessError, Unavailable
from spikeless.repository import journal, models_config
from spikeless.rollout.fleet import FleetSettings
from spikeless.rollout.promotion import Outcome, PromotionError, promote, rollback


def at_line(text: str, action: Callable[[], object]) -> Callable[[str], None]:
    """A progress function that does something once, when a line contains ``text``."""
    done: list[str] = []

    def progress(line: str) -> None:
        if text in line and not done:
            done.append(line)
            action()

    return progress


def config_text(models: Path) -> str:
    return (models / "models.config").read_text()


def test_nothing_begins_while_a_server_does_not_answer(models: Path) -> None:
    with (
        start_server(models) as server,
        pytest.raises(Unavailable, match=r"no server answers at 127\.0\.0\.1:1"),
    ):
        promote(models, NAME, 2, fleet_of(server, "127.0.0.1:1", patience=8.0), settings())
    assert not (models / NAME / ".spikeless" / "journal.jsonl").exists()


def test_a_reload_that_would_unload_another_model_is_refused(models: Path) -> None:
    shutil.copytree(models / NAME, models / "other")
    block = block_of(models).replace(NAME, "other")
    models_config.edit(models, {"other": block})
    with start_server(models) as server:
        models_config.edit(models, {"other": None})
        with pytest.raises(
            FailedPrecondition, match=r"(?s)serves other, .* does not list it.*name: \"other\""
        ):
            promote(models, NAME, 2, fleet_of(server), settings())


def test_a_server_that_dies_takes_the_promotion_back(models: Path) -> None:
    before = config_text(models)
    with start_server(models) as dying, start_server(models) as other:
        kill = at_line("asking", lambda: os.kill(dying.pid, signal.SIGKILL))
        with flawless(other.target) as load:
            with pytest.raises(PromotionError, match="not everything could be put back") as caught:
                promote(models, NAME, 2, fleet_of(dying, other, patience=8.0), settings(), kill)
            assert dying.target in str(caught.value)
            assert config_text(models) == before
            with Client(other.target, timeout=60.0) as client:
                assert served(client) == served(client, label="stable") == 1
        assert load.factors == {1.0}
        with start_server(models, port=dying.port) as again, Client(again.target, timeout=60.0) as client:
            assert served(client) == 1, "what a restart serves is what was promoted"
            with flawless(other.target):
                assert promote(models, NAME, 2, fleet_of(again, other), settings()).result == "promoted"
            assert served(client, label="stable") == 2


def test_a_server_that_restarts_meanwhile_is_waited_for(models: Path) -> None:
    servers = [start_server(models)]

    def restart() -> None:
        port = servers[0].port
        servers[0].stop(grace=0.1)
        thread.start()
        assert port

    thread = threading.Thread(target=lambda: servers.append(start_server(models, port=servers[0].port)))
    try:
        progress = at_line("moving stable", restart)
        assert promote(models, NAME, 2, fleet_of(servers[0], patience=60.0), settings(), progress)
        thread.join()
        with Client(servers[-1].target) as client:
            assert served(client) == served(client, label="stable") == 2
    finally:
        for server in servers:
            server.stop()


def test_a_server_that_hangs_is_given_up(models: Path) -> None:
    before = config_text(models)
    with start_server(models) as hanging, start_server(models) as other, flawless(other.target):
        hang = at_line("moving stable", lambda: os.kill(hanging.pid, signal.SIGSTOP))
        try:
            with pytest.raises(PromotionError, match=rf"{hanging.target}: .*not answered for 8 s"):
                promote(models, NAME, 2, fleet_of(hanging, other, patience=8.0), settings(), hang)
        finally:
            os.kill(hanging.pid, signal.SIGCONT)
        assert config_text(models) == before
        # Whatever the server does with what it was told while it hung: the next command
        # brings it in line.
        assert rollback(models, NAME, fleet_of(hanging, other)).result == "undone"
        for server in (hanging, other):
            with Client(server.target, timeout=60.0) as client:
                assert served(client) == served(client, label="stable") == 1


def test_the_first_failure_in_a_fleet_stops_it_and_every_server_is_put_back(models: Path) -> None:
    """The version does not load where the second of three servers sees it."""
    with start_server(models) as first, start_server(models) as third:
        broken = models.parent / "elsewhere"
        shutil.copytree(models, broken)
        data = broken / NAME / "2" / "variables" / "variables.data-00000-of-00001"
        data.write_bytes(b"")
        flags = ("--max_num_load_retries=0", "--allow_version_labels_for_unavailable_models=true")
        # The base path in the configuration is the same for all; here it leads
        # elsewhere.
        engine = f"{sys.executable} -m spikeless serve" if IS_EMBEDDED else ENGINE
        inside = f"mount --bind {broken} {models} && exec {engine}"
        port = launch.free_port()
        command = f"{inside} --port={port} --model_config_file={models}/models.config {' '.join(flags)}"
        unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
        if subprocess.run([*unshare, f"mount --bind {broken} {models}"], capture_output=True).returncode:
            pytest.skip("a directory cannot be mounted elsewhere here")
        second = subprocess.Popen([*unshare, command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            target = f"127.0.0.1:{port}"
            with Client(target, timeout=60.0) as client:
                deadline = time.monotonic() + 60
                while not client_serves(client):
                    assert second.poll() is None
                    assert time.monotonic() < deadline
            said: list[str] = []
            loads = (flawless(first.target), flawless(target), flawless(third.target))
            with loads[0] as load, loads[1], loads[2], pytest.raises(PromotionError) as caught:
                promote(models, NAME, 2, fleet_of(first, target, third), settings(), said.append)
            message = str(caught.value)
            assert f"{target}: {NAME}-canary version 2 cannot be loaded" in message
            assert f"{first.target}: done in" in message
            assert f"{third.target}: left alone" in message
            assert message.endswith("everything is as it was")
            assert load.factors == {1.0}
            with Client(third.target, timeout=60.0) as client:
                assert client.statuses(NAME)[0].version == 1
        finally:
            second.kill()
            second.wait()


def client_serves(client: Client) -> bool:
    try:
        return served(client) == 1
    except Exception:
        time.sleep(0.05)
        return False


def test_a_fleet_takes_turns(models: Path) -> None:
    with start_server(models) as first, start_server(models) as second:
        said: list[str] = []
        fleet = FleetSettings([first.target, second.target], stagger=0.05, at_most=1, load_timeout=60.0)
        with flawless(first.target), flawless(second.target):
            promote(models, NAME, 2, fleet, settings(), said.append)
        turns = [line.split(":")[1] for line in said if "canary version 2: AVAILABLE" in line]
        assert turns == [str(first.port), str(second.port)]
        assert any("waits" in line and second.target in line for line in said)
        for server in (first, second):
            with Client(server.target, timeout=60.0) as client:
                assert served(client) == 2


def test_servers_that_poll_the_file_agree_with_what_they_are_told(models: Path) -> None:
    with start_server(models, f"--model_config_file_poll_wait_seconds={POLL_SECONDS}") as server:
        with flawless(server.target) as load:
            for version in (2, 1, 2, 1):
                promote(models, NAME, version, fleet_of(server), settings())
                with Client(server.target, timeout=60.0) as client:
                    assert served(client) == served(client, label="stable") == version
                load.sees(version)
        assert load.factors == {1.0, 2.0}


def test_two_promoters_of_one_model_take_turns_and_neither_is_lost(models: Path, scales: Path) -> None:
    add_version(scales / "3", models, 3, expected=3)
    with start_server(models) as server, flawless(server.target) as load:
        said: list[str] = []
        results: list[Outcome] = []

        def second() -> None:
            results.append(promote(models, NAME, 3, fleet_of(server), settings(), said.append))

        thread = threading.Thread(target=second)

        def start_and_wait() -> None:
            thread.start()
            wait_for(lambda: bool(said))

        meet = at_line("asking", start_and_wait)
        results.append(promote(models, NAME, 2, fleet_of(server), settings(), meet))
        thread.join()
        assert (
            said[0] == f"waiting for process {os.getpid()} on {os.uname().nodename}, which is changing {NAME}"
        )
        assert [(result.version, result.previous) for result in results] in (
            [(2, 1), (3, 2)],
            [(3, 2), (2, 1)],
        )
        with Client(server.target, timeout=60.0) as client:
            assert served(client) == 3
        load.sees(3.0)
    assert load.factors >= {1.0, 3.0}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_rollback_does_not_wait_for_a_promotion(models: Path) -> None:
    with start_server(models) as server:
        refusals = []

        def meanwhile() -> None:
            with pytest.raises(
                FailedPrecondition, match=rf"being changed by process {os.getpid()}"
            ) as caught:
                rollback(models, NAME, fleet_of(server))
            refusals.append(caught)

        promote(models, NAME, 2, fleet_of(server), settings(), at_line("asking", meanwhile))
        assert refusals


def test_promoters_of_two_models_do_not_lose_each_other(models: Path) -> None:
    shutil.copytree(models / NAME, models / "other")
    write_config(models, [1], 1)
    block = block_of(models).replace(NAME, "other")
    models_config.edit(models, {"other": block})
    with start_server(models) as server, flawless(server.target):
        errors = []

        def work(name: str) -> None:
            try:
                for version in (2, 1, 2):
                    promote(models, name, version, fleet_of(server), settings())
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(name,)) for name in (NAME, "other")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        config = models_config.read(models)
        assert config.names == [NAME, "other"]
        with Client(server.target, timeout=60.0) as client:
            for name in config.names:
                assert labels_of(models, name) == {"stable": 2}
                assert served(client, name) == served(client, name, label="stable") == 2


def test_a_full_disk_changes_nothing_that_counts(models: Path) -> None:
    """models.config and the journal on a file system without room, for real."""
    small = models.parent / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", small]).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        shutil.copytree(models, small / "models")
        models = small / "models"
        text = config_text(models).replace("/models/", "/small/models/", 1)
        (models / "models.config").write_text(text)
        with start_server(models) as server, Client(server.target, timeout=60.0) as client:
            filler = small / "filler"

            def fill() -> None:
                with filler.open("ab") as file, suppress(OSError):
                    while True:
                        os.write(file.fileno(), b"x" * 512)

            with flawless(server.target) as load:
                for moment in ("as scale-canary", "adding", "moving"):
                    with pytest.raises(PromotionError, match="No space left"):
                        promote(models, NAME, 2, fleet_of(server), settings(), at_line(moment, fill))
                    assert served(client) == served(client, label="stable") == 1
                    with pytest.raises(SpikelessError, match="No space left"):
                        promote(models, NAME, 2, fleet_of(server), settings())
                    assert served(client) == served(client, label="stable") == 1
                    filler.unlink()
                    assert promote(models, NAME, 2, fleet_of(server), settings()).result == "promoted"
                    assert rollback(models, NAME, fleet_of(server)).version == 1
                    assert config_text(models) == text
                assert promote(models, NAME, 2, fleet_of(server), settings()).result == "promoted"
                load.sees(2.0)

                # The servers go back even where the file cannot be written.
                fill_at = at_line("moving stable back", fill)
                with pytest.raises(PromotionError, match=r"(?s)No space left.*were rolled back all the same"):
                    rollback(models, NAME, fleet_of(server), progress=fill_at)
                assert served(client) == served(client, label="stable") == 1
                filler.unlink()
                assert rollback(models, NAME, fleet_of(server)).version == 1
                assert served(client) == 1
            assert load.factors == {1.0, 2.0}
    finally:
        subprocess.run(["umount", small], check=True)


def test_clocks_that_jump_do_no_harm(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the journal looks at the wall clock, and only to write it down."""
    jumps = iter([0, 400, -900, 3, -4000, 0] * 20)

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Jumping:
            moment = datetime.now(timezone.utc) + timedelta(days=next(jumps))
            return cls.fromtimestamp(moment.timestamp(), timezone.utc)

    monkeypatch.setattr(journal, "datetime", Jumping)
    with (
        start_server(models) as server,
        flawless(server.target),
        Client(server.target, timeout=60.0) as client,
    ):
        for _ in range(2):
            promote(models, NAME, 2, fleet_of(server), settings())
            assert rollback(models, NAME, fleet_of(server)).version == 1
            assert rollback(models, NAME, fleet_of(server)).version == 1
        assert served(client) == 1


def test_ctrl_c_and_sigterm_put_everything_back(models: Path) -> None:
    before = config_text(models)
    with start_server(models) as server, Load(server.target) as load:
        for number in (signal.SIGINT, signal.SIGTERM):
            command = [sys.executable, "-m", "spikeless", "promote", NAME, "2", "--soak=10m"]
            command += ["--max-p99-ratio=1e6"]  # Of a busy machine, latencies tell nothing.
            command += ["--models", str(models), "--servers", server.target]
            child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            assert child.stderr is not None
            lines = iter(child.stderr.readline, "")
            assert any("soaking" in line for line in lines)
            child.send_signal(number)
            rest = child.communicate(timeout=120)[1]
            assert child.returncode == 1, rest
            assert rest.endswith("spikeless: error: interrupted\neverything is as it was\n")
            assert config_text(models) == before
    assert not load.failures
    assert load.factors == {1.0}


def test_a_server_that_repeats_failed_loads_is_told_what_to_set(models: Path) -> None:
    """It takes no other configuration meanwhile, so nothing can be put back either."""
    (models / NAME / "2" / "variables" / "variables.data-00000-of-00001").write_bytes(b"")
    retries = ("--max_num_load_retries=5", "--load_retry_interval_micros=60000000")
    with start_server(models, *retries) as server:
        with pytest.raises(PromotionError) as caught:
            promote(models, NAME, 2, fleet_of(server, load_timeout=8.0), settings())
        told = str(caught.value)
        assert f"not done after 8 s ({NAME} 1: AVAILABLE, {NAME}-canary 2: LOADING)" in told
        assert "a server that repeats failed loads does not say that they fail" in told
        assert "start it with --max_num_load_retries=0" in told
        with Client(server.target, timeout=60.0) as client:
            assert served(client) == 1
