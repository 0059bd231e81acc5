"""The load generator on real servers: in a thread, in Locust, and as a command."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from bench_runs import MACHINE, made_up_run, publish_boston, write_requests
from click.testing import CliRunner
from harness import IS_EMBEDDED
from places import ROOT, SUPPORT
from trained_models import spikeless

from spikeless import __version__, bench, launch
from spikeless.bench import machine
from spikeless.bench.load.generator_floor import instant_server
from spikeless.bench.replayed import read_requests
from spikeless.cli import cli
from spikeless.disk import proc
from spikeless.errors import Code, FailedPrecondition
from spikeless.openloop.loop import OpenLoop
from spikeless.openloop.schedule import Schedule
from spikeless.repository import layout, models_config, publishing

STAND_IN = SUPPORT / "stand_in.py"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models" / "boston" / "1").mkdir(parents=True)
    return tmp_path / "models"


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    return write_requests(tmp_path / "requests", 1, 8, 32)


def stand_in(models: Path, *flags: str, port: int | None = None) -> launch.ServerProcess:
    engine = models / "model_server"
    engine.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "$@"\n')
    engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
    return launch.start(
        launch.LaunchSettings("boston", models / "boston", engine=str(engine), flags=flags, port=port)
    )


@pytest.fixture
def server(models: Path) -> Iterator[launch.ServerProcess]:
    with stand_in(models) as server:
        yield server


def drive(requests: Path, target: str, rate: float, seconds: float, name: str = "boston") -> OpenLoop:
    load = OpenLoop(Schedule(rate, seconds).offsets(), read_requests(requests, name), target, timeout=30)
    load.run(time.monotonic())
    return load


def test_every_request_is_answered_and_recorded(server: launch.ServerProcess, requests: Path) -> None:
    columns = drive(requests, server.target, 200, 1).columns.ended()
    assert len(columns["intended"]) == len(Schedule(200, 1).offsets())
    assert set(columns["code"]) == {Code.OK}
    assert set(columns["version"]) == {1}
    assert (columns["lag"] >= 0).all()
    assert (columns["latency"] >= columns["lag"]).all()
    assert np.array_equal(columns["request"], np.arange(len(columns["request"])) % 3)


def test_statuses_are_those_of_the_server(server: launch.ServerProcess, requests: Path) -> None:
    columns = drive(requests, server.target, 50, 0.2, name="nobody").columns.ended()
    assert len(columns["code"])
    assert set(columns["code"]) == {Code.NOT_FOUND}
    assert set(columns["version"]) == {0}


def test_requests_larger_than_the_flow_control_window(server: launch.ServerProcess, tmp_path: Path) -> None:
    large = write_requests(tmp_path / "large", 60_000)  # 960 kB each; a window begins with 64 kB.
    columns = drive(large, server.target, 40, 0.5).columns.ended()
    assert len(columns["code"])
    assert set(columns["code"]) == {Code.OK}


def test_a_stall_shows_in_every_request_that_was_due(models: Path, requests: Path) -> None:
    with stand_in(models, "--stall=0.5,0.4") as server:
        columns = drive(requests, server.target, 200, 1.2).columns.ended()
    # About 80 requests are due while the server stalls; the first waits 400 ms, and so
    # on down to nothing.
    latency = columns["latency"]
    assert latency.max() >= 0.35
    assert np.count_nonzero(latency > 0.1) >= 40
    assert columns["lag"].min() >= 0


def test_a_server_that_dies_and_returns(models: Path, requests: Path) -> None:
    server = stand_in(models)
    load = OpenLoop(Schedule(100, 120).offsets(), read_requests(requests, "boston"), server.target, 30)

    def wait_until(condition: Callable[[], bool]) -> None:
        server.wait_for(condition, "the load to go on", 60)

    thread = threading.Thread(target=load.run, args=(time.monotonic(),))
    thread.start()
    codes = load.columns.code
    try:
        wait_until(lambda: bool(np.count_nonzero(codes == Code.OK) > 10))
        port = server.port
        server.stop(grace=0)
        while not np.count_nonzero(codes == Code.UNAVAILABLE) > 10:
            thread.join(0.01)
        answered = np.count_nonzero(codes == Code.OK)
        server = stand_in(models, port=port)
        wait_until(lambda: np.count_nonzero(codes == Code.OK) > answered + 10)
    finally:
        load.stop()
        thread.join()
        server.stop()
    assert set(load.columns.ended()["code"]) <= {Code.OK, Code.UNAVAILABLE, Code.CANCELLED}


def locust(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the benchmark's locustfile to its end."""
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        "benchmarks/locustfile.py",
        "--headless",
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_locust_by_itself_and_with_workers(
    server: launch.ServerProcess, requests: Path, tmp_path: Path
) -> None:
    port = launch.free_port()
    common = ("--host", server.target, "--requests", requests, "--rate", 100, "--seconds", 2)
    ports = ("--master-bind-port", port, "--master-port", port)
    alone = locust(*common, "--record", tmp_path / "alone.npz")
    assert alone.returncode == 0, alone.stderr
    assert "Predict" in alone.stderr, "Locust's own statistics have the requests"
    files = ("--record", tmp_path / "shared.npz", "--request-log", tmp_path / "shared.csv")
    workers = locust(*common, *ports, "--processes", 2, *files)
    assert workers.returncode == 0, workers.stderr

    done = spikeless("bench", "merge", tmp_path / "merged.npz", *sorted(tmp_path.glob("shared.worker-*.npz")))
    assert done.returncode == 0, done.stderr
    one, two = bench.read_run(tmp_path / "alone.npz"), bench.read_run(tmp_path / "merged.npz")
    planned = Schedule(100, 2).offsets()
    for run in (one, two):
        assert np.array_equal(run.requests["intended"], planned)
        assert np.array_equal(run.requests["request"], np.arange(len(planned)) % 3)
        assert set(run.requests["code"]) == {Code.OK}
    logs = [
        list(csv.DictReader(path.read_text().splitlines()))
        for path in sorted(tmp_path.glob("shared.worker-*.csv"))
    ]
    assert len(logs) == 2
    times = sorted(float(row["timestamp"]) for log in logs for row in log)
    np.testing.assert_allclose(np.diff(times), np.diff(planned), atol=1e-5)
    assert {row["exception"] for log in logs for row in log} == {""}
    assert locust(*common, "--record", tmp_path / "alone.npz").returncode == 0
    assert len(list(tmp_path.glob("alone*.npz"))) == 2, "an earlier result is never overwritten"
    again = spikeless("bench", "merge", tmp_path / "merged.npz", tmp_path / "alone.npz")
    assert again.returncode == 1
    assert "is there already" in again.stderr


def test_locust_says_what_is_wrong(requests: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((), "no server to load: give --host HOST:PORT"),
        (("--host", "127.0.0.1:1"), "no requests to send: give --requests FILE"),
        (("--host", "http://127.0.0.1:1", "--requests", requests), "is no address"),
        (("--host", "127.0.0.1:1", "--requests", tmp_path / "nowhere"), "cannot be read"),
        (("--host", "127.0.0.1:1", "--requests", requests, "--rate", 0), "must be positive"),
    ):
        done = locust(*arguments)
        assert done.returncode != 0
        assert "spikeless: error: " in done.stderr
        assert message in done.stderr


def test_the_locustfile_explains_its_options() -> None:
    """Which ``locust --help`` does not: it ends before it reads the file."""
    command = [sys.executable, "benchmarks/locustfile.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    for option in ("--requests FILE", "--rate RATE", "--record FILE", "--headless", "--web-host"):
        assert option in done.stdout


def test_the_web_page_of_locust_is_for_this_machine_only(
    server: launch.ServerProcess, requests: Path
) -> None:
    command = [sys.executable, "-m", "locust", "-f", "benchmarks/locustfile.py", "--host", server.target]
    command += ["--requests", str(requests), "--web-port", str(launch.free_port())]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    with process:
        assert process.stderr is not None
        line = next((line for line in process.stderr if "web interface at" in line), "none")
        process.terminate()
        process.stderr.read()
    assert "http://127.0.0.1:" in line


def test_an_interrupted_run_keeps_what_it_has(
    server: launch.ServerProcess, requests: Path, tmp_path: Path
) -> None:
    record = tmp_path / "part.npz"
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        "benchmarks/locustfile.py",
        "--headless",
        "--only-summary",
    ]
    command += ["--host", server.target, "--requests", str(requests), "--rate", "100", "--seconds", "300"]
    process = subprocess.Popen(
        [*command, "--record", str(record)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if '"sent"' in line and json.loads(line.partition(" ")[2])["sent"] > 50:
                break
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    run = bench.read_run(record)
    assert 50 < len(run.requests["code"]) < 30_000
    assert set(run.requests["code"]) <= {Code.OK, Code.CANCELLED}


def test_publishing_that_fails_ends_the_run(server: launch.ServerProcess, requests: Path) -> None:
    def publish() -> None:
        raise OSError("disk full")

    settings = bench.Settings("boston", str(requests), rate=50, seconds=60, publish_at=0.5, warm_seconds=0)
    with pytest.raises(FailedPrecondition, match="publishing failed: disk full"):
        bench.run("broken", settings, bench.server_facts(server), publish)


def test_versions_are_staged_beforehand_and_take_turns(saved_models: Path, tmp_path: Path) -> None:
    sources = [tmp_path / "a", tmp_path / "b"]
    for source in sources:
        shutil.copytree(saved_models / "signatures", source)
    models = tmp_path / "models"
    with bench.staged(sources, models, "boston", 4, link=True) as publish:
        assert layout.versions(models, "boston") == {}
        assert [publish().name for _ in range(3)] == ["1", "2", "3"]
    graphs = [version / "saved_model.pb" for version in layout.versions(models, "boston").values()]
    assert len(graphs) == 3, "what was not published is gone"
    assert graphs[0].samefile(graphs[2])
    assert graphs[0].samefile(sources[0] / "saved_model.pb")
    assert graphs[1].samefile(sources[1] / "saved_model.pb")


def test_the_instant_server_answers_a_burst(requests: Path) -> None:
    """As a generator sends one that got no processor for a second."""
    with instant_server() as target:
        load = OpenLoop(np.zeros(500), read_requests(requests, "boston"), target, 60.0)
        load.run(time.monotonic())
    assert set(load.columns.ended()["code"]) == {Code.OK}


def test_the_instant_server_ends_with_its_block(requests: Path) -> None:
    with instant_server() as target:
        columns = drive(requests, target, 100, 0.5).columns.ended()
        assert set(columns["code"]) == {Code.OK}
    after = drive(requests, target, 100, 0.2).columns.ended()
    assert set(after["code"]) == {Code.UNAVAILABLE}


def test_swaps_measured_end_to_end(saved_models: Path, tmp_path: Path) -> None:
    """The command starts the engine, publishes three times, and writes a raw result."""
    models, source = publish_boston(saved_models / "signatures", tmp_path), tmp_path / "source"

    load: tuple[str | int, ...] = ("--rate", 100, "--duration", "23s", "--settle", "1s", "--timeout", "60s")
    load += ("--publishes", 3, "--publish-at", 3, "--publish-every", 5)
    place = ("--models", models, "--out", tmp_path / "raw")
    options = (*load, *place, "--publish", source, "--scenario", "warm", "--no-floor", "--json")
    done = spikeless("bench", "run", "boston", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    for happened in ("publish v2", "v2 AVAILABLE", "v1 END", "publish v4", "v4 AVAILABLE"):
        assert len([line for line in lines if line.endswith(f" s {happened}")]) == 1, happened
    assert any(re.search(r"/23 s, [\d,]+ sent, \d+/s, p99 .* private, v1 AVAILABLE", line) for line in lines)
    assert "\x1b" not in done.stderr
    answer = json.loads(done.stdout)
    assert answer["codes"] == {"OK": len(Schedule(100, 23).offsets())}
    assert len(answer["reloads"]) == 3
    assert (answer["reloads"][0]["old_version"], answer["reloads"][0]["new_version"]) == (1, 2)
    assert {"1", "2"} <= set(answer["served"]) <= {"1", "2", "3", "4"}
    run = bench.read_run(answer["result"])
    assert run.facts.server.engine in ("embedded", "tensorflow_model_server", "docker")
    assert run.facts.server.allocator == "glibc"
    assert [publish.result for publish in run.facts.publishes] == [f"models/boston/{n}" for n in (2, 3, 4)]
    assert str(tmp_path) not in repr(run.facts), "a result tells where it was made from the working directory"
    versions = [models / "boston" / str(version) for version in (2, 3, 4)]
    for publish, planned in zip(run.facts.publishes, (3, 8, 13), strict=True):
        assert publish.begin >= planned
    variables = [version / "variables" / "variables.data-00000-of-00001" for version in versions]
    assert len({file.stat().st_ino for file in variables}) == 1, "further versions take no space"
    assert not variables[0].samefile(source / "variables" / variables[0].name)
    assert {(change.version, change.state) for change in run.facts.states} >= {
        (1, "AVAILABLE"),
        (2, "AVAILABLE"),
        (1, "END"),
    }
    assert run.samples["rss_anon"].min() > 0

    report = spikeless("report", tmp_path / "raw", "--out", tmp_path / "report")
    assert report.returncode == 0, report.stderr
    assert "first request on the new version" in report.stdout
    assert "SLO " in report.stdout.splitlines()[-2], "the verdict comes last, before the place of the page"
    assert "Swapping boston 3 times" in (tmp_path / "report" / "index.html").read_text()


@pytest.fixture(scope="module")
def published(saved_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with version 1 of boston, which carries requests."""
    return publish_boston(saved_models / "signatures", tmp_path_factory.mktemp("published"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rate 0", "'--rate': 0.0 is not in the range x>0"),
        ("--duration -1", "'--duration': '-1' is no duration"),
        ("--duration nan", "'--duration': 'nan' is no duration"),
        ("--timeout 0", "'--timeout'"),
        ("--processes 0", "'--processes': 0 is not in the range x>=1"),
        ("--settle -1", "'--settle'"),
        ("--batch-sizes 1", "'1' is no distribution of batch sizes: say 1:70,8:20,32:10"),
        ("--batch-sizes 5:1", "no request has batch size 5, only 1, 8"),
        ("--load 70", "'70' is no share of a load: say 70%"),
        ("--slo-latency 0", "'--slo-latency'"),
        ("--duration 2s", "of 2 s of load the first 3 s do not count; make the load longer"),
        ("--publish nosuch", "'--publish': Directory 'nosuch' does not exist"),
        ("--publish models", "models is no SavedModel: it has no saved_model.pb"),
        ("--publish source --publishes 0", "'--publishes': 0 is not in the range x>=1"),
        ("--publish source --publish-at 2", "publishing begins at 2 s; make the load longer"),
        (
            "--publish source --publish-at 20 --publish-every 6 --publishes 3",
            "published at 32 s, but the load",
        ),
        ("--publish-command /nowhere/publish", "there is no such program"),
        ("--publish-command ''", "there is no such program"),
        ("--publish source --publish-command true", "exclude each other"),
        ("--publish-at 3", "need --publish or --publish-command"),
        ("--publish-every 3", "need --publish or --publish-command"),
        ("--publishes 3", "need --publish or --publish-command"),
        ("--publish-model other", "need --publish or --publish-command"),
        ("--publish source --publish-model other", "models has no version of other"),
        ("--requests nosuch", "nosuch cannot be read"),
        ("--models nosuch", "no version of boston"),
        ("--models nosuch --requests requests", "nosuch has no version of boston"),
        ("--pid 1", "--pid is for --server"),
        ("--server 127.0.0.1:1 --server-flag=--x", "--allocator and --server-flag are for a server that is"),
        ("--server 127.0.0.1:1", "no server answers at 127.0.0.1:1"),
        pytest.param(
            "--server-flag=--grpc_max_threads=none",
            "--grpc_max_threads",
            marks=pytest.mark.skipif(not IS_EMBEDDED, reason="only the embedded engine's flags are known"),
        ),
        ("--out requests", "requests is no directory: give one with --out"),
    ],
)
def test_every_option_is_checked_before_anything_is_done(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, message: str
) -> None:
    for link in ("models", "source"):
        (tmp_path / link).symlink_to(published.parent / link)
    write_requests(tmp_path / "requests", 1)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(cli, ["bench", "run", "boston", *shlex.split(options)])
    assert result.exit_code != 0
    said = f"{result.output}{result.exception}"
    assert message in said
    assert "floor:" not in said, "nothing was measured"
    assert sorted(tmp_path.iterdir()) == before
    assert sorted(published.iterdir()) == [published / "boston"], "nothing is staged"
    for field in ("slo_ms", "warm_seconds", "publish_at", "publish_every"):
        assert field not in said, "options are named as on the command line"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("demo --duration 1", "'--duration': 1 is too short: say 6s or more"),
        ("demo --rate 0", "'--rate': 0.0 is not in the range x>0"),
        ("demo --repeats 0", "'--repeats': 0 is not in the range x>=1"),
        ("bench floor --duration 0", "'--duration'"),
        ("bench ladder nosuch --title x", "Directory 'nosuch' does not exist"),
        ("bench ladder models --title x", "models is no SavedModel: it has no saved_model.pb"),
        ("bench ladder source --title x --rounds 0", "'--rounds': 0 is not in the range x>=1"),
        ("bench ladder source --title x --requests nosuch", "nosuch cannot be read"),
        ("report", "give RESULTS, or two of them"),
        ("report source --compare source source", "give RESULTS, or two of them"),
        ("report source --force", "--force belongs to --compare"),
        (
            "report README.md",
            "README.md is no raw result of `spikeless bench`: give a *.npz file that it wrote",
        ),
    ],
)
def test_other_commands_check_before_they_begin(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    for link in ("models", "source"):
        (tmp_path / link).symlink_to(published.parent / link)
    (tmp_path / "README.md").write_text("# A page\n")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = CliRunner().invoke(cli, shlex.split(command))
    assert result.exit_code != 0
    said = f"{result.output}{result.exception}"
    assert message in said
    assert "floor:" not in said
    assert "pickle" not in said
    assert sorted(tmp_path.iterdir()) == before


def test_a_server_that_would_refuse_part_of_the_load_is_named_before_the_run(
    published: Path, tmp_path: Path
) -> None:
    """And one on this machine is found, so that its memory is sampled."""
    settings = launch.LaunchSettings("boston", published / "boston", flags=("--grpc_max_threads=8",))
    load = ("--models", published, "--rate", 40, "--duration", "2s", "--settle", 0, "--no-floor")
    with launch.start(settings) as server:
        done = spikeless(
            "bench", "run", "boston", "--server", server.target, *load, "--out", tmp_path / "raw"
        )
        pid = server.pid
    assert done.returncode == 0, done.stderr
    warning, *others = done.stderr.splitlines()
    assert not any("pins the versions" in line for line in others)
    assert "takes 8 calls at once and refuses more: at 40 requests/s, a stall of 200 ms fills them" in warning
    assert "--grpc_max_threads=4096" in warning
    (result,) = (tmp_path / "raw").glob("*.npz")
    run = bench.read_run(result)
    assert run.facts.server.pid == pid
    assert (run.facts.server.engine == "embedded") is IS_EMBEDDED
    assert run.samples["rss_anon"].min() > 0


def test_what_cannot_be_seen_of_a_server_is_told_by_the_environment(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container: the server's memory is another user's, and there is no git."""
    settings = launch.LaunchSettings("boston", published / "boston", engine=launch.EMBEDDED)
    with launch.start(settings) as server:
        seen = bench.running_server(server.target, "boston")
        assert (seen.engine, seen.engine_version) == ("embedded", __version__)
        assert seen.allocator == "glibc"
        monkeypatch.setenv("SPIKELESS_ALLOCATOR", "jemalloc")
        assert bench.running_server(server.target, "boston") == seen, "what is seen counts"

        def refuse(pid: int) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(proc, "mapped_files", refuse)
        told = bench.running_server(server.target, "boston", server.pid)
        assert told.allocator == "jemalloc"
        assert told.allocator_proof == "SPIKELESS_ALLOCATOR, which its entrypoint checks"
    monkeypatch.setattr(machine, "commit", lambda *_, **__: None)
    assert machine.source_commit() == "unknown"
    monkeypatch.setenv("SPIKELESS_REVISION", "0123456789ab")
    assert machine.source_commit() == "0123456789ab"


def test_results_are_compared_by_the_command(tmp_path: Path) -> None:
    for name, height in (("before", 80), ("after", 3)):
        made_up_run("swap", height).save(tmp_path / f"{name}.npz")
    made_up_run("swap", machine=dataclasses.replace(MACHINE, cpus=64)).save(tmp_path / "elsewhere.npz")
    compare = ("report", "--compare", tmp_path / "before.npz")
    done = spikeless(*compare, tmp_path / "after.npz", "--out", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert "after relative to before" in done.stdout
    assert "0.05x" in done.stdout
    assert "SLO held with “after”, broken with “before”." in done.stdout
    assert "| reload p99.9 | 81.0 ms | 4.00 ms | 0.05x |" in (tmp_path / "report" / "summary.md").read_text()
    refused = spikeless(*compare, tmp_path / "elsewhere.npz", "--out", tmp_path / "no")
    assert refused.returncode == 1
    assert "before and elsewhere are from different machines" in refused.stderr
    assert "--force" in refused.stderr
    assert not (tmp_path / "no").exists()
    forced = spikeless(*compare, tmp_path / "elsewhere.npz", "--out", tmp_path / "yes", "--force")
    assert forced.returncode == 0, forced.stderr
    assert "different machines: do not compare them" in forced.stdout


def test_a_share_of_what_the_server_can_do(published: Path, tmp_path: Path) -> None:
    """The search is printed, and the load is of the rate that it leads to."""
    load: tuple[object, ...] = (
        "--load",
        "10%",
        "--duration",
        2,
        "--settle",
        0,
        "--timeout",
        "60s",
        "--no-floor",
    )
    load += ("--arrivals", "bursts", "--batch-sizes", "1:80,8:20")
    done = spikeless("bench", "run", "boston", "--models", published, *load, "--out", tmp_path / "raw")
    if "cannot be loaded with a share" in done.stderr:
        pytest.skip("this machine is too busy even for the first rate of the search")
    assert done.returncode == 0, done.stderr
    tried = re.findall(r"capacity: (\d+)/s (?:kept|did not keep) up", done.stderr)
    assert len(tried) >= 2
    assert tried[0] == "50"
    (result,) = (tmp_path / "raw").glob("*.npz")
    run = bench.read_run(result)
    (note,) = run.facts.notes
    found = re.search(r"the rate is 10% of what the server keeps up with, (\d+)/s: ", note)
    assert found is not None
    assert run.facts.settings.rate == pytest.approx(int(found[1]) / 10, abs=0.2)
    assert note in done.stderr
    assert set(run.requests["request"].tolist()) <= {0, 1}


def test_reloads_of_other_models(published: Path, tmp_path: Path) -> None:
    """The load stays on one model, while two others are reloaded in turn."""
    models, source = tmp_path / "models", published.parent / "source"
    for name in ("boston", "paris", "rome"):
        publishing.publish(source, models, name, gates=())
    load: tuple[object, ...] = ("--rate", 50, "--duration", 16, "--settle", 1, "--timeout", 60, "--no-floor")
    load += ("--publish", source, "--publishes", 3, "--publish-model", "paris", "--publish-model", "rome")
    places = ("--models", models, "--out", tmp_path / "raw")
    done = spikeless("bench", "run", "boston", *load, *places, "--json")
    assert done.returncode == 0, done.stderr
    run = bench.read_run(json.loads(done.stdout)["result"])
    assert [publish.model for publish in run.facts.publishes] == ["paris", "rome", "paris"]
    assert set(run.requests["code"]) == {Code.OK}
    assert set(run.requests["version"]) == {1}, "it answers all along"
    assert sorted(layout.versions(models, "paris")) == [1, 2, 3]
    assert sorted(layout.versions(models, "rome")) == [1, 2]
    seen = {(change.model, change.version, change.state) for change in run.facts.states}
    assert {("", 1, "AVAILABLE"), ("paris", 2, "AVAILABLE"), ("rome", 2, "AVAILABLE")} <= seen
    assert any(line.endswith(" s rome v2 AVAILABLE") for line in done.stderr.splitlines())


def test_a_directory_without_results_is_refused(tmp_path: Path) -> None:
    done = spikeless("report", tmp_path)
    assert done.returncode == 1
    assert "holds no raw results" in done.stderr


def test_a_version_that_is_not_promoted_is_no_swap(saved_models: Path, tmp_path: Path) -> None:
    """The server reads models.config, which pins version 1."""
    models, source = publish_boston(saved_models / "signatures", tmp_path), tmp_path / "source"
    block = models_config.new_block("boston", str(models / "boston"))
    models_config.edit(models, {"boston": models_config.with_versions(block, [1], {})})
    settings = launch.LaunchSettings(
        flags=(f"--model_config_file={models / 'models.config'}",), wait_for=["boston"]
    )
    load = ("--rate", 40, "--duration", "4s", "--settle", "1s", "--no-floor", "--out", tmp_path / "raw")
    with launch.start(settings) as server:
        done = spikeless(
            "bench",
            "run",
            "boston",
            "--server",
            server.target,
            "--models",
            models,
            "--publish",
            source,
            *load,
        )
    assert done.returncode == 0, done.stderr
    assert "pins the versions of boston" in done.stderr
    assert "No version was swapped. What was published was not seen AVAILABLE" in done.stdout
    assert "SLO" not in done.stdout.splitlines()[-2]
