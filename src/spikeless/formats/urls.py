"""URLs as people may see them.

In: a URL as it was given, which may hold credentials. Out: one for messages, journals
and records.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

from spikeless.errors import InvalidArgument


def redacted(url: str) -> str:
    """The URL without user, password, query and fragment.

    Raises:
        InvalidArgument: it is no URL: its brackets hold no IPv6 address.
    """
    if "://" not in url:
        return url.rstrip("/")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        scheme, _, rest = url.partition("://")
        place = re.split("[/?#]", rest, maxsplit=1)[0].rpartition("@")[2]
        raise InvalidArgument(
            f"{f'{scheme}://{place}'!r} is no address: {error}; brackets are only for IPv6 addresses, "
            "as in https://[::1]:8080/"
        ) from None
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
