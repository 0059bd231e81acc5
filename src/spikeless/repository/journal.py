"""The journal of a model: who changed what is served, when, why, with which checks and which result.

In: records. Out: ``<models>/<name>/.spikeless/journal.jsonl``, one JSON object a line, only ever appended to,
each line on the disk before the next step is taken. The order of the lines counts, not their times: clocks
jump.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from spikeless.errors import FailedPrecondition

FILE_NAME = "journal.jsonl"


class Journal:
    """The journal in one directory, which is made when something is written."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path = Path(directory, FILE_NAME)

    def append(self, event: str, **fields: Any) -> None:
        """Write one record with the time, user, host and process added.

        Raises:
            FailedPrecondition: it could not be written.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        who = {"user": _user(), "host": socket.gethostname(), "pid": os.getpid()}
        record = {"event": event, "time": now, **who, **fields}
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                # A line that a crash or a full disk cut short stays alone on its line, and is not read.
                if file.tell() and not self._ends_well():
                    line = b"\n" + line
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FailedPrecondition(f"cannot write {self.path}: {error.strerror}; make room") from None

    def _ends_well(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def records(self) -> list[dict[str, Any]]:
        """All records, oldest first; what a crash cut short is left out."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FailedPrecondition(f"cannot read {self.path}: {error.strerror}") from None
        return [record for line in lines if (record := _record(line)) is not None]

    def unfinished(self) -> dict[str, Any] | None:
        """The record that began a change which has no end, when it is the last change."""
        begun: dict[str, Any] | None = None
        for record in self.records():
            if record["event"] == "begin":
                begun = record
            elif record["event"] == "end" and begun is not None and record.get("id") == begun.get("id"):
                begun = None
        return begun


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "event" in record else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
