"""A command on a terminal of its own, as somebody who looks at it has."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from types import TracebackType

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_DEADLINE_SECONDS = 180.0


class Terminal:
    """Runs the ``spikeless`` command; what it shows is in `shown`, without escapes."""

    def __init__(self, *arguments: object) -> None:
        self.shown = ""
        self.raw = ""
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 160, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "spikeless", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color"},
            start_new_session=True,
        )
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._master)

    def wait_for(self, text: str) -> None:
        """Read until `text` was shown."""
        while text not in self.shown:
            assert self._read(), f"it ended without {text!r}:\n{self.shown}"

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        os.killpg(self._process.pid, signal.SIGINT)

    def end(self) -> int:
        """Read to the end; returns the exit code."""
        while self._read():
            pass
        return self._process.wait(_DEADLINE_SECONDS)

    def _read(self) -> bool:
        """Read what there is; False at the end."""
        ready, _, _ = select.select([self._master], [], [], _DEADLINE_SECONDS)
        assert ready, f"nothing more was shown:\n{self.shown}"
        try:
            content = os.read(self._master, 1 << 16)
        except OSError:  # How Linux reports the end of a terminal.
            return False
        self.raw += content.decode(errors="replace")
        self.shown = _ESCAPES.sub("", self.raw)
        return bool(content)
