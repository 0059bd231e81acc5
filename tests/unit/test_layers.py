"""The shape of the package: modules import only downwards, and the cheap parts stay cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spikeless

ROOT = Path(spikeless.__file__).parent


def _imports(file: Path) -> set[str]:
    """The modules of this package that a module imports at its top level."""
    tree = ast.parse(file.read_text())
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "spikeless":
            package = node.module.split(".")[1:]
            if package:
                found.add(package[0])
            else:
                found |= {alias.name for alias in node.names if (ROOT / f"{alias.name}.py").exists()}
                found |= {alias.name for alias in node.names if (ROOT / alias.name).is_dir()}
    return found


def _graph() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for file in sorted(ROOT.rglob("*.py")):
        relative = file.relative_to(ROOT)
        unit = relative.parts[0].removesuffix(".py")
        if unit not in ("__init__", "__main__"):
            graph.setdefault(unit, set()).update(_imports(file) - {unit})
    return graph


def test_modules_import_only_downwards() -> None:
    graph = _graph()
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {unit for unit, needs in graph.items() if unit not in done and needs <= done}
        assert ready, f"these modules import each other in a circle: {sorted(set(graph) - done)}"
        done |= ready


@pytest.mark.parametrize("upper", ["cli", "report", "bench"])
def test_nothing_below_reaches_up(upper: str) -> None:
    above = {"cli": set(), "report": {"cli"}, "bench": {"cli", "report"}}[upper] | {"demo", "ladder"}
    users = {unit for unit, needs in _graph().items() if upper in needs}
    assert users <= above, f"{sorted(users - above)} must not import {upper}"


@pytest.mark.parametrize(
    "statement",
    [
        "from spikeless.cli import cli",
        "import spikeless.formats.protos",
        "import spikeless.engine.server",
        "import spikeless.warmup",
        "import spikeless.client",
        "import spikeless.bench, spikeless.bench.report",
        "import spikeless.bench.load.locustfile",
    ],
)
def test_tensorflow_is_not_imported(statement: str) -> None:
    program = f"{statement}\nimport sys\nassert 'tensorflow.python' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_tensorflow_can_still_be_imported_afterwards() -> None:
    program = (
        "import spikeless.formats.protos, tensorflow as tf\n"
        "assert tf.add(1, 1).numpy() == 2\n"
        "from tensorflow.core.framework import tensor_pb2\n"
        "assert tensor_pb2 is spikeless.formats.protos.tensor_pb2\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_server_does_without_libraries_that_it_does_not_use() -> None:
    """They would be private memory of every server, with metrics and REST or without."""
    program = (
        "import sys, spikeless.cli.serve\n"
        "assert not {'prometheus_client', 'waitress', 'rich'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
