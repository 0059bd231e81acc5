"""Types of values that several commands take."""

from __future__ import annotations

import re

import click

_UNITS = {
    "": 1,
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
}


class Bytes(click.ParamType[int]):
    """A number of bytes, such as ``1MiB``."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+) ?([A-Za-z]*)", value)
        if match is None or match[2] not in _UNITS:
            self.fail(
                f"{value!r} is no size: give bytes, or a number with {', '.join(filter(None, _UNITS))}",
                param,
                ctx,
            )
        return int(match[1]) * _UNITS[match[2]]
