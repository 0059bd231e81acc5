"""What ``import spikeless`` gives, and what it does not cost."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys

import pytest
from places import ROOT

import spikeless

HEAVY = ("tensorflow", "numpy", "grpc", "google", "click")


@pytest.mark.parametrize("name", spikeless.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(spikeless, name) is not None
    assert name in dir(spikeless)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'spikeless' has no attribute 'no_such_name'"):
        spikeless.no_such_name  # noqa: B018 (it raises)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(inspect.getsource(spikeless))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    declared = {alias.name: str(node.module) for node in imports for alias in node.names}
    assert {*declared, "__version__"} == {*spikeless.__all__}
    for name, module in declared.items():
        value = getattr(spikeless, name)
        assert getattr(importlib.import_module(module), name) is value


def test_the_import_is_light() -> None:
    program = (
        "import sys, time; started = time.process_time(); import spikeless\n"
        "assert time.process_time() - started < 0.2\n"
        f"print(*({{name.partition('.')[0] for name in sys.modules}} & {{*{HEAVY!r}}}), "
        "*(name for name in sys.modules if name.startswith('spikeless.')))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


def test_no_two_public_classes_share_a_name() -> None:
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "src" / "spikeless").rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    assert len(found) > 100
    assert {name: files for name, files in found.items() if len(files) > 1} == {}
