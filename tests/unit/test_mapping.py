"""Mapping SavedModels: every kind of export, every refusal, and the memory it is about."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spikeless import modelconfig, repository, savedmodel
from spikeless.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SpikelessError,
)
from spikeless.mapping import (
    COPIED_BYTES,
    MANIFEST_FILE,
    MapSettings,
    State,
    check,
    inspect,
    is_mapped,
    map_saved_model,
    read_manifest,
    repin,
    rewrite,
)
from spikeless.mapping.manifest import mapping_nodes
from spikeless.mapping.plan import Plan
from spikeless.runtime import Session

pytestmark = pytest.mark.xdist_group("mapping")

TESTS = Path(__file__).parent.parent
FIXTURES = TESTS / "fixtures" / "tensorflow_2_15"
#: Between the small and the large variables of the models.
MIN_BYTES = 4096
SETTINGS = MapSettings(min_bytes=MIN_BYTES)
#: Models that no comparison can be made with.
REFUSED = {"never_restored", "clock"}


@dataclasses.dataclass(frozen=True)
class Expected:
    mapped: int
    dropped: int = 0
    #: Part of the reason why a variable is not mapped, other than its size.
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)


EXPECTED = {
    "keras3": Expected(2, 9),
    "keras3_shared": Expected(1, 1),
    "module": Expected(2, 1),
    "dtypes": Expected(12, reasons={"text": "DT_STRING is no plain memory"}),
    "written_to": Expected(1, reasons={"counts": "AssignAddVariableOp", "scattered": "ResourceScatterAdd"}),
    "written_in_place": Expected(0, reasons={"table": "InplaceUpdate"}),
    "tables_and_assets": Expected(1, reasons={"Variable": "may write to it"}),
    "no_variables": Expected(0),
    "sharded": Expected(2, 1),
    "sharded_by_size": Expected(1, 2, {"kernel": "is not stored row by row"}),
    "v1_references": Expected(2, 8),
    "v1_resources": Expected(2, 8),
    "v1_control_flow_in_functions": Expected(2, 8),
    "v1_sharded": Expected(2, 8),
    "v1_partitioned_references": Expected(3),
    "v1_partitioned_resources": Expected(3),
    "estimator_like": Expected(2, 1),
    "tensorflow_2_15/keras2": Expected(1, 6),
    "tensorflow_2_15/keras2_export": Expected(3),
    "tensorflow_2_15/estimator": Expected(1, 1),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the models of mapping_models.py, and those that TensorFlow 2.15 exported."""
    directory = tmp_path_factory.mktemp("originals")
    command = [sys.executable, TESTS / "mapping_models.py", directory]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in directory.iterdir() if path.is_dir()} - REFUSED <= EXPECTED.keys()
    shutil.copytree(FIXTURES, directory / FIXTURES.name)
    return directory


@pytest.fixture(scope="module")
def mapped(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same models, mapped, which includes the proof that they answer the same."""
    directory = tmp_path_factory.mktemp("mapped")
    for name in EXPECTED:
        (directory / name).parent.mkdir(exist_ok=True)
        min_bytes = 1024 if name.startswith(FIXTURES.name) else MIN_BYTES
        map_saved_model(originals / name, directory / name, MapSettings(min_bytes=min_bytes))
    return directory


@pytest.mark.parametrize("name", EXPECTED)
def test_each_kind(mapped: Path, originals: Path, name: str) -> None:
    expected, path = EXPECTED[name], mapped / name
    manifest = check(path, str(path))
    states = {state: [v for v in manifest.variables if v.state is state] for state in State}
    assert len(states[State.MAPPED]) == expected.mapped
    assert len(states[State.DROPPED]) == expected.dropped
    reasons = {v.name: v.reason for v in states[State.RESTORED] if "smaller than" not in v.reason}
    assert reasons.keys() == expected.reasons.keys()
    for variable, reason in expected.reasons.items():
        assert reason in reasons[variable]
    for variable in states[State.MAPPED]:
        assert variable.bytes is not None
        assert variable.bytes >= 1024
        assert variable.file is not None
        assert (path / variable.file).stat().st_size == variable.bytes
    assert not [folder for folder, below, files in os.walk(path) if not below and not files], (
        "an empty folder"
    )
    # The original is as it was, and nothing is on disk twice.
    assert not is_mapped(originals / name)
    size = lambda root: sum(file.stat().st_size for file in root.rglob("variables.data-*"))  # noqa: E731
    assert size(path) <= size(originals / name)


def test_python_loads_the_mapped_models(originals: Path, mapped: Path) -> None:
    """``tf.saved_model.load`` and ``tf.compat.v1.saved_model.load``."""
    command = [sys.executable, TESTS / "load_in_python.py", originals, mapped, *EXPECTED]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]


def test_sparse_reads_become_dense_reads(mapped: Path) -> None:
    graph = savedmodel.read(mapped / "module").meta_graph().graph_def
    functions = [function.node_def for function in graph.library.function]
    operations = {node.op for nodes in (graph.node, *functions) for node in nodes}
    assert "ResourceGather" not in operations
    assert "ResourceGatherNd" not in operations
    assert {"GatherV2", "GatherNd"} <= operations


def test_what_no_server_needs_is_gone(mapped: Path, originals: Path) -> None:
    def names(path: Path) -> set[str]:
        graph = savedmodel.read(path).meta_graph().graph_def
        return {
            f.signature.name.split("_")[-2] for f in graph.library.function if "traced" in f.signature.name
        }

    assert names(originals / "keras3") == {"save", "restore"}
    assert names(mapped / "keras3") == {"restore"}
    nodes = savedmodel.read(mapped / "v1_references").meta_graph().graph_def.node
    assert not [node.op for node in nodes if node.op in ("SaveV2", "ApplyAdam", "VariableV2")][1:]


def test_the_training_graph_is_left_alone(mapped: Path, originals: Path) -> None:
    graphs = [
        next(
            g
            for g in savedmodel.read(root / "estimator_like").proto.meta_graphs
            if "train" in g.meta_info_def.tags
        )
        for root in (mapped, originals)
    ]
    assert graphs[0] == graphs[1]
    Session.load(mapped / "estimator_like", ("train",)).close()


@pytest.mark.parametrize(
    "name", ["keras3", "module", "v1_references", "tables_and_assets", "tensorflow_2_15/keras2_export"]
)
def test_optimized(originals: Path, tmp_path: Path, name: str) -> None:
    """The same answers, which writing it proves, from a graph that asks not to be optimised again."""
    settings = MapSettings(min_bytes=1024, optimize=True)
    manifest = map_saved_model(originals / name, tmp_path / "out", settings)
    assert manifest.optimized
    assert len(manifest.mapped_files()) >= EXPECTED[name].mapped
    assert modelconfig.path_in(tmp_path / "out").read_bytes() == bytes.fromhex("0a021801")
    config = modelconfig.session_config(tmp_path / "out")
    assert config.graph_options.rewrite_options.disable_meta_optimizer
    # Calls are inlined; what restores is left alone.
    before, after = (
        savedmodel.read(path).meta_graph().graph_def for path in (originals / name, tmp_path / "out")
    )
    assert len(after.library.function) < len(before.library.function)
    assert sum(1 for _ in mapping_nodes(savedmodel.read(tmp_path / "out").proto)) == len(
        [variable for variable in manifest.variables if variable.state is State.MAPPED]
    )


def test_a_damaged_model_configuration_is_refused(tmp_path: Path) -> None:
    modelconfig.disable_optimizer(tmp_path)
    modelconfig.path_in(tmp_path).write_bytes(b"\x0a\x09")
    with pytest.raises(InvalidArgument, match="no SavedModelConfig"):
        modelconfig.session_config(tmp_path)


def test_odd_paths(originals: Path, tmp_path: Path) -> None:
    out = tmp_path / "versions of ü, 100 %20" / "1"
    out.parent.mkdir()
    map_saved_model(originals / "module", out, SETTINGS)
    Session.load(out).close()
    moved = out.rename(out.parent / "späte Nr. 2")
    with pytest.raises(SpikelessError):
        Session.load(moved)
    with pytest.raises(FailedPrecondition, match="--repin"):
        check(moved, str(moved))
    repin(moved)
    check(moved, str(moved))
    Session.load(moved).close()


def test_paths_are_those_of_the_server(originals: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = dataclasses.replace(SETTINGS, serving_root="/models/a b/7/")
    map_saved_model(originals / "v1_resources", out, settings)
    paths = {node.attr["memory_region_name"].s.decode() for node in mapping_nodes(savedmodel.read(out).proto)}
    assert paths == {f"/models/a b/7/{file.path}" for file in read_manifest(out).mapped_files()}
    check(out, "/models/a b/7")
    repin(out)
    check(out, str(out))


def test_assets_and_warmup_go_along(originals: Path, mapped: Path, tmp_path: Path) -> None:
    path = mapped / "tables_and_assets"
    assert [file.name for file in (path / "assets").iterdir()] == ["tables_and_assets-vocabulary.txt"]
    source = tmp_path / "source"
    shutil.copytree(originals / "no_variables", source)
    (source / "assets.extra").mkdir()
    (source / "assets.extra" / "note.txt").write_text("kept")
    map_saved_model(source, tmp_path / "out", SETTINGS)
    extra = {file.name for file in (tmp_path / "out" / "assets.extra").iterdir()}
    assert extra == {"note.txt", MANIFEST_FILE}


@pytest.mark.parametrize(
    ("name", "damage", "error", "message"),
    [
        ("never_restored", None, FailedPrecondition, "answers no request"),
        ("clock", None, FailedPrecondition, "does not even answer as itself"),
        ("absent", None, NotFound, "does not exist"),
        (
            "module",
            lambda path: (path / "saved_model.pb").write_bytes(b"?"),
            InvalidArgument,
            "saved_model.pb",
        ),
        (
            "module",
            lambda path: (path / "variables" / "variables.index").unlink(),
            NotFound,
            "variables.index",
        ),
        ("module", lambda path: _cut(path), DataLoss, "data-00000-of-00001 ends"),
        ("module", lambda path: _without_signatures(path), FailedPrecondition, "no signature"),
        (
            "module",
            lambda path: _tagged(path, "gpu"),
            FailedPrecondition,
            "no meta graph for serving on CPUs",
        ),
    ],
)
def test_refusals_write_nothing(
    originals: Path, tmp_path: Path, name: str, damage: Callable | None, error: type, message: str
) -> None:
    source, out = originals / name, tmp_path / "out" / "1"
    out.parent.mkdir()
    if damage is not None:
        source = shutil.copytree(source, tmp_path / name)
        damage(source)
    with pytest.raises(error, match=message):
        map_saved_model(source, out, SETTINGS)
    assert not out.exists()
    assert not list(out.parent.rglob("*.data-*"))


def _cut(path: Path) -> None:
    os.truncate(path / "variables" / "variables.data-00000-of-00001", 5000)


def _without_signatures(path: Path) -> None:
    _edit(path, lambda graph: graph.ClearField("signature_def"))


def _tagged(path: Path, tag: str) -> None:
    _edit(path, lambda graph: graph.meta_info_def.tags.append(tag))


def _edit(path: Path, change: Callable) -> None:
    proto = savedmodel.read(path).proto
    change(proto.meta_graphs[0])
    (path / "saved_model.pb").write_bytes(proto.SerializeToString())


def test_what_exists_or_is_mapped_is_refused(originals: Path, mapped: Path, tmp_path: Path) -> None:
    with pytest.raises(AlreadyExists):
        map_saved_model(originals / "module", mapped / "module", SETTINGS)
    with pytest.raises(FailedPrecondition, match="mapped already"):
        map_saved_model(mapped / "module", tmp_path / "out", SETTINGS)
    with pytest.raises(InvalidArgument, match="absolute"):
        map_saved_model(originals / "module", tmp_path / "out", MapSettings(serving_root="models/1"))
    with pytest.raises(NotFound, match="not mapped"):
        repin(originals / "module")
    with pytest.raises(InvalidArgument):
        MapSettings(min_bytes=0)
    assert not (tmp_path / "out").exists()


def test_a_model_that_answers_otherwise_is_refused(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = rewrite.apply

    def broken(plan: Plan, files: dict) -> None:
        apply(plan, files)
        graph = plan.meta_graph.graph_def
        for function in graph.library.function:
            for node in function.node_def:
                if node.op == "Sum":
                    node.op = "Mean"

    monkeypatch.setattr(rewrite, "apply", broken)
    with pytest.raises(FailedPrecondition, match="mapped, it answers request"):
        map_saved_model(originals / "module", tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda file: file.unlink(), NotFound, "is missing"),
        (lambda file: os.truncate(file, 100), DataLoss, "has 100 bytes instead of 32768"),
        (lambda file: _flip(file), DataLoss, "has changed"),
    ],
)
def test_check_names_the_file(
    mapped: Path, tmp_path: Path, damage: Callable, error: type, message: str
) -> None:
    path = shutil.copytree(mapped / "module", tmp_path / "model")
    file = path / read_manifest(path).mapped_files()[0].path
    file.chmod(0o644)
    damage(file)
    with pytest.raises(error, match=message) as caught:
        check(path, str(path))
    assert file.name in str(caught.value)
    with pytest.raises(error, match=message):
        repin(path)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


def test_a_damaged_manifest_is_refused(mapped: Path, tmp_path: Path) -> None:
    path = shutil.copytree(mapped / "module", tmp_path / "model")
    manifest = path / "assets.extra" / MANIFEST_FILE
    for content in ("{", "[]", '{"format": 99}', '{"format": 1}'):
        manifest.write_text(content)
        with pytest.raises(DataLoss, match="map the model again"):
            read_manifest(path)


def test_inspect_tells_what_mapping_would_do(originals: Path, mapped: Path) -> None:
    before = inspect(originals / "module", min_bytes=MIN_BYTES)
    after = inspect(mapped / "module")
    assert [(v.name, v.state, v.bytes) for v in before] == [(v.name, v.state, v.bytes) for v in after]
    assert all(v.file is None for v in before)


def _spikeless(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spikeless", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


def test_the_command(originals: Path, tmp_path: Path) -> None:
    source, out = originals / "module", tmp_path / "out"
    done = _spikeless("map", source, out, "--min-bytes", "4KiB")
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["mapped", "2"],
        ["restored", "1"],
        ["dropped", "1"],
    ]
    again = _spikeless("map", source, out)
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1] == f"spikeless: error: {out} exists already; give a new folder"
    shown = _spikeless("inspect", out)
    assert shown.returncode == 0, shown.stderr
    assert "variables.data-00002-of-00003" in shown.stdout
    assert "no signature reaches it" in shown.stdout
    told = json.loads(_spikeless("inspect", "--json", out).stdout)
    assert {v["name"]: v["resident"] for v in told["variables"]} == {
        "kernel": 1.0,
        "scale": None,
        "table": 1.0,
        "unused": None,
    }
    moved = out.rename(tmp_path / "moved")
    repinned = _spikeless("map", "--repin", moved, "--json")
    assert json.loads(repinned.stdout)["min_bytes"] == 4096
    check(moved, str(moved))
    for wrong in (
        ("map", source),
        ("map", "--repin", moved, out),
        ("map", source, out, "--min-bytes", "1XiB"),
    ):
        assert _spikeless(*wrong).returncode == 2


def test_killed_at_any_moment_nothing_is_half_there(originals: Path, tmp_path: Path) -> None:
    out = tmp_path / "models" / "1"
    out.parent.mkdir()
    command = [sys.executable, "-m", "spikeless", "map", originals / "module", out, "--min-bytes", "4KiB"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(out.parent.rglob("saved_model.pb")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    map_saved_model(originals / "module", out, SETTINGS)
    check(out, str(out))
    assert not [path for path in (out.parent / ".spikeless").rglob("*") if path.is_dir()], (
        "remains are cleared"
    )


#: Prints which mapped files a loaded model has in its memory.
_MAPS = """
import sys
from spikeless import runtime

with runtime.Session.load(sys.argv[1]), open("/proc/self/maps") as maps:
    print(*sorted({line.split("variables/")[1].strip() for line in maps if "variables.data" in line}))
"""


def test_a_small_mapped_variable_is_copied_and_inspect_says_so(tmp_path: Path) -> None:
    sizes = {"small": COPIED_BYTES - 4096, "large": COPIED_BYTES}
    make = f"""
import tensorflow as tf

class Model(tf.Module):
    def __init__(self):
        for name, size in {sizes}.items():
            setattr(self, name, tf.Variable(tf.range(size // 4, dtype=tf.float32), name=name))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, "ids")])
    def look(self, ids):
        return {{name: tf.gather(getattr(self, name), ids) for name in {list(sizes)}}}

model = Model()
tf.saved_model.save(model, {str(tmp_path / "original")!r}, signatures=model.look)
"""
    subprocess.run([sys.executable, "-c", make], check=True, capture_output=True, timeout=120)
    out = tmp_path / "mapped"
    map_saved_model(tmp_path / "original", out, SETTINGS)
    files = {variable.name: Path(variable.file or "").name for variable in inspect(out)}
    command = [sys.executable, "-c", _MAPS, str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [files["large"]]
    shown = {line.split()[0]: line for line in _spikeless("inspect", out).stdout.splitlines()}
    assert "TensorFlow copies it" in shown["small"]
    assert "TensorFlow copies it" not in shown["large"]


_LARGE = """
import sys
import tensorflow as tf

class Model(tf.Module):
    def __init__(self):
        rows = 2**25 + 64
        self.table = tf.Variable(tf.zeros([rows, 64], tf.int8), name="table")
        for value, row in enumerate([0, 2**25 - 1, 2**25, rows - 1], start=1):
            self.table.scatter_nd_update([[row]], tf.fill([1, 64], tf.constant(value, tf.int8)))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64, "ids")])
    def look(self, ids):
        return {"rows": tf.gather(self.table, ids)}

model = Model()
tf.saved_model.save(model, sys.argv[1], signatures=model.look)
"""

#: Prints a column of the rows before, at and after two gigabytes, and the private memory that loading took.
_LOOK = """
import sys
import numpy as np
from spikeless import runtime

def private():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

runtime.version()
before = private()
with runtime.Session.load(sys.argv[1]) as session:
    signature = session.meta_graph.signature_def["serving_default"]
    ids = np.array([0, 1, 2**25 - 1, 2**25, 2**25 + 62, 2**25 + 63])
    (rows,) = session.run({signature.inputs["ids"].name: ids}, [signature.outputs["rows"].name])
    print(*rows[:, 63], private() - before)
"""


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A folder for gigabytes: in memory where there is room, because some disks take minutes."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < 6 << 30:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


@pytest.mark.xdist_group("large")
def test_a_variable_of_more_than_two_gigabytes(roomy: Path) -> None:
    original, out = roomy / "original", roomy / "mapped"
    command = [sys.executable, "-c", _LARGE, str(original)]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    # The comparison of all outputs is what `_LOOK` does here, with less memory.
    done = _spikeless("map", "--no-verify", original, out)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(original)
    command = [sys.executable, "-c", _LOOK, str(out)]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    *column, private = map(int, found.stdout.split())
    assert column == [1, 0, 2, 3, 0, 4]
    assert private < 64 << 20
    assert tf_loads(out, [0, 2**25 - 1, 2**25 + 63]) == [1, 2, 4]


def tf_loads(model: Path, ids: list[int]) -> list[int]:
    """A column of these rows, from the model as Python's TensorFlow loads it."""
    code = (
        "import sys, tensorflow as tf; model = tf.saved_model.load(sys.argv[1]); "
        f"print(*model.signatures['serving_default'](ids=tf.constant({ids}, tf.int64))['rows'].numpy()[:, 0])"
    )
    command = [sys.executable, "-c", code, str(model)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    return [int(word) for word in done.stdout.split()]


#: Loads a model and runs it from four threads. Prints its private memory beyond the bare runtime's in bytes,
#: and how often its parameters' file is mapped, then and after it is closed.
_MEMORY = """
import sys, threading
from spikeless import runtime

def private():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def mappings():
    with open("/proc/self/maps") as maps:
        return sum("variables.data-00001" in line for line in maps)

runtime.version()
before = private()
with runtime.Session.load(sys.argv[1]) as session:
    signature = session.meta_graph.signature_def["serving_default"]
    fetches = [info.name for info in signature.outputs.values()]
    def ask(seed):
        random = np.random.default_rng(seed)
        for _ in range(50):
            ids = random.integers(0, 1 << 18, (8, 4)).astype(np.int32)
            session.run({signature.inputs["ids"].name: ids}, fetches)
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(private() - before, mappings())
print(mappings())
"""


@pytest.mark.parametrize(("kind", "optimize"), [("module", False), ("module", True), ("references", False)])
def test_private_memory(tmp_path: Path, kind: str, optimize: bool) -> None:
    """No copy of the parameters is made, at load or later, with sparse and dense reads at once."""
    size = (1 << 18) * 64 * 4
    command = [sys.executable, TESTS / "mapping_models.py", "--large", kind, tmp_path / "stock"]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    manifest = map_saved_model(tmp_path / "stock", tmp_path / "mapped", MapSettings(optimize=optimize))
    assert [v.bytes for v in manifest.variables if v.state is State.MAPPED] == [size]

    def measure(name: str) -> list[int]:
        command = [sys.executable, "-c", _MEMORY, tmp_path / name]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
        return [int(number) for number in done.stdout.split()]

    private, mappings, afterwards = measure("stock")
    assert private > size
    assert (mappings, afterwards) == (0, 0)
    private, mappings, afterwards = measure("mapped")
    assert private < size / 4
    assert (mappings, afterwards) == (1, 0)


def test_publish_maps_and_pins(originals: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    done = _spikeless(
        "publish", originals / "module", "--name", "m", "--models", models, "--map", "--min-bytes", "4KiB"
    )
    assert done.returncode == 0, done.stderr
    version = models / "m" / "1"
    assert done.stdout == f"{version}\n"
    manifest = check(version, str(version))
    assert len(manifest.mapped_files()) == 2
    assert all((version / file.path).stat().st_mode & 0o222 == 0 for file in manifest.mapped_files())
    Session.load(version).close()
    # A version that is mapped is pinned anew, here to where a container sees it.
    second = repository.publish(version, models, "m", serving_root="/models")
    assert all((second / file.path).stat().st_mode & 0o222 == 0 for file in manifest.mapped_files())
    check(second, "/models/m/2")
    assert {file.name for file in (models / "m").iterdir()} == {"1", "2", ".spikeless"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "data-00001-of-00003 is missing|2 of the 3 data files"),
        (lambda file: os.truncate(file, 100), "data-00001-of-00003 has 100 bytes instead of 32768"),
        (lambda file: _flip(file), "data-00001-of-00003 has changed"),
    ],
)
def test_publish_refuses_damaged_files(mapped: Path, tmp_path: Path, damage: Callable, message: str) -> None:
    source = shutil.copytree(mapped / "module", tmp_path / "source")
    file = source / "variables" / "variables.data-00001-of-00003"
    file.chmod(0o644)
    damage(file)
    with pytest.raises(SpikelessError, match=message):
        repository.publish(source, tmp_path / "models", "m")
    assert not repository.versions(tmp_path / "models", "m")
