"""Versions of a few pieces, which no server would load but which push and pull take."""

from __future__ import annotations

from pathlib import Path

from spikeless.repository.journal import Journal, Published

NAME = "ctr"
PIECE = 1 << 16


def small_version(models: Path, number: int, *parts: bytes) -> Path:
    """A version whose table is these parts, one after the other."""
    folder = models / NAME / str(number)
    folder.mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(b"graph %d" % number)
    (folder / "table").write_bytes(b"".join(parts))
    Journal(models, NAME).append(Published(number, PIECE))
    return folder
