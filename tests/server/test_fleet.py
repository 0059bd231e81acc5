"""Push and pull through real stores: S3, HTTP, SFTP, over networks that fail.

The S3 server is SeaweedFS (`stores`); the network is a proxy on loopback.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import ServerFactory, model_config
from stores import ACCESS_KEY, S3, SECRET_KEY, Network, http_server, s3_server, sftp_server

from spikeless.client import Client
from spikeless.errors import AlreadyExists, DataLoss, FailedPrecondition, SpikelessError, Unavailable
from spikeless.formats.states import State
from spikeless.launch import free_port
from spikeless.mapping import read_manifest
from spikeless.repository.journal import Journal, outcomes
from spikeless.rollout.fleet import FleetSettings
from spikeless.store.follow import FollowSettings, StoreFollower
from spikeless.store.objects import Store
from spikeless.store.promotions import promote, rollback
from spikeless.store.pull import PullSettings, pull
from spikeless.store.push import push
from spikeless.store.settings import StoreSettings

NAME = "ctr"
#: Gives up soon. With two pieces of 8 MiB on their way, one is through after 20 MiB.
HASTY = StoreSettings(workers=2, timeout=3.0, attempts=2)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def store(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of one's own on the S3 server; the libraries find their credentials."""
    use(monkeypatch, s3.environment())
    return f"{s3.url}/{tmp_path.name}"


def use(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)


def same(version: Path, source: Path) -> None:
    """All files are equal but for the paths in the graph."""
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    assert sorted(files) == sorted(path.relative_to(version) for path in version.rglob("*") if path.is_file())
    for file in files:
        if file.name != "saved_model.pb":
            assert (version / file).read_bytes() == (source / file).read_bytes(), file


def test_s3_keeps_to_the_bars(s3: S3, store: str, trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """All bytes of the connections count: headers, signatures, manifests."""
    models = tmp_path / "pulled"
    shares = []
    for number in (1, 2, 3):
        source = trained / NAME / str(number)
        with Network(s3.port) as network:
            use(monkeypatch, s3.environment(network.port))
            pushed = push(source, store)
            sent, network.sent, network.received = network.sent, 0, 0
            (pulled,) = pull(store, models)
            assert network.received > pulled.fetched
            shares.append((sent / pushed.bytes, (network.received + network.sent) / pulled.bytes))
        same(models / NAME / str(number), source)
    assert all(share <= 0.03 for share in shares[1]), shares
    assert all(share < 0.01 for share in shares[2]), shares


def test_s3_refuses_wrong_credentials_and_names_none(
    store: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    for act in (lambda: pull(store, tmp_path / "pulled", NAME), lambda: push(trained / NAME / "1", store)):
        with pytest.raises(FailedPrecondition, match="check the credentials and rights") as caught:
            act()
        assert not any(secret in str(caught.value) for secret in (ACCESS_KEY, SECRET_KEY, "another-secret"))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FailedPrecondition, match=r"(?i)credentials"):
        pull(store, tmp_path / "pulled", NAME)


def test_s3_writes_where_nothing_is_for_one_of_many(store: str) -> None:
    opened = Store(store)
    outcomes: list[str] = []

    def create(number: int) -> None:
        try:
            opened.create("ctr/versions/1.json", b"%d" % number)
            outcomes.append("created")
        except AlreadyExists:
            outcomes.append("there already")

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["created", *["there already"] * 7]


@pytest.mark.parametrize("fault", ["drop", "delay", "truncate", "corrupt"])
@pytest.mark.parametrize("kind", ["s3", "http"])
def test_a_network_that_fails_for_a_while(
    kind: str,
    fault: str,
    s3: S3,
    store: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was fetched before is used; nothing shows in between."""
    models = tmp_path / "pulled"
    hasty = PullSettings(store=HASTY)
    folder = tmp_path / "folder"
    push(trained / NAME / "1", store if kind == "s3" else str(folder))
    served = http_server(folder, tmp_path) if kind == "http" else None
    url = served.__enter__() if served is not None else ""
    try:
        port = int(url.rpartition(":")[2]) if url else s3.port
        with Network(port) as network:
            use(monkeypatch, s3.environment(network.port))
            where = store if kind == "s3" else f"http://127.0.0.1:{network.port}"
            network.fail_after(20 << 20, fault)
            with pytest.raises(SpikelessError) as caught:
                pull(where, models, NAME, settings=hasty)
            assert isinstance(caught.value, (Unavailable, DataLoss)), caught.value
            assert where in str(caught.value)
            assert not (models / NAME / "1").exists()
            network.fault, network.received = "", 0
            (pulled,) = pull(where, models, NAME)
            assert pulled.fetched < 0.9 * pulled.bytes
            same(models / NAME / "1", trained / NAME / "1")
    finally:
        if served is not None:
            served.__exit__(None, None, None)


def test_a_push_over_a_network_that_fails_goes_on(
    s3: S3, store: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Network(s3.port) as network:
        use(monkeypatch, s3.environment(network.port))
        network.fail_after(20 << 20, "drop")
        with pytest.raises(Unavailable, match=r"cannot (write|look for)"):
            push(trained / NAME / "1", store, settings=HASTY)
        network.fault = ""
        with pytest.raises(SpikelessError, match="has no version"):
            pull(store, tmp_path / "pulled", NAME)
        pushed = push(trained / NAME / "1", store)
        assert pushed.sent < 0.9 * pushed.bytes
    pull(store, tmp_path / "pulled", NAME)
    same(tmp_path / "pulled" / NAME / "1", trained / NAME / "1")


def test_killed_and_at_once_over_s3(store: str, trained: Path, tmp_path: Path) -> None:
    """Killed by SIGKILL again and again, from later on each time, then two at once."""
    models = tmp_path / "pulled"

    def run(*command: str, kill_after: float | None = None) -> int:
        child = subprocess.Popen([sys.executable, "-m", "spikeless", *command], stdout=subprocess.DEVNULL)
        try:
            child.wait(timeout=kill_after)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
        return child.returncode

    source = str(trained / NAME / "1")
    for command in (["push", source, store], ["pull", store, NAME, "--models", str(models)]):
        for attempt in range(12):
            if run(*command, kill_after=1.5**attempt) == 0:
                break
            if (models / NAME / "1").exists():  # killed after the rename, before its end
                same(models / NAME / "1", trained / NAME / "1")
        else:
            pytest.fail("it never comes through")
    same(models / NAME / "1", trained / NAME / "1")
    push(trained / NAME / "2", store)
    threads = [
        threading.Thread(target=run, args=("pull", store, NAME, "--models", str(models))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(models / NAME / "2", trained / NAME / "2")


def test_http_is_for_pulling(trained: Path, tmp_path: Path) -> None:
    folder, models = tmp_path / "folder", tmp_path / "pulled"
    for number in "12":
        push(trained / NAME / number, str(folder))
    with http_server(folder, tmp_path) as url:
        (first,) = pull(url, models, NAME, version=1)
        (pulled,) = pull(url, models)  # nginx lists the models
        assert (first.version, pulled.version) == (1, 2)
        assert pulled.fetched <= 0.03 * pulled.bytes
        same(models / NAME / "2", trained / NAME / "2")
        with pytest.raises(FailedPrecondition, match="can be pulled from only"):
            push(trained / NAME / "3", url)
    log = (tmp_path / "access.log").read_text()
    assert '" 206 ' in log  # ranges
    with pytest.raises(Unavailable, match=f"cannot read {url}/models.config"):
        pull(url, models, NAME, settings=PullSettings(store=HASTY))


def test_sftp(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "pulled"
    with sftp_server(tmp_path) as (root, environment):
        use(monkeypatch, environment)
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        url = f"{root}{tmp_path}/folder"
        for number in "12":
            push(trained / NAME / number, url)
            (pulled,) = pull(url, models)
            same(models / NAME / number, trained / NAME / number)
        assert pulled.fetched <= 0.03 * pulled.bytes
        assert push(trained / NAME / "2", url).already
        # A host that nobody knows is asked for nothing.
        (Path(environment["HOME"]) / ".ssh" / "known_hosts").write_text("")
        with pytest.raises(FailedPrecondition, match=r"known_hosts: see ssh-keyscan"):
            pull(url, models)


def test_a_server_swaps_what_is_pulled_under_requests(
    store: str, trained: Path, tmp_path: Path, serve: ServerFactory
) -> None:
    """No request fails, and the answers are those of the version that was pushed."""
    models = tmp_path / "pulled"
    push(trained / NAME / "1", store)
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "spikeless",
        "pull",
        store,
        NAME,
        "--models",
        str(models),
        "--follow",
        "--json",
    ]
    command += ["--poll=200ms", "--keep=2", f"--metrics-port={port}"]
    follower = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert follower.stdout is not None
        assert json.loads(follower.stdout.readline())["version"] == 1
        ids = np.arange(0, 1 << 18, 997, dtype=np.int32)
        config = tmp_path / "models.config"
        config.write_text(str(model_config((NAME, models / NAME))))
        with serve(f"--model_config_file={config}", "--file_system_poll_wait_seconds=1") as running:
            running.wait(NAME, {1: State.AVAILABLE})
            failures: list[SpikelessError] = []
            calls = 0
            stop = threading.Event()

            def call() -> None:
                nonlocal calls
                while not stop.is_set():
                    try:
                        ask(running, ids[:8])
                        calls += 1
                    except SpikelessError as error:
                        failures.append(error)

            caller = threading.Thread(target=call)
            caller.start()
            for number in (2, 3):
                push(trained / NAME / str(number), store)
                assert json.loads(follower.stdout.readline())["version"] == number
                running.wait(NAME, {number: State.AVAILABLE})
                source = trained / NAME / str(number)
                with serve_one(serve, source, tmp_path / f"original-{number}") as origin:
                    origin.wait(NAME, {number: State.AVAILABLE})
                    assert ask(running, ids).tobytes() == ask(origin, ids).tobytes()
            stop.set()
            caller.join()
            assert not failures
            assert calls > 20
        (mapped,) = read_manifest(models / NAME / "3").mapped_files()
        assert os.path.samefile(models / NAME / "2" / mapped.path, models / NAME / "3" / mapped.path)
        assert not (models / NAME / "1").exists()  # --keep
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            metrics = answer.read().decode()
        assert f'spikeless_pull_version{{model_name="{NAME}"}} 3.0' in metrics
        assert f'spikeless_pull_versions_behind{{model_name="{NAME}"}} 0.0' in metrics
    finally:
        follower.terminate()
        _, errors = follower.communicate(timeout=60)
    assert follower.returncode == 0, errors
    assert SECRET_KEY not in errors


def test_a_machine_serves_what_is_promoted_in_the_store(
    store: str, trained: Path, tmp_path: Path, serve: ServerFactory
) -> None:
    """Callers of the label get it in place, and a server that comes up serves it."""
    models = tmp_path / "pulled"
    for number in (1, 2):
        push(trained / NAME / str(number), store)
    promote(store, NAME, 1)
    assert [pulled.version for pulled in pull(store, models)] == [1, 2]
    flags = (f"--model_config_file={models / 'models.config'}", "--file_system_poll_wait_seconds=1")
    labels = "--allow_version_labels_for_unavailable_models=true"
    ids = np.arange(64, dtype=np.int32)
    with serve(*flags, labels) as running:
        running.wait(NAME, {1: State.AVAILABLE})
        settings = PullSettings(servers=FleetSettings((running.server.target,)))
        follower = StoreFollower(store, models, NAME, FollowSettings(pull=settings))
        answers: list[bytes] = []
        stop = threading.Event()

        def call() -> None:
            while not stop.is_set():
                answers.append(ask(running, ids, "stable").tobytes())

        with ThreadPoolExecutor() as pool:
            calling = pool.submit(call)

            def answered(answer: bytes) -> bool:
                return answer in answers or calling.done()

            try:
                first = ask(running, ids).tobytes()
                running.server.wait_for(lambda: answered(first), "answers of version 1", timeout=60.0)
                follower.look()
                promote(store, NAME, 2)
                follower.look()
                running.wait(NAME, {2: State.AVAILABLE})
                second = ask(running, ids).tobytes()
                assert (
                    running.client.predict(NAME, {"ids": ids}, label="stable")["scores"].tobytes() == second
                )
                running.server.wait_for(lambda: answered(second), "answers of version 2", timeout=60.0)
            finally:
                stop.set()
            calling.result()
        assert {*answers} == {first, second}
        assert first != second
        results = [each for _, each in outcomes(Journal(models, NAME).entries())]
        assert results == ["promoted", "promoted"]
        rollback(store, NAME)
        follower.look()
        running.wait(NAME, {1: State.AVAILABLE})
        assert ask(running, ids).tobytes() == first
    with serve(*flags, labels) as running:
        running.wait(NAME, {1: State.AVAILABLE})


def serve_one(serve: ServerFactory, version: Path, models: Path) -> Any:
    """A server of the version that was pushed, where it was."""
    models.mkdir()
    (models / NAME).symlink_to(version.parent)
    config = model_config((NAME, models / NAME))
    policy = config.model_config_list.config[0].model_version_policy
    policy.specific.versions.append(int(version.name))
    (models / "models.config").write_text(str(config))
    return serve(f"--model_config_file={models / 'models.config'}")


def ask(running: Any, ids: np.ndarray[Any, Any], label: str = "") -> np.ndarray[Any, Any]:
    client: Client = running.client
    return client.predict(NAME, {"ids": ids}, label=label)["scores"]
