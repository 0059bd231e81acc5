"""Mapping SavedModels: every kind of export, every refusal, and the memory taken."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from places import FIXTURES, SUPPORT

from spikeless.cli.map import summary
from spikeless.disk import pages
from spikeless.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SpikelessError,
)
from spikeless.formats import savedmodel, session_overrides
from spikeless.formats.checkpoint import Pieces
from spikeless.formats.protos import types_pb2
from spikeless.mapping import (
    COPIED_BYTES,
    MANIFEST_FILE,
    MapSettings,
    VariableState,
    check,
    inspect,
    is_mapped,
    map_saved_model,
    read_manifest,
    repin,
    rewrite,
)
from spikeless.mapping.manifest import mapping_nodes
from spikeless.mapping.plan import MappingPlan
from spikeless.repository import layout, publishing
from spikeless.repository.candidate import Candidate
from spikeless.repository.gates import Gate
from spikeless.runtime import Session

#: The generated classes have no types.
MetaGraphDef: TypeAlias = Any
NodeDef: TypeAlias = Any

pytestmark = pytest.mark.xdist_group("mapping")

TENSORFLOW_2_15 = FIXTURES / "tensorflow_2_15"
#: Between the small and the large variables of the models.
MIN_BYTES = 4096
SETTINGS = MapSettings(min_bytes=MIN_BYTES)
#: Models that no comparison can be made with.
REFUSED = {"never_restored", "clock"}
#: tf.saved_model.load renames each handle, so that those that share a variable do not
#: find it any more, in the original neither.
NOT_IN_PYTHON = {"v1_unusual"}


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
    "looked_up": Expected(6),
    "v1_references": Expected(2, 8),
    "v1_resources": Expected(2, 8),
    "v1_control_flow_in_functions": Expected(2, 8),
    "v1_sharded": Expected(2, 8),
    "v1_partitioned_references": Expected(3),
    "v1_partitioned_resources": Expected(3),
    "v1_several_graphs": Expected(3, 1),
    "v1_unusual": Expected(
        1,
        reasons={
            "doubled": "what is restored is not what the checkpoint holds",
            "shared": "several operations create it under one name",
            "again": "several operations create it under one name",
            "inside": "it is created inside function",
        },
    ),
    "estimator_like": Expected(2, 1),
    "tensorflow_2_15/keras2": Expected(1, 6),
    "tensorflow_2_15/keras2_export": Expected(3),
    "tensorflow_2_15/estimator": Expected(1, 1),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of mapping_models.py, and those that TensorFlow 2.15 exported."""
    directory = tmp_path_factory.mktemp("originals")
    command: list[str | Path] = [sys.executable, SUPPORT / "mapping_models.py", directory]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in directory.iterdir() if path.is_dir()} - REFUSED <= EXPECTED.keys()
    shutil.copytree(TENSORFLOW_2_15, directory / TENSORFLOW_2_15.name)
    return directory


@pytest.fixture(scope="module")
def mapped(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same models, mapped, which includes the proof that they answer the same."""
    directory = tmp_path_factory.mktemp("mapped")
    for name in EXPECTED:
        (directory / name).parent.mkdir(exist_ok=True)
        min_bytes = 1024 if name.startswith(TENSORFLOW_2_15.name) else MIN_BYTES
        map_saved_model(originals / name, directory / name, MapSettings(min_bytes=min_bytes))
    return directory


@pytest.mark.parametrize("name", EXPECTED)
def test_each_kind(mapped: Path, originals: Path, name: str) -> None:
    expected, path = EXPECTED[name], mapped / name
    manifest = check(path, str(path))
    states = {state: [v for v in manifest.variables if v.state is state] for state in VariableState}
    assert len(states[VariableState.MAPPED]) == expected.mapped
    assert len(states[VariableState.DROPPED]) == expected.dropped
    reasons = {v.name: v.reason for v in states[VariableState.RESTORED] if "smaller than" not in v.reason}
    assert reasons.keys() == expected.reasons.keys()
    for variable_name, reason in expected.reasons.items():
        assert reason in reasons[variable_name]
    for variable in states[VariableState.MAPPED]:
        assert variable.bytes is not None
        assert variable.bytes >= 1024
        assert variable.file is not None
        assert (path / variable.file).stat().st_size == variable.bytes
    assert not [folder for folder, below, files in os.walk(path) if not below and not files], (
        "an empty folder"
    )
    # The original is as it was, and nothing is on disk twice.
    assert not is_mapped(originals / name)
    assert _data_bytes(path) <= _data_bytes(originals / name)


def _data_bytes(root: Path) -> int:
    return sum(file.stat().st_size for file in root.rglob("variables.data-*"))


def test_python_loads_the_mapped_models(originals: Path, mapped: Path) -> None:
    """``tf.saved_model.load`` and ``tf.compat.v1.saved_model.load``."""
    names = EXPECTED.keys() - NOT_IN_PYTHON
    command: list[str | Path] = [
        sys.executable,
        SUPPORT / "load_in_python.py",
        originals,
        mapped,
        *sorted(names),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]


def test_sparse_reads_become_dense_reads(mapped: Path) -> None:
    graph = savedmodel.read(mapped / "module").meta_graph().graph_def
    functions = [function.node_def for function in graph.library.function]
    operations = {node.op for nodes in (graph.node, *functions) for node in nodes}
    assert "ResourceGather" not in operations
    assert "ResourceGatherNd" not in operations
    assert {"GatherV2", "GatherNd"} <= operations


@pytest.mark.parametrize(
    ("name", "looked_up"),
    [
        ("looked_up", {"one_way", "other_ways", "in_segments"}),
        ("keras3", {"embedding/embeddings_1"}),
        ("keras3_shared", set()),
        ("module", set()),
        ("v1_several_graphs", {"table"}),
        ("estimator_like", {"linear/input_layer/embedding_weights"}),
        ("tensorflow_2_15/keras2_export", {"embedding/embeddings"}),
    ],
)
def test_what_is_only_looked_up_is_known(mapped: Path, name: str, looked_up: set[str]) -> None:
    manifest = read_manifest(mapped / name)
    variables = [variable for variable in manifest.variables if variable.state is VariableState.MAPPED]
    assert {variable.name for variable in variables if variable.by_row} == looked_up
    files = {variable.file for variable in variables if variable.name in looked_up}
    assert set(manifest.files_read_by_row()) == files


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


def test_each_meta_graph_for_cpus_is_mapped_from_the_same_files(mapped: Path, originals: Path) -> None:
    name = "v1_several_graphs"
    variables = inspect(mapped / name)
    files = {
        (variable.name, variable.file) for variable in variables if variable.state is VariableState.MAPPED
    }
    assert {variable.tags for variable in variables} == {("serve",), ("quick", "serve")}
    assert len(files) == 2, "table in both graphs, kernel in one"
    with Session.load(mapped / name, ("serve", "quick")) as session:
        assert "serving_default" in session.meta_graph.signature_def
    assert savedmodel.read(mapped / name).meta_graph(("serve", "gpu")) == savedmodel.read(
        originals / name
    ).meta_graph(("serve", "gpu"))
    shown = _spikeless("inspect", mapped / name).stdout
    assert "table (quick,serve)" in shown
    assert "table (serve)" in shown


@pytest.mark.parametrize(
    "name", ["keras3", "module", "v1_references", "tables_and_assets", "tensorflow_2_15/keras2_export"]
)
def test_optimized(originals: Path, tmp_path: Path, name: str) -> None:
    """The same answers, as writing it proves, from a graph optimised only once."""
    settings = MapSettings(min_bytes=1024, optimize=True)
    manifest = map_saved_model(originals / name, tmp_path / "out", settings)
    assert manifest.optimized
    assert len(manifest.mapped_files()) >= EXPECTED[name].mapped
    assert session_overrides.path_in(tmp_path / "out").read_bytes() == bytes.fromhex("0a021801")
    config = session_overrides.session_config(tmp_path / "out")
    assert config.graph_options.rewrite_options.disable_meta_optimizer
    # Calls are inlined, layers fused as a server would, without a word about its
    # devices.
    before, after = (
        savedmodel.read(path).meta_graph().graph_def for path in (originals / name, tmp_path / "out")
    )
    assert len(after.library.function) < len(before.library.function)
    if "keras" in name:
        assert "_FusedMatMul" in {node.op for node in after.node}
    assert {node.device for node in after.node} <= {node.device for node in before.node} | {""}
    assert sum(1 for _ in mapping_nodes(savedmodel.read(tmp_path / "out").proto)) == len(
        [variable for variable in manifest.variables if variable.state is VariableState.MAPPED]
    )


def test_a_damaged_model_configuration_is_refused(tmp_path: Path) -> None:
    session_overrides.disable_optimizer(tmp_path)
    session_overrides.path_in(tmp_path).write_bytes(b"\x0a\x09")
    with pytest.raises(InvalidArgument, match="no SavedModelConfig"):
        session_overrides.session_config(tmp_path)


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
    originals: Path,
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], object] | None,
    error: type,
    message: str,
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


def _edit(path: Path, change: Callable[[MetaGraphDef], None]) -> None:
    proto = savedmodel.read(path).proto
    change(proto.meta_graphs[0])
    (path / "saved_model.pb").write_bytes(proto.SerializeToString())


def _restoring(graph: MetaGraphDef, variable: str) -> tuple[NodeDef, NodeDef]:
    """The assignment that restores a reference variable, and what waits for all."""
    nodes = {node.name: node for node in graph.graph_def.node}
    shard = nodes["save/restore_shard"]
    restoring = [nodes[name.removeprefix("^")] for name in shard.input]
    return next(node for node in restoring if node.input[0] == variable), shard


def _restore_twice(graph: MetaGraphDef) -> None:
    assign, shard = _restoring(graph, "table")
    twin = graph.graph_def.node.add()
    twin.CopyFrom(assign)
    twin.name = "twin"
    shard.input.append("^twin")


def _use_the_assignment(graph: MetaGraphDef) -> None:
    assign, shard = _restoring(graph, "table")
    use = graph.graph_def.node.add(name="use", op="Identity", input=[assign.name])
    use.attr["T"].CopyFrom(assign.attr["T"])
    shard.input.append("^use")


def _restore_nothing(graph: MetaGraphDef) -> None:
    assign, shard = _restoring(graph, "table")
    shard.input.remove(f"^{assign.name}")


def _feed_the_names(graph: MetaGraphDef) -> None:
    for node in graph.graph_def.node:
        if node.op == "RestoreV2":
            names = node.input[1].partition(":")[0]
            (constant,) = (other for other in graph.graph_def.node if other.name == names)
            constant.op = "Placeholder"


def _declare_half(graph: MetaGraphDef) -> None:
    (table,) = (node for node in graph.graph_def.node if node.name == "table")
    table.attr["dtype"].type = types_pb2.DT_HALF


def _name_in_signature(graph: MetaGraphDef) -> None:
    graph.signature_def["serving_default"].outputs["table"].name = "table:0"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_name_in_signature, "a signature names it"),
        (_restore_twice, "it is restored more than once"),
        (_use_the_assignment, "the result of its assignment is used"),
        (_restore_nothing, "nothing restores it"),
        (_feed_the_names, "the names to restore are not constant"),
        (_declare_half, "the checkpoint holds DT_FLOAT for it"),
    ],
)
def test_what_is_restored_in_an_unusual_way_is_left_alone(
    originals: Path, tmp_path: Path, change: Callable[[MetaGraphDef], None], reason: str
) -> None:
    path = shutil.copytree(originals / "v1_references", tmp_path / "model")
    assert _reason(path, "table") == ""
    _edit(path, change)
    assert _reason(path, "table") == reason


def _reason(path: Path, name: str) -> str:
    (variable,) = (variable for variable in inspect(path, MIN_BYTES) if variable.name == name)
    assert (variable.state is VariableState.MAPPED) == (not variable.reason)
    return variable.reason


def test_nothing_to_compare_on_is_refused(originals: Path, tmp_path: Path) -> None:
    records = tmp_path / "records"
    records.touch()
    with pytest.raises(FailedPrecondition, match="records holds no request to compare"):
        map_saved_model(originals / "module", tmp_path / "out", MapSettings(MIN_BYTES, records=records))
    assert not (tmp_path / "out").exists()


def test_what_tensorflow_cannot_optimise_is_refused(originals: Path, tmp_path: Path) -> None:
    path = shutil.copytree(originals / "v1_resources", tmp_path / "model")

    def name_what_is_not_there(graph: MetaGraphDef) -> None:
        graph.signature_def["serving_default"].outputs["odd"].name = "nowhere:0"

    _edit(path, name_what_is_not_there)
    with pytest.raises(FailedPrecondition, match="cannot be optimised, so leave --optimize out"):
        map_saved_model(path, tmp_path / "out", MapSettings(MIN_BYTES, optimize=True, verify=False))
    assert not (tmp_path / "out").exists()


def test_what_the_file_system_refuses_is_told(originals: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FailedPrecondition, match=r"cannot map .*: Not a directory"):
        map_saved_model(originals / "module", tmp_path / "file" / "out", SETTINGS)
    done = _spikeless("inspect", tmp_path / "file" / "model")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)


def test_mapping_beside_versions_leaves_alone_what_is_being_published(
    originals: Path, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SETTINGS, verify=False)
    with publishing.stage(originals / "module", tmp_path, "m", gates=()) as candidate:
        map_saved_model(originals / "module", tmp_path / "m" / "7", settings)
        assert candidate.publish() == tmp_path / "m" / "1"
    assert set(layout.versions(tmp_path, "m")) == {1, 7}


def test_everything_is_on_the_disk_before_it_has_its_name(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    sync, rename = os.fsync, os.rename

    def noted(descriptor: int) -> None:
        sync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def named(staged: Path, out: Path) -> None:
        present = {path.stat().st_ino for path in (staged, *Path(staged).rglob("*"))}
        assert present <= synced
        synced.clear()
        rename(staged, out)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", named)
    map_saved_model(originals / "tables_and_assets", tmp_path / "out", SETTINGS)
    assert (tmp_path / "out").is_dir()
    assert tmp_path.stat().st_ino in synced, "the folder that holds the name"


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

    def broken(plan: MappingPlan, files: Mapping[Pieces, str]) -> None:
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
    mapped: Path, tmp_path: Path, damage: Callable[[Path], object], error: type, message: str
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


def test_check_finds_a_file_that_the_graph_does_not_map(mapped: Path, tmp_path: Path) -> None:
    path = shutil.copytree(mapped / "v1_resources", tmp_path / "model")
    repin(path)
    proto = savedmodel.read(path).proto
    first, second = mapping_nodes(proto)
    second.attr["memory_region_name"].s = first.attr["memory_region_name"].s
    (path / "saved_model.pb").write_bytes(proto.SerializeToString())
    with pytest.raises(FailedPrecondition, match=r"the graph does not map .*variables\.data-"):
        check(path, str(path))


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


def test_a_damaged_manifest_is_refused(mapped: Path, tmp_path: Path) -> None:
    path = shutil.copytree(mapped / "module", tmp_path / "model")
    manifest = path / "assets.extra" / MANIFEST_FILE
    good = json.loads(manifest.read_text())
    file = good["files"][0]
    for content in (
        *("{", "[]", '{"format": 99}', '{"format": 1}', "[" * 100_000),
        *(
            json.dumps({**good, "files": [{**file, **changes}]})
            for changes in ({"path": "/etc/passwd"}, {"path": "../a"}, {"path": 1}, {"size": "1"})
        ),
        *(
            json.dumps({**good, "variables": [{**good["variables"][0], "file": other}]})
            for other in (1, ["a"], "/etc/passwd")
        ),
    ):
        manifest.write_text(content)
        with pytest.raises(DataLoss, match="map the model again"):
            read_manifest(path)


def test_inspect_tells_what_mapping_would_do(originals: Path, mapped: Path) -> None:
    before = inspect(originals / "module", min_bytes=MIN_BYTES)
    after = inspect(mapped / "module")
    assert [(v.name, v.state, v.bytes) for v in before] == [(v.name, v.state, v.bytes) for v in after]
    assert all(v.file is None for v in before)


def _spikeless(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spikeless", *map(str, arguments)]
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, timeout=240, **options
    )
    return done


def test_the_command(originals: Path, tmp_path: Path) -> None:
    source, out = originals / "module", tmp_path / "out"
    done = _spikeless("map", source, out, "--min-bytes", "4KiB")
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["mapped", "2"],
        ["restored", "1"],
        ["dropped", "1"],
        ["compared", "14"],
    ]
    manifest = read_manifest(out)
    assert manifest.compared == 14, "two for each signature"
    assert "compared     14 requests, all" in summary(manifest)
    assert "compared      1 request, all" in summary(dataclasses.replace(manifest, compared=1))
    assert [line.split()[2] for line in summary(manifest).splitlines()[:2]] == ["variables", "variable"]
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
    # From the folder beside it, so that every path has a "..".
    beside = tmp_path / "beside"
    beside.mkdir()
    run = functools.partial(_spikeless, cwd=beside)
    for command in (
        ("map", os.path.relpath(source, beside), "../again", "--min-bytes", "4KiB"),
        ("map", "--repin", "../again"),
        ("publish", "../again", "m", "--models", "../models", "--map"),
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    check(tmp_path / "again", str(tmp_path / "again"))
    check(tmp_path / "models" / "m" / "1", str(tmp_path / "models" / "m" / "1"))
    done = _spikeless("map", source, tmp_path / "little", "--min-bytes", "1GiB", "--no-verify")
    assert "nothing is mapped" in done.stdout
    assert "--min-bytes" in done.stdout
    for wrong in (
        ("map", source),
        ("map", "--repin", moved, out),
        ("map", source, out, "--min-bytes", "1XiB"),
        ("map", "--repin", moved, "--no-verify"),
        ("publish", source, "m", "--models", tmp_path, "--optimize"),
    ):
        assert _spikeless(*wrong).returncode == 2
    lost = next((moved / "variables").glob("variables.data-00002-*"))
    lost.unlink()
    shown = _spikeless("inspect", moved)
    assert shown.returncode == 0, shown.stderr
    assert "missing" in next(line for line in shown.stdout.splitlines() if lost.name in line)
    would = _spikeless("inspect", source, "--min-bytes", "4KiB").stdout
    assert "to be mapped" in would
    assert "to be mapped" not in _spikeless("inspect", source).stdout


def test_killed_at_any_moment_nothing_is_half_there(originals: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [
        sys.executable,
        SUPPORT / "killed_mappers.py",
        originals / "module",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    kills = done.stdout.splitlines()
    assert {line.split()[0] for line in kills} >= {"open", "os.mkdir", "os.rename", "os.chmod"}
    whole = 0
    for number in range(len(kills)):
        folder = tmp_path / str(number)
        out = folder / "mapped"
        assert {child.name for child in folder.iterdir()} <= {"mapped", ".spikeless"}, kills[number]
        if out.exists():
            check(out, str(out))
            whole += 1
    assert 0 < whole < len(kills) / 2, "few things are left to do once it is visible"
    # What a killed one left is cleared away by the next.
    folder = tmp_path / str(len(kills) // 2)
    settings = dataclasses.replace(SETTINGS, verify=False)
    map_saved_model(originals / "module", folder / "mapped", settings)
    assert not [path for path in (folder / ".spikeless" / "mapping").iterdir() if path.is_dir()]


#: Prints which mapped files a loaded model has in its memory.
_MAPS = """
import sys
from pathlib import Path
from spikeless import runtime
from spikeless.disk import proc

with runtime.Session.load(sys.argv[1]):
    print(*sorted({Path(f.path).name for f in proc.mapped_files() if "variables.data" in f.path}))
"""


def _export(path: Path, variables: dict[str, str], outputs: str) -> None:
    """A model that looks ``ids`` up; values and outputs are Python expressions."""
    made = "".join(
        f"        self.{name} = tf.Variable({v}, name={name!r})\n" for name, v in variables.items()
    )
    make = f"""
import tensorflow as tf

class Model(tf.Module):
    def __init__(self):
{made}
    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, "ids")])
    def look(self, ids):
        return {outputs}

model = Model()
tf.saved_model.save(model, {str(path)!r}, signatures=model.look)
"""
    subprocess.run([sys.executable, "-c", make], check=True, capture_output=True, timeout=120)


def test_a_small_mapped_variable_is_copied_and_inspect_says_so(tmp_path: Path) -> None:
    sizes = {"small": COPIED_BYTES - 4096, "large": COPIED_BYTES}
    variables = {name: f"tf.range({size // 4}, dtype=tf.float32)" for name, size in sizes.items()}
    looks = ", ".join(f"'{name}': tf.gather(self.{name}, ids)" for name in sizes)
    _export(tmp_path / "original", variables, f"{{{looks}}}")
    out = tmp_path / "mapped"
    map_saved_model(tmp_path / "original", out, SETTINGS)
    files = {variable.name: Path(variable.file or "").name for variable in inspect(out)}
    command = [sys.executable, "-c", _MAPS, str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [files["large"]]
    shown = {line.split()[0]: line for line in _spikeless("inspect", out).stdout.splitlines()}
    assert "TensorFlow copies it" in shown["small"]
    assert "TensorFlow copies it" not in shown["large"]


#: Loads a SavedModel as a server does and prints the mapped files that the kernel
#: expects single pages of.
_ADVISED = """
import sys
from pathlib import Path
from spikeless.engine.loader import ModelLoader

model = ModelLoader()("model", 1, Path(sys.argv[1]))
file = ""
for line in Path("/proc/self/smaps").read_text().splitlines():
    if "-" in line.partition(" ")[0]:
        file = Path(line).name if sys.argv[1] in line else ""
    elif file and line.startswith("VmFlags:"):
        print(file, "rr" in line.split())
model.close()
"""


def test_the_kernel_is_told_what_is_looked_up(tmp_path: Path) -> None:
    variables = {
        name: f"tf.random.stateless_normal([256, 256], [0, {seed}])"
        for seed, name in enumerate(("table", "kernel"))
    }
    _export(tmp_path / "original", variables, "{'scores': tf.gather(self.table, ids) @ self.kernel}")
    out = tmp_path / "größer als eine Seite"
    map_saved_model(tmp_path / "original", out, SETTINGS)
    files = {variable.name: Path(variable.file or "").name for variable in inspect(out)}
    advised = [sys.executable, "-c", _ADVISED, str(out)]
    done = subprocess.run(advised, check=True, capture_output=True, text=True, timeout=120)
    assert sorted(done.stdout.splitlines()) == sorted([f"{files['table']} True", f"{files['kernel']} False"])
    # A version whose manifest cannot be read is served all the same.
    (out / "assets.extra" / MANIFEST_FILE).write_text("{")
    done = subprocess.run(advised, check=True, capture_output=True, text=True, timeout=120)
    assert sorted(done.stdout.splitlines()) == sorted([f"{files['table']} False", f"{files['kernel']} False"])
    assert "the kernel was not told" in done.stderr


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

#: Prints a column of the rows before, at and after two gigabytes, and the private
#: memory that loading took.
_LOOK = """
import sys
import numpy as np
from spikeless import runtime
from spikeless.disk import proc

runtime.version()
before = proc.private_memory()
with runtime.Session.load(sys.argv[1]) as session:
    signature = session.meta_graph.signature_def["serving_default"]
    ids = np.array([0, 1, 2**25 - 1, 2**25, 2**25 + 62, 2**25 + 63])
    (rows,) = session.run({signature.inputs["ids"].name: ids}, [signature.outputs["rows"].name])
    print(*rows[:, 63], proc.private_memory() - before)
"""


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[Path]:
    """A folder for gigabytes: in memory if there is room; some disks take minutes."""
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


#: Loads a model and runs it from four threads. Prints its private memory beyond the
#: bare runtime's in bytes, and how often its parameters' file is mapped, then and after
#: it is closed.
_MEMORY = """
import sys, threading
import numpy as np
from spikeless import runtime
from spikeless.disk import proc

def mappings():
    return sum("variables.data-00001" in file.path for file in proc.mapped_files())

runtime.version()
before = proc.private_memory()
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
    print(proc.private_memory() - before, mappings())
print(mappings())
"""


@pytest.mark.parametrize(("kind", "optimize"), [("module", False), ("module", True), ("references", False)])
def test_private_memory(tmp_path: Path, kind: str, optimize: bool) -> None:
    """No copy of the parameters is made, at load or by reads of either kind."""
    size = (1 << 18) * 64 * 4
    command: list[str | Path] = [
        sys.executable,
        SUPPORT / "mapping_models.py",
        "--large",
        kind,
        tmp_path / "stock",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    manifest = map_saved_model(tmp_path / "stock", tmp_path / "mapped", MapSettings(optimize=optimize))
    assert [v.bytes for v in manifest.variables if v.state is VariableState.MAPPED] == [size]

    def measure(name: str) -> list[int]:
        command = [sys.executable, "-c", _MEMORY, str(tmp_path / name)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
        return [int(number) for number in done.stdout.split()]

    private, mappings, afterwards = measure("stock")
    assert private > size
    assert (mappings, afterwards) == (0, 0)
    private, mappings, afterwards = measure("mapped")
    assert private < size / 4
    assert (mappings, afterwards) == (1, 0)


def test_publish_prefetches_before_the_version_is_visible(mapped: Path, tmp_path: Path) -> None:
    def files(version: Path) -> list[Path]:
        return [version / record.path for record in read_manifest(version).mapped_files()]

    def evict(candidate: Candidate) -> None:
        for path in files(candidate.path):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if any(map(pages.resident, files(candidate.path))):
            pytest.skip("this file system keeps its pages")

    gates = [Gate("evicting", "evicting", evict)]
    with publishing.stage(mapped / "module", tmp_path, "m", gates=gates) as candidate:
        for path in files(candidate.path):
            assert pages.resident(path) == path.stat().st_size > 0


def test_publish_maps_and_pins(originals: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    done = _spikeless(
        "publish", originals / "module", "m", "--models", models, "--map", "--min-bytes", "4KiB"
    )
    assert done.returncode == 0, done.stderr
    version = models / "m" / "1"
    assert done.stdout == f"{version}\n"
    manifest = check(version, str(version))
    assert len(manifest.mapped_files()) == 2
    assert all((version / file.path).stat().st_mode & 0o222 == 0 for file in manifest.mapped_files())
    Session.load(version).close()
    # A version that is mapped is pinned anew, here to where a container sees it.
    second = publishing.publish(version, models, "m", serving_root="/models")
    assert all((second / file.path).stat().st_mode & 0o222 == 0 for file in manifest.mapped_files())
    check(second, "/models/m/2")
    assert {file.name for file in (models / "m").iterdir()} == {"1", "2", ".spikeless"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "source/variables/variables.data-00001-of-00003 is missing"),
        (
            lambda file: os.truncate(file, 100),
            "source/variables/variables.data-00001-of-00003 has 100 bytes instead of 32768",
        ),
        (lambda file: _flip(file), "data-00001-of-00003 has changed"),
    ],
)
def test_publish_refuses_damaged_files(
    mapped: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    source = shutil.copytree(mapped / "module", tmp_path / "source")
    file = source / "variables" / "variables.data-00001-of-00003"
    file.chmod(0o644)
    damage(file)
    with pytest.raises(SpikelessError, match=message):
        publishing.publish(source, tmp_path / "models", "m")
    assert not layout.versions(tmp_path / "models", "m")


def test_the_content_of_twins_need_not_be_read(mapped: Path, tmp_path: Path) -> None:
    with publishing.stage(mapped / "module", tmp_path / "models", "m") as first:
        file = first.path / "variables" / "variables.data-00001-of-00003"
        file.chmod(0o644)
        _flip(file)  # only who reads it notices
        twin = functools.partial(publishing.stage, first.path, tmp_path / "models", "m", gates=(), link=True)
        with twin(digests=False) as second:
            assert (second.path / file.relative_to(first.path)).samefile(file)
        with pytest.raises(DataLoss, match="has changed"), twin():
            pass
