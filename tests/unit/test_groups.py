"""Tests that share something expensive are marked as a group, which one worker has to run."""

from __future__ import annotations

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="there is one process only")
@pytest.mark.xdist_group("one")
def test_a_group_stays_together(request: pytest.FixtureRequest) -> None:
    """pytest-xdist sends tests out by a suffix of their ids; some versions of pytest do not take it over."""
    if request.config.getvalue("loadgroup"):
        assert request.node.nodeid.endswith("@one")
