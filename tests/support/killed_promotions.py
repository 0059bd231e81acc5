"""Promote or roll back, killed with SIGKILL at a line of progress, as each step has.

    python killed_promotions.py promote|rollback MODELS TARGET N|TEXT

Dies at the N-th line, or at the first that contains TEXT; ends with 0 when there is
none.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys

from promotion_models import NAME, fleet_of, settings

from spikeless.formats.states import State
from spikeless.rollout.promotion import promote, rollback


def main(action: str, models: str, target: str, kill_at: str) -> None:
    lines = itertools.count()

    def progress(line: str) -> None:
        # Which states are seen on the way is chance; all other lines come in every run.
        number = -1 if line.endswith(tuple(State.__members__)) else next(lines)
        print(number, line, flush=True)
        if str(number) == kill_at or (not kill_at.isdigit() and kill_at in line):
            os.kill(os.getpid(), signal.SIGKILL)

    if action == "promote":
        promote(models, NAME, 2, fleet_of(target), settings(), progress)
    else:
        rollback(models, NAME, fleet_of(target), progress=progress)


main(*sys.argv[1:])
