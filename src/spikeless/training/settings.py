"""The settings of a training script, from its command line.

In: the parser of the script. Out: the settings that were given, all of them in range.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection


def parse_settings(parser: argparse.ArgumentParser, may_be_zero: Collection[str] = ()) -> argparse.Namespace:
    """Read the command line; every whole number counts something, except the seed.

    Args:
        parser: a usage error ends the program, and names the option.
        may_be_zero: settings for which 0 has a meaning; all others must be 1 or more.
    """
    settings = parser.parse_args()
    for key, value in vars(settings).items():
        least = 0 if key in may_be_zero else 1
        if type(value) is int and key != "seed" and value < least:
            parser.error(f"--{key.replace('_', '-')} must be {least} or more")
    return settings
