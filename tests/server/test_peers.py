"""The comparison of peers, small: with the engine and a peer that is installed here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import benchmark_scripts
import numpy as np
import pytest
from bench_runs import made_up_run
from machines import wait_for
from rich.console import Console

from spikeless import bench
from spikeless.errors import Code

pytestmark = pytest.mark.xdist_group("peers")  # one comparison serves all of these tests

peers = benchmark_scripts.fixture("bench_peers")


@pytest.fixture(scope="module")
def result(peers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One turn of two peers, with one new version each."""
    directory = tmp_path_factory.mktemp("peers")
    # What the main environment has of FastAPI is that peer's, too.
    environments = directory / "environments"
    environments.mkdir()
    (environments / "fastapi").symlink_to(sys.prefix)
    import peer_servers

    plan = peers.Plan(
        size=1 << 20, rate=20, steady=2, swaps=1, swaps_apart=20, warm=1, timeout=60, search=False
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_servers, "ENVIRONMENTS", environments)
        chosen = [peers.PEERS[name] for name in ("embedded", "fastapi")]
        out = directory / "out"
        count = peers.measure_all(
            plan, chosen, {"ray": "no environment"}, 1, directory / "model", out, Console(stderr=True)
        )
    assert count == 2, (out / "peers.json").read_text()
    return out


def test_each_peer_answers_as_tensorflow_does_and_swaps(result: Path) -> None:
    for name in ("embedded", "fastapi"):
        run = bench.read_run(result / f"{name}-1.npz")
        facts = json.loads((result / f"{name}-1.json").read_text())
        assert facts["difference"] <= 1e-4
        assert run.facts.settings.protocol == "rest"
        assert {1} <= set(run.requests["version"][run.requests["code"] == Code.OK]) <= {1, 2}
        t, memory, processor = np.array(facts["samples"]).T
        assert (np.diff(t) > 0).all()
        assert memory.max() > 50 << 20
        assert processor.max() > 0
        assert [Path(publish.result).name for publish in run.facts.publishes] == ["2"]
    embedded = bench.read_run(result / "embedded-1.npz")
    assert set(embedded.requests["code"]) == {Code.OK}, "the engine fails no request"


def test_the_workers_of_a_peer_count_too(result: Path) -> None:
    """Uvicorn's parent loads no model; its workers do, each with a TensorFlow."""
    import peer_servers

    facts = json.loads((result / "fastapi-1.json").read_text())
    family = max(memory for _, memory, _ in facts["samples"])
    assert family > int(peer_servers.PROCESSORS) * (100 << 20)


def test_the_report_has_each_peer(peers: Any, result: Path) -> None:
    summary = peers.peer_report.write(result)
    assert (result / "summary.md").read_text() == summary
    for title in ("| Embedded engine | ", "| FastAPI, uvicorn | "):
        assert summary.count(title) == 2
    assert "- Ray Serve: no environment" in summary
    assert "</svg>" in (result / "peers.svg").read_text()
    first = (result / "peers.svg").read_bytes()
    peers.peer_report.write(result)
    assert (result / "peers.svg").read_bytes() == first


def test_several_rounds_are_shown_with_their_range(peers: Any, result: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(result, tmp_path / "rounds"))
    for first in list(directory.glob("*-1.*")):
        shutil.copy(first, directory / first.name.replace("-1.", "-2."))
    facts = json.loads((directory / "fastapi-2.json").read_text())
    facts["samples"] = [(t, memory + (1 << 30), processor) for t, memory, processor in facts["samples"]]
    (directory / "fastapi-2.json").write_text(json.dumps(facts))
    about = json.loads((directory / "peers.json").read_text())
    (directory / "peers.json").write_text(json.dumps(about | {"rounds": 2}))
    _, ranges = peers.peer_report.write(directory).split("The lowest and the highest of the rounds:")
    row = next(line for line in ranges.splitlines() if line.startswith("| FastAPI"))
    lowest, highest = row.split(" | ")[-2].split(" to ")
    assert int(highest.replace(",", "")) - int(lowest.replace(",", "")) == pytest.approx(1024, abs=1)


def test_versions_are_seen_in_the_answers(peers: Any) -> None:
    run = made_up_run("peer", 0.0, 0.0)
    seen = peers._seen(run)
    assert [(change.version, change.state) for change in seen] == [
        (1, "AVAILABLE"),
        (1, "END"),
        (2, "AVAILABLE"),
        (2, "END"),
        (3, "AVAILABLE"),
    ]
    first = run.requests["intended"][run.requests["version"] == 2][0]
    assert seen[1].t == seen[2].t == pytest.approx(first + 0.001), "no answer is of both"


def test_what_ended_processes_used_stays_counted(peers: Any) -> None:
    """Also of those that no parent waited for."""
    busy = "import time\nwhile time.process_time() < 2: pass"
    parent = (
        "import signal, subprocess, sys\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {busy!r}])\n"
        "child.wait()\n"
        "print(flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with peers.Family(process.pid) as family:
            process.stdout.readline()  # The child has ended.
            ended = len(family.samples)
            wait_for(lambda: len(family.samples) > ended + 1, "no more samples")
        process.stdin.close()
    used = [seconds for _, _, seconds in family.samples]
    assert used == sorted(used)
    assert used[-1] >= 1.0


def test_figures_are_those_of_the_samples(peers: Any) -> None:
    """A made-up version comes at 10 s; it answers 1.2 s later."""
    run = made_up_run("peer", 500.0)
    t = np.arange(0, 20, 0.1)
    memory = np.where(t < 10, 100, 300) * 2**20
    # A tenth of a processor always, and a whole one for a second of the swap.
    processor = 0.1 * t + np.clip(t - 10, 0, 1)
    facts = {"samples": np.array([t, memory, processor]).T.tolist(), "search": {"rate": 700.0}}
    figures = peers.peer_report._figures(run, facts)
    assert figures["processor time of a swap"] == pytest.approx(1.0, abs=0.01)
    assert figures["private memory, steady"] == pytest.approx(100)
    assert figures["private memory, peak"] == pytest.approx(300)
    assert figures["new file to served"] == pytest.approx(1.2)
    assert figures["slowest during reloads"] == pytest.approx(501, abs=5)
    assert figures["rate at the SLO"] == 700
    assert figures["failed requests"] == 0


def test_what_is_missing_is_said(peers: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import peer_servers

    monkeypatch.setattr(peer_servers, "ENVIRONMENTS", tmp_path)
    monkeypatch.setenv("SPIKELESS_SERVER", "embedded")
    left_out = peers.left_out()
    assert set(left_out) == set(peers.PEERS) - {"embedded"}
    assert "names no tensorflow_model_server" in left_out["tensorflow-serving"]
    assert "run `make peers-env`" in left_out["flask"]


def test_a_server_that_ends_is_named_with_its_log(peers: Any, tmp_path: Path) -> None:
    import peer_servers

    (tmp_path / "peer").mkdir()
    broken = peers.Peer(
        "flask", "Broken", "never", lambda bin, place: ["sh", "-c", "echo woe; exit 3"], print
    )
    place = peers.Place(tmp_path, 1)
    with (
        pytest.raises(peers.SpikelessError, match=r"(?s)the server ended; its log ends:\nwoe"),
        peer_servers.started(broken, place, "/predict", b"{}"),
    ):
        pass


def test_every_peer_is_pinned_and_explained(peers: Any) -> None:
    for peer in peers.PEERS.values():
        if not peer.packages:
            continue
        folder = benchmark_scripts.FOLDER / "peers" / peer.name
        pins = (folder / "requirements.txt").read_text().splitlines()
        assert all("==" in pin and "://" not in pin for pin in pins), "no addresses"
        names = {pin.partition("==")[0] for pin in pins}
        assert set(peer.packages) <= names
        assert '"""' in (folder / "serve.py").read_text()
    folders = (benchmark_scripts.FOLDER / "peers").iterdir()
    found = {folder.name for folder in folders if (folder / "serve.py").exists()}
    assert found == {peer.name for peer in peers.PEERS.values() if peer.packages}
