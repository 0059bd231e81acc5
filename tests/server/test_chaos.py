"""Every fault once, in an order that a seed says; `chaos` has the long run."""

from __future__ import annotations

from pathlib import Path

import chaos
import pytest
from harness import ENGINE

from spikeless import launch


@pytest.mark.timeout(900)
@pytest.mark.skipif(ENGINE == launch.DOCKER, reason="it starts what is in the image")
def test_each_fault_is_survived_and_named(scales: Path, tmp_path: Path) -> None:
    result = chaos.run(tmp_path, scales, seed=15, seconds=0)
    assert set(result.faults) == {fault.__name__ for fault in chaos.FAULTS}
    assert result.restarts >= 4
