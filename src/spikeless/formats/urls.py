"""URLs as people may see them.

In: a URL as it was given, which may hold credentials. Out: one for messages, journals
and records.
"""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit


def redacted(url: str) -> str:
    """The URL without user, password, query and fragment."""
    if "://" not in url:
        return url.rstrip("/")
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
