"""The libraries for stores, each of which has its own words for the same.

In: what they answer and raise. Out: what `spikeless.store.objects` goes by.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

#: Protocol -> the library that fsspec needs for it; each is in the extra of that name.
LIBRARIES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "http": "aiohttp",
    "https": "aiohttp",
}


@dataclass(frozen=True)
class Found:
    """An object of a store."""

    bytes: int
    #: When it was written, in seconds since 1970; now, where the store does not tell.
    written: float


#: Errors of libraries that trying again does not mend.
_FINAL = (
    *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError"),
    *("AuthenticationException", "BadHostKeyException", "_UnknownHost"),
)


def found(info: Mapping[str, Any]) -> Found:
    """What the libraries say of an object, each in its own words."""
    known = (info.get(key) for key in ("LastModified", "last_modified", "updated", "mtime", "created"))
    written = next((each for each in known if each is not None), time.time())
    if isinstance(written, str):
        written = datetime.fromisoformat(written.replace("Z", "+00:00"))
    if isinstance(written, datetime):
        # A time without a zone is UTC's.
        written = (written if written.tzinfo else written.replace(tzinfo=timezone.utc)).timestamp()
    return Found(int(info.get("size") or 0), float(written))


def code_of(error: BaseException) -> str:
    """What S3 calls an error."""
    answer = getattr(error.__cause__, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))


def is_final(error: BaseException) -> bool:
    forbidden = isinstance(error, PermissionError) or getattr(error, "status", 0) in (401, 403)
    return forbidden or type(error).__name__ in _FINAL


def is_missing(error: BaseException, over_http: bool) -> bool:
    if isinstance(error, FileNotFoundError):
        # Over HTTP it is raised whatever went wrong.
        return not over_http or error.__cause__ is None or getattr(error.__cause__, "status", 0) in (404, 410)
    return getattr(error, "status", 0) in (404, 410)


def known_hosts() -> Any:
    """Accepts the hosts that ``~/.ssh/known_hosts`` knows, and no other."""
    import paramiko

    class _UnknownHost(paramiko.SSHException):
        pass

    class _KnownHosts(paramiko.MissingHostKeyPolicy):
        def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
            file = Path("~/.ssh/known_hosts").expanduser()
            known = paramiko.HostKeys(str(file)) if file.is_file() else paramiko.HostKeys()
            if not known.check(hostname, key):
                raise _UnknownHost(f"{hostname} with this key is not in {file}: see ssh-keyscan(1)")

    return _KnownHosts()
