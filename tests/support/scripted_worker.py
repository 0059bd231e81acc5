"""A worker without TensorFlow, which fails as its environment says.

``FAILS`` and ``DIES`` are names of models; the workers with the numbers in ``WHO``
refuse to load the one and are killed while they load the other. What they serve is
appended to the file ``SEEN``, a line for each command.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

from spikeless.engine.workers.connection import PeerConnection
from spikeless.engine.workers.pool import WORKER_MARK
from spikeless.errors import InvalidArgument


def main() -> None:
    number, _, descriptor = os.environ[WORKER_MARK].partition(":")
    ended = threading.Event()

    def note(line: str) -> None:
        with open(os.environ["SEEN"], "a") as seen:
            seen.write(f"{number} {line}\n")

    def load(name: str, version: int, path: str) -> None:
        note(f"load {name} {version}")
        if number in os.environ["WHO"].split(","):
            if name == os.environ.get("FAILS"):
                raise InvalidArgument(f"worker {number} cannot load {name}")
            if name == os.environ.get("DIES"):
                os.kill(os.getpid(), signal.SIGKILL)

    def serve(name: str, version: int) -> None:
        note(f"serve {name} {version}")

    def unload(name: str, version: int) -> None:
        note(f"unload {name} {version}")

    handlers: dict[str, Callable[..., Any]] = {
        "load": load,
        "serve": serve,
        "unload": unload,
        "view": lambda **view: None,
        "listen": lambda: note("listen"),
        "page": lambda: f"# TYPE calls counter\ncalls {number}1\n",
    }
    end = socket.socket(fileno=int(descriptor))
    connection = PeerConnection(end, handlers, ("serve", "view"), closed=ended.set)
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    connection.start()
    ended.wait()
    os._exit(0)


main()
