"""Addresses of stores, checked before anything is opened.

In: what somebody typed. Out: nothing, or what is wrong with it and how it is written.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from spikeless.errors import InvalidArgument
from spikeless.formats.urls import redacted
from spikeless.store.libraries import LIBRARIES

_FORMS = "s3://BUCKET/FOLDER, https://HOST/FOLDER or a folder"
_WITH_PORTS = ("http", "https", "sftp", "ssh")


def require_address(url: str) -> None:
    """Refuse what a library would misread, such as ``s3://`` for a folder ``s3:``.

    Raises:
        InvalidArgument: it is no address; the message names it without credentials.
    """
    if not url.strip():
        raise InvalidArgument(f"the address of the store is empty: give {_FORMS}")
    shown = redacted(url)
    protocol, separator, rest = url.partition(":")
    if not separator or protocol not in LIBRARIES:
        return
    if not rest.startswith("//"):
        raise InvalidArgument(
            f"{shown!r} is no address: write {protocol}://{rest.lstrip('/')}, or ./{shown} for a folder"
        )
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    if not place or place.startswith(":"):
        nameless = f"{protocol}://{place}{parts.path}"
        raise InvalidArgument(f"{nameless!r} names no bucket and no host: write {_FORMS}")
    if not place.isprintable() or " " in place:
        raise InvalidArgument(f"{shown!r}: {place!r} is no name of a bucket or host: write {_FORMS}")
    if protocol in _WITH_PORTS:
        try:
            _ = parts.port
        except ValueError as error:
            raise InvalidArgument(f"{shown!r}: {error}: write {protocol}://HOST:PORT/FOLDER") from None
