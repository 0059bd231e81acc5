"""URLs as people may see them."""

from __future__ import annotations

import pytest

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
