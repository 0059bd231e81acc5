"""Scripts of ``benchmarks/`` as modules: they are in no package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

FOLDER = ROOT / "benchmarks"


@contextmanager
def imported(name: str) -> Iterator[Any]:
    """The script; it and what it imports from its folder are forgotten at the end."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
        for key, module in [*sys.modules.items()]:
            file = getattr(module, "__file__", None)
            if file is not None and Path(file).parent == FOLDER:
                del sys.modules[key]


def fixture(name: str) -> Any:
    """A fixture of a test's module: the script."""

    @pytest.fixture(scope="module")
    def script() -> Iterator[Any]:
        with imported(name) as module:
            yield module

    return script
