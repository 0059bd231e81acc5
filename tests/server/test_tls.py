"""TLS on the gRPC ports, with certificates of the client where the server asks."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme
from click.testing import CliRunner
from harness import put_version

from spikeless import bench, launch
from spikeless.bench.replayed import read_requests
from spikeless.bench.watch import Watcher
from spikeless.channels import CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE, TLS, endpoint
from spikeless.cli import cli
from spikeless.client import Client
from spikeless.errors import Code, InvalidArgument, SpikelessError, Unavailable
from spikeless.formats import tfrecord
from spikeless.formats.states import State
from spikeless.openloop.connection import Connection
from spikeless.openloop.http1 import HttpLink
from spikeless.openloop.loop import OpenLoop
from spikeless.rollout.local_servers import on_loopback
from spikeless.warmup.requests import predict

X = {"x": np.array([1.0], np.float32)}
Trust = Callable[..., None]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def models(saved_models: Path, tmp_path: Path) -> Path:
    put_version(saved_models / "times_one", tmp_path / "times", 1)
    return tmp_path / "times"


@pytest.fixture
def trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trust:
    """Set the client's variables: whom it trusts, and what it shows."""

    def use(authority: trustme.CA, shown: trustme.LeafCert | None = None) -> None:
        files = [tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem")]
        authority.cert_pem.write_to_path(files[0])
        if shown is not None:
            shown.cert_chain_pems[0].write_to_path(files[1])
            shown.private_key_pem.write_to_path(files[2])
        monkeypatch.setenv(CA_VARIABLE, str(files[0]))
        for variable, file in zip((CERTIFICATE_VARIABLE, KEY_VARIABLE), files[1:], strict=True):
            monkeypatch.setenv(variable, str(file) if shown else "")

    return use


def text(pem: trustme.Blob) -> str:
    return pem.bytes().decode()


def config(certificate: trustme.LeafCert, verify: trustme.CA | None = None, **changes: str) -> str:
    """An SSLConfig in text format."""
    fields = {"server_key": text(certificate.private_key_pem)}
    fields["server_cert"] = "".join(map(text, certificate.cert_chain_pems))
    if verify is not None:
        fields["custom_ca"] = text(verify.cert_pem)
    lines = [f"{name}: {json.dumps(value)}" for name, value in {**fields, **changes}.items()]
    return "\n".join([*lines, f"client_verify: {str(verify is not None).lower()}"])


@contextmanager
def serving(models: Path, ssl_config: str, *flags: str) -> Iterator[launch.ServerProcess]:
    file = models.parent / "ssl.config"
    file.write_text(ssl_config)
    settings = launch.LaunchSettings(
        model_name="times",
        model_base_path=models,
        flags=(f"--ssl_config_file={file}", *bench.SERVER_FLAGS, *flags),
        log=models.parent / "server.log",
    )
    with launch.ServerProcess(settings) as server:
        server.start()
        yield server


def is_available(client: Client) -> bool:
    try:
        return [status.state for status in client.statuses("times")] == [State.AVAILABLE]
    except SpikelessError as error:
        if error.code is not Code.UNAVAILABLE:
            raise
        return False


def test_a_server_with_a_certificate(models: Path, authority: trustme.CA, trust: Trust) -> None:
    trust(authority)
    with (
        serving(models, config(authority.issue_cert("127.0.0.1"))) as server,
        Client(server.target, timeout=60.0) as client,
    ):
        server.wait_for(lambda: is_available(client), "the model over TLS")
        assert client.predict("times", X)["y"] == [1]
        with Client(server.target.removeprefix(TLS), timeout=10) as plain, pytest.raises(SpikelessError):
            plain.predict("times", X)
        trust(trustme.CA())
        with Client(server.target, timeout=10) as doubtful, pytest.raises(SpikelessError):
            doubtful.predict("times", X)


@pytest.mark.parametrize("beginning", [b"", b"\x16\x03\x01"])
def test_a_client_that_does_not_begin_is_not_kept(
    beginning: bytes, models: Path, authority: trustme.CA
) -> None:
    def is_listening() -> bool:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(address, timeout=60):
            return True
        return False

    short = "--grpc_channel_arguments=grpc.server_handshake_timeout_ms=200"
    with serving(models, config(authority.issue_cert("127.0.0.1")), short) as server:
        address = ("127.0.0.1", server.port)
        server.wait_for(is_listening, "the port")
        with (
            socket.create_connection(address, timeout=60) as sock,
            contextlib.suppress(ConnectionError),
        ):
            sock.sendall(beginning)
            assert not sock.recv(1)


def test_clients_that_have_to_show_a_certificate(models: Path, authority: trustme.CA, trust: Trust) -> None:
    clients = trustme.CA()
    with serving(models, config(authority.issue_cert("127.0.0.1"), verify=clients)) as server:
        trust(authority, clients.issue_cert("client"))
        with Client(server.target, timeout=60.0) as client:
            server.wait_for(lambda: is_available(client), "the model over TLS")
            assert client.predict("times", X)["y"] == [1]
        for shown in (None, trustme.CA().issue_cert("stranger")):
            trust(authority, shown)
            with Client(server.target, timeout=10) as stranger, pytest.raises(SpikelessError):
                stranger.predict("times", X)


def test_the_unix_socket_has_it_too(models: Path, tmp_path: Path, authority: trustme.CA) -> None:
    certificate = config(authority.issue_cert("models.example"))
    path = tmp_path / "socket"
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    options = [("grpc.ssl_target_name_override", "models.example")]
    with (
        serving(models, certificate, f"--grpc_socket_path={path}") as server,
        grpc.secure_channel(f"unix:{path}", credentials, options) as channel,
    ):
        ready = grpc.channel_ready_future(channel)
        server.wait_for(ready.done, "TLS on the socket")


def test_tools_reach_it(models: Path, authority: trustme.CA, trust: Trust) -> None:
    trust(authority)
    with serving(models, config(authority.issue_cert("127.0.0.1"))) as server:
        server.wait_ready()
        with Watcher(server.target, "times", None) as watcher:
            server.wait_for(lambda: list(watcher.states.values()) == ["AVAILABLE"], "its states over TLS")
        command = [sys.executable, "-m", "spikeless", "status", "times", "--models", str(models.parent)]
        command += ["--servers", server.target]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert "AVAILABLE" in shown.stdout, shown.stdout + shown.stderr


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """A small request, and one of four megabytes."""
    inputs = [np.ones(size, np.float32) for size in (1, 1 << 20)]
    records = [predict("serving_default", {"x": x}).SerializeToString() for x in inputs]
    tfrecord.write(tmp_path / "requests", records)
    return tmp_path / "requests"


def codes(target: str, tls: ssl.SSLContext | None, requests: Path) -> list[int]:
    """The statuses of ten calls of an open loop."""
    calls = read_requests(requests, "times")
    load = OpenLoop(np.arange(10, dtype=np.float64) * 0.02, calls, target, 60.0, tls=tls)
    load.run(time.monotonic())
    return [int(code) for code in load.columns.ended()["code"]]


def test_a_load_over_tls(
    models: Path, authority: trustme.CA, trust: Trust, requests: Path, tmp_path: Path
) -> None:
    clients = trustme.CA()
    trust(authority, clients.issue_cert("client"))
    with serving(models, config(authority.issue_cert("127.0.0.1"), verify=clients)) as server:
        server.wait_ready()
        load = ["--requests", requests, "--rate", "20", "--duration", "2s", "--settle", "0s", "--no-floor"]
        load += ["--timeout", "60s"]
        command = ["bench", "run", "times", "--server", server.target, *load, "--out", tmp_path / "raw"]
        done = CliRunner().invoke(cli, [*map(str, command), "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        run = bench.read_run(json.loads(done.stdout)["result"])
        assert len(run.requests["code"]) > 0
        assert set(run.requests["code"]) == {Code.OK}

        address, tls = endpoint(server.target)
        assert codes(address, tls, requests) == [Code.OK] * 10
        assert codes(address, None, requests) == [Code.UNAVAILABLE] * 10, "without TLS"
        trust(authority)
        assert codes(address, endpoint(server.target)[1], requests) == [Code.UNAVAILABLE] * 10, "a stranger"
        trust(trustme.CA(), clients.issue_cert("client"))
        assert codes(address, endpoint(server.target)[1], requests) == [Code.UNAVAILABLE] * 10, "doubtful"


def test_a_server_with_tls_that_does_not_agree_to_http2(authority: trustme.CA, trust: Trust) -> None:
    trust(authority)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    def serve(listening: socket.socket) -> None:
        with listening.accept()[0] as accepted, contextlib.suppress(OSError):
            context.wrap_socket(accepted, True).recv(1)  # Until the client leaves.

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        connection = Connection(*endpoint(f"{TLS}127.0.0.1:{listening.getsockname()[1]}"))
        connection.open(60.0)

        def talk() -> None:
            while select.select([connection], [], [], 60.0)[0]:
                connection.parse(connection.read())
                connection.flush()

        try:
            with pytest.raises(Unavailable, match="does not agree to h2 by ALPN"):
                talk()
        finally:
            connection.close()
            thread.join()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server_key": "none"}, "server_key and server_cert are no PEM key"),
        ({"server_cert": ""}, "server_key and server_cert are no PEM key"),
        ({"server_key": text(trustme.CA().issue_cert("x").private_key_pem)}, "that belongs to it"),
        ({"custom_ca": "none"}, "custom_ca holds no PEM certificates"),
        ({"custom_ca": ""}, "client_verify needs the authorities of clients in custom_ca"),
        ({"server": ""}, "Invalid protobuf file"),
    ],
)
def test_configurations_that_are_wrong(
    embedded: None, models: Path, authority: trustme.CA, changes: dict[str, str], message: str
) -> None:
    wrong = config(authority.issue_cert("127.0.0.1"), verify=authority, **changes)
    with serving(models, wrong) as server:
        with pytest.raises(SpikelessError, match="exited with code 1"):
            server.wait_for(lambda: False, "the end")
        assert message in server.log_path.read_text()
        assert "PRIVATE" not in server.log_path.read_text()


def test_files_of_the_client_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CA_VARIABLE, "/nowhere/ca.pem")
    with pytest.raises(InvalidArgument, match=f"{CA_VARIABLE}: cannot read /nowhere/ca.pem"):
        Client("grpcs://127.0.0.1:1")
    monkeypatch.delenv(CA_VARIABLE)
    monkeypatch.setenv(KEY_VARIABLE, __file__)
    with pytest.raises(InvalidArgument, match="belong together"):
        Client("grpcs://127.0.0.1:1")
    monkeypatch.delenv(KEY_VARIABLE)
    monkeypatch.setenv(CA_VARIABLE, __file__)
    with pytest.raises(InvalidArgument, match=r"test_tls\.py: not the PEM files that TLS needs"):
        endpoint("grpcs://127.0.0.1:1")
    with pytest.raises(InvalidArgument, match="over HTTP have no TLS"):
        HttpLink("127.0.0.1:1", 1.0, ssl.create_default_context())


def test_the_address_is_the_same() -> None:
    assert on_loopback("grpcs://127.0.0.1:8500")
