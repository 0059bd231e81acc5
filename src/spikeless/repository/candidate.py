"""A candidate: a version that is staged, and that one rename makes visible.

In: what `spikeless.repository.publishing` stages and the gates find. Out: a version,
and its record in the journal.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from pathlib import Path

from spikeless.disk import atomic
from spikeless.errors import AlreadyExists
from spikeless.repository.journal import Findings, Journal, Published
from spikeless.repository.origin import Origin

#: The gate without which callers of the stable version may fail.
SIGNATURES = "signatures"


@dataclass
class Candidate:
    """A version that is staged and not yet visible."""

    path: Path
    #: Where it will be.
    target: Path
    #: Where it comes from.
    origin: Origin
    #: The version that callers get now; None where there is none.
    stable: Path | None = None
    #: Bytes of its files, once it is staged.
    size: int = 0
    #: Names of the gates that it has passed.
    passed: list[str] = field(default_factory=list)
    #: What callers may notice, although it passed.
    warnings: list[str] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)

    @property
    def name(self) -> str:
        """The model."""
        return self.target.parent.name

    @property
    def version(self) -> int:
        return int(self.target.name)

    def publish(self) -> Path:
        """Make it visible by one rename, note that, and return the directory.

        Raises:
            AlreadyExists: something is in the way.
            FailedPrecondition: it could not be renamed; or the journal could not be
                written, and the version is visible.
        """
        with atomic.reported_errors(f"publish to {self.target.parent}"):
            _rename(self.path, self.target)
        Journal(self.target.parents[1], self.name).append(
            Published(
                self.version,
                self.size,
                stable=None if self.stable is None else int(self.stable.name),
                allow_breaking=SIGNATURES not in self.passed,
                gates=tuple(self.passed),
                findings=self.findings,
                source=self.origin.source,
                run=self.origin.run,
            )
        )
        return self.target


def _rename(staged: Path, target: Path) -> None:
    try:
        # Fails where anything but an empty directory is in the way.
        staged.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise AlreadyExists(f"{target} appeared meanwhile; versions are never overwritten") from None
    atomic.sync(target.parent)
