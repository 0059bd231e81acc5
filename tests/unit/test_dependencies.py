"""The package declares what it imports, and says which extra is missing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from places import ROOT
from update_pins import FILES, PLATFORMS, PYTHONS, applies

from spikeless.errors import EXTRAS
from spikeless.launch import free_port
from spikeless.store.libraries import LIBRARIES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
BASE = [Requirement(line) for line in PROJECT["dependencies"]]
OPTIONAL = {
    extra: [Requirement(line) for line in lines] for extra, lines in PROJECT["optional-dependencies"].items()
}
#: Of each extra, without other extras that it includes.
FOREIGN = {
    extra: [requirement for requirement in OPTIONAL[extra] if requirement.name != PROJECT["name"]]
    for extra in EXTRAS
}
DECLARED = [*BASE, *(requirement for extra in EXTRAS for requirement in FOREIGN[extra])]
DEVELOPMENT = [Requirement(line) for line in PYPROJECT["dependency-groups"]["dev"]]
PACKAGES = packages_distributions()


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def distributions(module: str) -> set[str]:
    """What installs a module, or what is named like it where it is not installed."""
    return {canonicalize_name(name) for name in PACKAGES.get(module, [module])}


def imported(file: Path) -> Iterator[str]:
    """The top-level modules that a file imports anywhere."""
    for node in ast.walk(ast.parse(file.read_text())):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found = [node.module]
        for name in found:
            yield name.partition(".")[0]


def test_what_is_imported_is_declared() -> None:
    own = {"spikeless", *(path.stem for path in (ROOT / "training").glob("*.py"))}
    files = {*(ROOT / "src").rglob("*.py"), *(ROOT / "training").glob("*.py")}
    modules = {module for file in files for module in imported(file)} - own - sys.stdlib_module_names
    modules.remove("tf2crf")  # No extra can name it, see pyproject.toml.
    assert modules > {"google", "gevent", "ml_dtypes"}
    assert {module for module in modules if not distributions(module) & names(DECLARED)} == set()
    # Nothing that is declared is there for nothing. What a kind of store needs, fsspec
    # imports.
    used = {name for module in {*modules, *LIBRARIES.values()} for name in distributions(module)}
    assert names(DECLARED) <= used


@pytest.mark.parametrize("name", FILES)
def test_pins_are_in_the_ranges(name: str) -> None:
    pins = [Requirement(line) for line in (ROOT / name).read_text().splitlines() if line[0] != "#"]
    held_back = [Requirement(line) for line in FILES[name]]
    for platform in PLATFORMS:
        pinned: dict[str, str] = {}
        for pin in pins:
            if applies(pin, platform):
                (exactly,) = pin.specifier
                assert exactly.operator == "=="
                assert pinned.setdefault(canonicalize_name(pin.name), exactly.version) == exactly.version
        for requirement in [*DECLARED, *DEVELOPMENT, *held_back]:
            if applies(requirement, platform):
                version = pinned[canonicalize_name(requirement.name)]
                assert requirement.specifier.contains(version), (requirement, platform)


def tensorflow_pins() -> list[Version]:
    """The newest and the oldest TensorFlow."""
    pins = [re.findall(r"^tensorflow==(.*)$", (ROOT / name).read_text(), re.MULTILINE) for name in FILES]
    return [Version(version) for (version,) in pins]


def test_pins_of_tensorflow_are_both_ends_of_its_range() -> None:
    (wanted,) = (requirement.specifier for requirement in BASE if requirement.name == "tensorflow")
    newest, oldest = tensorflow_pins()
    assert wanted == SpecifierSet(f">={oldest.major}.{oldest.minor},<{newest.major}.{newest.minor + 1}")


def test_tf2crf_is_named_with_the_version_that_is_tested() -> None:
    (tf2crf,) = (str(requirement) for requirement in DEVELOPMENT if requirement.name == "tf2crf")
    for file in ("src/spikeless/training/crf.py", "docs/how-to/train.md"):
        assert f"pip install --no-deps {tf2crf}`" in (ROOT / file).read_text()


def test_pins_are_for_every_python_that_is_supported() -> None:
    minors = [version.minor for version in map(Version, PYTHONS)]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert PROJECT["requires-python"] == f">=3.{minors[0]},<3.{minors[-1] + 1}"
    readme = (ROOT / "README.md").read_text()
    assert f"Python 3.{minors[0]} to 3.{minors[-1]} " in readme


def test_the_support_page_says_what_is_pinned() -> None:
    page = (ROOT / "docs" / "reference" / "support.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|", page, re.MULTILINE)
    said = [version for what, version in rows if what == "TensorFlow"]
    assert said == [f"{pin.major}.{pin.minor}" for pin in tensorflow_pins()]
    pythons = [version for what, versions in rows if what == "Python" for version in versions.split(", ")]
    assert sorted(pythons, key=Version) == list(PYTHONS)
    (serving,) = (version for what, version in rows if what == "TensorFlow Serving")
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    assert f"ARG TF_SERVING_VERSION={serving}." in dockerfile


def test_extras_install_what_they_say() -> None:
    # Nothing of the package imports what builds its documentation.
    assert OPTIONAL.keys() == {*EXTRAS, "all", "docs"}
    assert {extra: names(of) for extra, of in FOREIGN.items()} == {
        extra: {name for module in modules for name in distributions(module)}
        for extra, modules in EXTRAS.items()
    }
    (everything,) = OPTIONAL["all"]
    assert everything.extras == set(EXTRAS)
    page = (ROOT / "docs" / "reference" / "installation.md").read_text()
    table = page.partition("| extra |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [*EXTRAS, "all"]


def run_without(modules: tuple[str, ...], program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    block = f"import sys; sys.modules.update(dict.fromkeys({modules!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", block + program], cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_the_base_does_without_extras(tmp_path: Path) -> None:
    commands = "train warmup publish follow map keep inspect capture promote rollback status prune"
    commands += " serve exporter"
    program = "\n".join(f"import spikeless.cli.{command}" for command in commands.split())
    every = tuple(module for modules in EXTRAS.values() for module in modules)
    done = run_without(every, program, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("extra", "arguments"),
    [
        (
            "serve",
            ["serve", "--model_config_file=models.config", "--port=0", f"--rest_api_port={free_port()}"],
        ),
        ("bench", ["report", "raw"]),
        ("bench", ["bench", "run", "boston", "--requests=none"]),
        ("train", ["train", "one"]),
        ("fleet", ["push", "models/ctr/1", "store"]),
        ("s3", ["pull", "s3://bucket/models"]),
        ("sftp", ["pull", "sftp://host/models"]),
        ("mlflow", ["publish", "models:/ctr@champion"]),
        ("mlflow", ["follow", "models:/ctr@champion"]),
    ],
)
def test_a_missing_extra_is_named(extra: str, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "models.config").write_text("model_config_list {}")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "train_one.py").write_text("import sklearn.datasets\n")
    program = f"from spikeless.cli import main; main({arguments!r})"
    done = run_without(EXTRAS[extra], program, tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("spikeless: error: ")
    assert done.stderr.endswith(f" is not installed: run `pip install 'spikeless[{extra}]'`\n")
