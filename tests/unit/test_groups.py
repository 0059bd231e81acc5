"""Tests that share something expensive are a group, which one worker runs."""

from __future__ import annotations

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="there is one process only")
@pytest.mark.xdist_group("one")
def test_a_group_stays_together(request: pytest.FixtureRequest) -> None:
    """pytest-xdist groups by a suffix of test ids, which some pytest versions drop."""
    if request.config.getvalue("loadgroup"):
        assert request.node.nodeid.endswith("@one")
