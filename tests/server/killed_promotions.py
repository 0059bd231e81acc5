"""Promote or roll back, and die of SIGKILL at the n-th line of progress; there is one before every step.

    python killed_promotions.py promote|rollback MODELS TARGET N

Ends with 0 when there were fewer lines than that.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys

from promotion_models import NAME, fleet_of, settings

from spikeless.promotion import promote, rollback


def main(action: str, models: str, target: str, kill_at: str) -> None:
    lines = itertools.count()

    def progress(line: str) -> None:
        number = next(lines)
        print(number, line, flush=True)
        if number == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

    if action == "promote":
        promote(models, NAME, 2, fleet_of(target), settings(), progress)
    else:
        rollback(models, NAME, fleet_of(target), progress=progress)


main(*sys.argv[1:])
