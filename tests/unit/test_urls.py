"""URLs as people may see them."""

from __future__ import annotations

import pytest

from spikeless.errors import InvalidArgument
from spikeless.formats.urls import redacted


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/models/", "s3://bucket/models"),
        ("https://user:secret@host:8443/models?token=secret#x", "https://host:8443/models"),
        ("sftp://me:secret@host/models", "sftp://host/models"),
        ("/srv/store/", "/srv/store"),
    ],
)
def test_credentials_are_not_shown(url: str, shown: str) -> None:
    assert redacted(url) == shown


def test_what_cannot_be_read_is_refused_without_its_credentials() -> None:
    with pytest.raises(InvalidArgument, match=r"'s3://\[bad' is no address") as refused:
        redacted("s3://me:secret@[bad/models?token=secret")
    assert "secret" not in str(refused.value)
