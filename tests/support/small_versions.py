"""Versions of a few pieces, which no server would load but which push and pull take."""

from __future__ import annotations

from pathlib import Path

from fleet_models import NAME

from spikeless.repository.journal import Journal, Published

PIECE = 1 << 16
#: Where a version has its table.
TABLE = "variables/table"


def small_version(models: Path, number: int, *parts: bytes, **files: bytes) -> Path:
    """A version whose table is these parts, one after the other, with further files."""
    version = models / NAME / str(number)
    content = {"saved_model.pb": b"graph %d" % number, TABLE: b"".join(parts), **files}
    for name, data in content.items():
        (version / name).parent.mkdir(parents=True, exist_ok=True)
        (version / name).write_bytes(data)
    Journal(models, NAME).append(Published(number, len(content[TABLE])))
    return version


def contents(version: Path) -> dict[str, bytes]:
    """Path in a version -> the file's content."""
    files = (path for path in version.rglob("*") if path.is_file())
    return {path.relative_to(version).as_posix(): path.read_bytes() for path in files}
