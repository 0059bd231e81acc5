"""The open loop: servers that end calls before they have them, and users that fail."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h2.config
import h2.connection
import h2.errors
import pytest

from spikeless import launch
from spikeless.bench.load.generator_floor import instant_server
from spikeless.errors import Code
from spikeless.openloop.connection import Connection, Reply

_WINDOW = 65_535
_REFUSED = [(b":status", b"200"), (b"grpc-status", b"8")]
_OK = [(b":status", b"200"), (b"grpc-status", b"0")]
_FIRST, _SECOND = 1, 3


class Pair:
    """A connection, and the server's end of it, which says what a test has it say."""

    def __init__(self, listening: socket.socket) -> None:
        self.client = Connection(f"127.0.0.1:{listening.getsockname()[1]}")
        self.client.open(60.0)
        self.socket = listening.accept()[0]
        self.socket.settimeout(60)
        self.server = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        self.server.initiate_connection()
        self.says()

    def hears(self, size: int) -> None:
        """Until so many bytes of messages have come."""
        while size > 0:
            self.client.flush()
            for event in self.server.receive_data(self.socket.recv(1 << 20)):
                size -= getattr(event, "flow_controlled_length", 0)

    def says(self) -> list[Reply]:
        """What the server has to say arrives at once. Returns the calls it ends."""
        return self.client.parse(self.server.data_to_send())

    def refuses_the_first(self) -> None:
        self.server.send_headers(_FIRST, _REFUSED, end_stream=True)
        self.server.reset_stream(_FIRST, h2.errors.ErrorCodes.NO_ERROR)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        pair = Pair(listening)
        with pair.socket:
            yield pair
        pair.client.close()


def test_a_call_that_is_refused_while_it_is_sent(pair: Pair) -> None:
    """Room for the rest of it is announced first, and all of that arrives at once."""
    pair.client.send(0, "/s/m", bytes(_WINDOW + 1))
    pair.client.send(1, "/s/m", b"small")
    pair.hears(_WINDOW)
    pair.server.increment_flow_control_window(1 << 20)
    pair.server.increment_flow_control_window(1 << 20, _FIRST)
    pair.refuses_the_first()
    assert pair.says() == [Reply(0, Code.RESOURCE_EXHAUSTED)]
    pair.hears(len(b"small"))
    pair.server.send_headers(_SECOND, _OK, end_stream=True)
    assert pair.says() == [Reply(1, Code.OK)]


def test_a_server_that_leaves_while_a_call_is_sent(pair: Pair) -> None:
    pair.client.send(0, "/s/m", bytes(_WINDOW + 1))
    pair.hears(_WINDOW)
    pair.server.increment_flow_control_window(1 << 20)
    pair.server.increment_flow_control_window(1 << 20, _FIRST)
    pair.server.close_connection()
    assert pair.says() == []
    assert pair.client.ended
    assert pair.client.close() == [Reply(0, Code.UNAVAILABLE)]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_user_that_fails_ends_the_test(tmp_path: Path, processes: int) -> None:
    (tmp_path / "locustfile.py").write_text(
        "from spikeless.openloop.user import Call, OneUserPerProcess, OpenLoopUser, Schedule\n"
        "class Unreadable(Call):\n"
        "    def served_version(self, response):\n"
        "        raise ValueError('this answer cannot be read')\n"
        "class User(OpenLoopUser):\n"
        "    schedule = Schedule(rate=50.0, seconds=600.0)\n"
        "    calls = [Unreadable('/s/m', b'')]\n"
    )
    command = [sys.executable, "-m", "locust", "-f", str(tmp_path / "locustfile.py"), "--headless"]
    command += ["--exit-code-on-error", "0"]
    if processes > 1:
        port = str(launch.free_port())
        command += ["--processes", str(processes), "--master-bind-port", port, "--master-port", port]
    with instant_server() as target:
        done = subprocess.run([*command, "--host", target], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ValueError: this answer cannot be read" in done.stderr
