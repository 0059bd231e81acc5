"""The peers: how each is started and told of a new version.

In: a `Place` with the first version in it. Out: a `Started` server on it. What a peer
is configured with and why that is fair, ``peers/<name>/serve.py`` says.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from spikeless import __version__, launch
from spikeless.bench.protocols import PROTOCOLS
from spikeless.disk import children
from spikeless.errors import NotFound, SpikelessError, Unavailable
from spikeless.formats.kinds import PREDICT
from spikeless.launch import LOOPBACK

HERE = Path(__file__).parent
SERVERS = HERE / "peers"
ENVIRONMENTS = HERE.parent / ".venv-peers"
#: The name of the model, where a server wants one.
MODEL = "peer"
PROCESSORS = str(len(os.sched_getaffinity(0)))
_READY_SECONDS = 180.0
_POLL_SECONDS = 0.2
#: Answers of a version, on connections of their own, until it counts as the only one.
_IN_TURN = 8
_VERSIONS = (
    "import sys, importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ')"
)


@dataclass(frozen=True)
class Place:
    """Where a peer's files are."""

    folder: Path
    port: int

    @property
    def models(self) -> Path:
        """The folder of the versions."""
        return self.folder / MODEL

    @property
    def log(self) -> Path:
        return self.folder / "log"


@dataclass(frozen=True)
class Peer:
    """A way to serve."""

    #: Its folder in ``peers/``, and its environment.
    name: str
    title: str
    #: How it changes a version, in a few words.
    way: str
    #: Its environment's ``bin`` and its place -> the command line.
    command: Callable[[Path, Place], Sequence[str | Path]]
    #: Tells the server, whose process is given, of the version that is new.
    tell: Callable[[Place, int, Path], object]
    protocol: str = "rest"
    url_path: str = "/predict"
    #: The packages whose versions are told; without any it has no environment.
    packages: Sequence[str] = ()
    #: The file of a version that it reads in place of a SavedModel.
    onnx: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def bin(self) -> Path:
        """The programs of its environment.

        Raises:
            NotFound: it has not been made.
        """
        found = ENVIRONMENTS / self.name / "bin" if self.packages else Path(sys.executable).parent
        if not (found / "python").exists():
            raise NotFound(f"there is no environment of {self.name}: run `make peers-env`")
        return found


@dataclass(frozen=True)
class Started:
    """A server that answers."""

    peer: Peer
    place: Place
    pid: int

    @property
    def target(self) -> str:
        return f"{LOOPBACK}:{self.place.port}"

    @property
    def version(self) -> str:
        """The versions of its packages, or its own."""
        if not self.peer.packages:
            return __version__ if self.peer.name == launch.EMBEDDED else launch.binary_version(_binary())
        command = [str(self.peer.bin / "python"), "-c", _VERSIONS, *self.peer.packages]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def publish(self, version: Path) -> Path:
        """Make a staged version the newest, and tell the server."""
        published = self.place.models / version.name
        os.rename(version, published)
        self.peer.tell(self.place, self.pid, published)
        return published

    def wait_for(self, version: int, path: str, body: bytes, seconds: float) -> bool:
        """Whether `version` answers within `seconds`, on several connections."""
        served = PROTOCOLS[self.peer.protocol].served_version
        deadline = time.monotonic() + seconds
        in_turn = 0
        while in_turn < _IN_TURN and time.monotonic() < deadline:
            try:
                status, answer = ask(self.place.port, path, body)
            except (OSError, http.client.HTTPException):
                status, answer = 0, b""
            if status == 200 and served(PREDICT, answer) == version:
                in_turn += 1
            else:
                in_turn = 0
                time.sleep(_POLL_SECONDS)
        return in_turn == _IN_TURN


@contextmanager
def started(peer: Peer, place: Place, path: str, body: bytes) -> Iterator[Started]:
    """The server while the block runs; it has answered `body` at `path`.

    Raises:
        Unavailable: it ended, or did not answer in time; the end of its log is in the
            message.
    """
    command = [str(part) for part in peer.command(peer.bin, place)]
    environment = {**os.environ, **peer.environment, "PEER_MODELS": str(place.models)}
    environment["PYTHONPATH"] = os.pathsep.join([str(SERVERS / peer.name), str(SERVERS / "common")])
    environment["PATH"] = f"{peer.bin}{os.pathsep}{environment['PATH']}"
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"}
    with place.log.open("wb") as log:
        process = subprocess.Popen(
            children.tied(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=place.folder,
            env=environment,
            start_new_session=True,
        )
    try:
        _wait(process, place, path, body)
        yield Started(peer, place, process.pid)
    finally:
        _stop(process)


def _wait(process: subprocess.Popen[bytes], place: Place, path: str, body: bytes) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        ended = process.poll() is not None
        if ended or time.monotonic() > deadline:
            tail = "\n".join(place.log.read_text(errors="replace").splitlines()[-30:])
            raise Unavailable(f"the server {'ended' if ended else 'does not answer'}; its log ends:\n{tail}")
        try:
            if ask(place.port, path, body)[0] == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(_POLL_SECONDS)


def ask(port: int, path: str, body: bytes) -> tuple[int, bytes]:
    """POST on a connection of its own; status and answer."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=60)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it and all that it has started."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for one in family:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, 10)


# How versions are changed -------------------------------------------------------------


def _nothing(place: Place, pid: int, version: Path) -> None:
    """It looks for new versions itself."""


def _hang_up(place: Place, pid: int, version: Path) -> None:
    os.kill(pid, signal.SIGHUP)


def _mlserver_load(place: Place, pid: int, version: Path) -> None:
    _mlserver_settings(place, version)
    status, answer = ask(place.port, f"/v2/repository/models/{MODEL}/load", b"")
    if status != 200:
        raise SpikelessError(f"MLServer answered {status} to load: {answer.decode(errors='replace')}")


def _mlserver_settings(place: Place, version: Path) -> None:
    document = {
        "name": MODEL,
        "implementation": "serve.Peer",
        "parameters": {"uri": str(version)},
    }
    (place.folder / "model-settings.json").write_text(json.dumps(document))


# How servers are started --------------------------------------------------------------


def _uvicorn(bin: Path, place: Place) -> Sequence[str | Path]:
    options = ["--host", LOOPBACK, "--port", str(place.port), "--workers", PROCESSORS]
    options += ["--timeout-worker-healthcheck", "120", "--log-level", "warning"]
    return [bin / "uvicorn", "serve:app", *options]


def _gunicorn(bin: Path, place: Place) -> Sequence[str | Path]:
    options = ["--bind", f"{LOOPBACK}:{place.port}", "--workers", PROCESSORS, "--threads", "4"]
    return [bin / "gunicorn", *options, "--timeout", "120", "serve:app"]


def _bentoml(bin: Path, place: Place) -> Sequence[str | Path]:
    options = ["--host", LOOPBACK, "--port", str(place.port), "--working-dir", str(SERVERS / "bentoml")]
    return [bin / "bentoml", "serve", "serve:Peer", *options]


def _mlserver(bin: Path, place: Place) -> Sequence[str | Path]:
    ports = {"http_port": place.port, "grpc_port": launch.free_port(), "metrics_port": launch.free_port()}
    document = {"host": LOOPBACK, "parallel_workers": int(PROCESSORS), "debug": False, **ports}
    (place.folder / "settings.json").write_text(json.dumps(document))
    _mlserver_settings(place, place.models / "1")
    return [bin / "mlserver", "start", place.folder]


def _ray(bin: Path, place: Place) -> Sequence[str | Path]:
    return [bin / "python", SERVERS / "ray" / "serve.py", str(place.port)]


def _versions_flags(place: Place) -> list[str]:
    flags = [f"--rest_api_port={place.port}", f"--port={launch.free_port()}"]
    return [*flags, f"--model_name={MODEL}", f"--model_base_path={place.models}"]


def _embedded(bin: Path, place: Place) -> Sequence[str | Path]:
    return [bin / "python", "-m", "spikeless", "serve", *_versions_flags(place)]


def _serving(bin: Path, place: Place) -> Sequence[str | Path]:
    return [_binary(), *_versions_flags(place)]


def _binary() -> str:
    """TensorFlow Serving's; empty where there is none."""
    return shutil.which(launch.chosen_engine()) or ""


_OWN_PATH = f"/v1/models/{MODEL}:predict"
#: In the order of the table.
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "tensorflow-serving",
            "TensorFlow Serving",
            "finds the version",
            _serving,
            _nothing,
            url_path=_OWN_PATH,
        ),
        Peer("embedded", "Embedded engine", "finds the version", _embedded, _nothing, url_path=_OWN_PATH),
        Peer(
            "flask",
            "Flask, gunicorn",
            "HUP: new workers",
            _gunicorn,
            _hang_up,
            packages=("flask", "gunicorn", "tensorflow"),
        ),
        Peer(
            "fastapi",
            "FastAPI, uvicorn",
            "HUP: workers in turn",
            _uvicorn,
            _hang_up,
            packages=("fastapi", "uvicorn", "tensorflow"),
        ),
        Peer(
            "bentoml",
            "BentoML",
            "HUP: restart",
            _bentoml,
            _hang_up,
            packages=("bentoml", "tensorflow"),
            environment={"BENTOML_DO_NOT_TRACK": "True"},
        ),
        Peer(
            "mlserver",
            "MLServer",
            "repository API: load",
            _mlserver,
            _mlserver_load,
            protocol="open-inference",
            url_path=f"/v2/models/{MODEL}/infer",
            packages=("mlserver", "tensorflow"),
        ),
        Peer(
            "ray",
            "Ray Serve",
            "user_config: reconfigure",
            _ray,
            _hang_up,
            packages=("ray", "tensorflow"),
            environment={"RAY_USAGE_STATS_ENABLED": "0"},
        ),
        Peer(
            "onnxruntime",
            "ONNX Runtime, FastAPI",
            "HUP: workers in turn",
            _uvicorn,
            _hang_up,
            packages=("onnxruntime", "fastapi", "uvicorn", "tf2onnx"),
            onnx=True,
        ),
    )
}


def left_out() -> dict[str, str]:
    """Why each peer that cannot be run here cannot."""
    found = {}
    for peer in PEERS.values():
        if peer.name == "tensorflow-serving":
            if shutil.which(launch.chosen_engine()) is None:
                found[peer.name] = f"{launch.ENGINE_VARIABLE} names no tensorflow_model_server"
            continue
        try:
            _ = peer.bin
        except NotFound as error:
            found[peer.name] = str(error)
    return found
