"""The gates of publishing: each refusal names the gate, the numbers and the remedy."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from promotion_models import NAME, X, add_version, golden_file, prediction_log, start_server, write_config
from trained_models import spikeless

from spikeless.errors import InvalidArgument
from spikeless.formats import savedmodel, tfrecord
from spikeless.formats.graph import all_nodes
from spikeless.formats.protos import prediction_log_pb2
from spikeless.repository import golden, layout, publishing
from spikeless.repository.gates import GateSettings, breaking_changes
from spikeless.repository.golden import Tolerance
from spikeless.repository.journal import Journal, Published
from spikeless.repository.layout import stable_version
from spikeless.repository.target import ServerTarget
from spikeless.repository.trial import GateError


def publish(source: Path, models: Path, **options: Any) -> Path:
    return publishing.publish(source, models, NAME, gates=GateSettings(**options).pipeline())


def test_a_good_version_passes_and_carries_its_golden_requests(
    scales: Path, models: Path, tmp_path: Path
) -> None:
    file = golden_file(tmp_path / "golden", 3.0)
    arguments = [NAME, "--models", models, "--golden", file, "--rtol=0.01"]
    done = spikeless("publish", scales / "3", *arguments)
    assert done.returncode == 0, done.stderr
    carried = golden.of_version(models / NAME / "3")
    assert (len(carried.records), carried.tolerance.rtol) == (1, 0.01)
    (line,) = (models / NAME / ".spikeless" / "journal.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["event"], record["version"], record["stable"]) == ("publish", 3, 1)
    findings = record["findings"]
    assert (findings["golden"], findings["stable_requests"]) == (1, 1)
    assert findings["memory"] > 0
    assert findings["first"] > 0
    assert findings["load"] > 0
    assert record["gates"] == ["files", "target", "warmup", "cold", "golden", "signatures", "trial"]
    assert not record["allow_breaking"]


def test_the_python_api_passes_the_same_gates_and_writes_the_same_record(scales: Path, models: Path) -> None:
    publishing.publish(scales / "3", models, NAME)
    publish(scales / "whole", models, allow_breaking=True, load=False)
    first, second = Journal(models, NAME).entries()
    assert isinstance(first, Published)
    assert isinstance(second, Published)
    assert (first.version, first.stable, first.allow_breaking) == (3, 1, False)
    assert first.gates == ("files", "target", "warmup", "cold", "signatures", "trial")
    assert first.findings.stable_requests == 1
    assert (second.version, second.gates, second.allow_breaking) == (
        4,
        ("files", "target", "warmup", "cold"),
        True,
    )
    with pytest.raises(GateError, match="gate signatures"):
        publishing.publish(scales / "whole", models, NAME)


def test_each_gate_names_itself_the_numbers_and_the_remedy(
    scales: Path, models: Path, tmp_path: Path
) -> None:
    versions = set(layout.versions(models, NAME))

    def refused(source: Path, **options: Any) -> tuple[str, str]:
        with pytest.raises(GateError) as caught:
            publish(source, models, **options)
        assert set(layout.versions(models, NAME)) == versions
        return caught.value.gate, str(caught.value)

    gate, message = refused(scales / "3", golden=golden_file(tmp_path / "golden", 4.0))
    assert gate == "golden"
    assert "golden request 1 of 1: y is" in message
    assert "instead of" in message

    gate, message = refused(scales / "whole")
    assert gate == "signatures"
    for text in ("input x was DT_FLOAT and is DT_INT32", "output y is gone", "--allow-breaking"):
        assert text in message
    published = publish(scales / "whole", models, allow_breaking=True)
    versions.add(int(published.name))

    gate, message = refused(scales / "2", memory=1000)
    assert gate == "memory"
    assert "--memory" in message

    gate, message = refused(scales / "2", golden=golden_file(tmp_path / "g", 2.0), max_first_request=1e-9)
    assert gate == "first request"
    assert "spikeless warmup build" in message

    broken = add_version(scales / "whole", tmp_path / "broken", 1)  # its warmup record is of another type
    gate, message = refused(broken, allow_breaking=True)
    assert gate == "warmup"
    assert "record 1" in message
    assert "spikeless warmup build" in message


def test_requests_of_the_stable_versions_callers_must_be_answered(scales: Path, models: Path) -> None:
    """Signatures agree, but the new version fails on a request of the stable one."""
    warmup = models / NAME / "1" / "assets.extra" / "tf_serving_warmup_requests"
    log = prediction_log()
    del log.predict_log.request.inputs["x"]
    tfrecord.write(warmup, [prediction_log().SerializeToString(), log.SerializeToString()])
    with pytest.raises(GateError, match=r"gate signatures: .*warmup record 2\)"):
        publish(scales / "3", models)
    publish(scales / "3", models, allow_breaking=True)


def test_golden_files_are_read_before_anything_is_copied(tmp_path: Path) -> None:
    file = tmp_path / "golden"
    tfrecord.write(file, [prediction_log().SerializeToString()])
    with pytest.raises(InvalidArgument, match="record 1 has no response"):
        GateSettings(golden=file).pipeline()
    tfrecord.write(file, [])
    with pytest.raises(InvalidArgument, match="has no records"):
        GateSettings(golden=file).pipeline()
    tfrecord.write(file, [prediction_log_pb2.PredictionLog().SerializeToString()])
    with pytest.raises(InvalidArgument, match="which has no answer"):
        GateSettings(golden=file).pipeline()


def test_the_stable_version_is_the_labelled_one(models: Path) -> None:
    assert stable_version(models, NAME) == models / NAME / "1"
    write_config(models, [1, 2], 2)
    assert stable_version(models, NAME) == models / NAME / "2"
    (models / "models.config").unlink()
    assert stable_version(models, NAME) == models / NAME / "2"
    assert stable_version(models, "other") is None
    assert stable_version(models / "nowhere", "other") is None


def changed(scales: Path, change: Callable[[Any], object]) -> list[str]:
    old = savedmodel.read(scales / "1").meta_graph()
    new = type(old)()
    new.CopyFrom(old)
    change(new.signature_def)
    return breaking_changes(old, new)


def test_which_changes_of_signatures_break_callers(scales: Path) -> None:
    def default(signatures: Any) -> Any:
        return signatures["serving_default"]

    assert changed(scales, lambda s: None) == []
    assert changed(scales, lambda s: s.pop("serving_default")) == ["signature serving_default is gone"]
    assert changed(scales, lambda s: s["more"].CopyFrom(s["serving_default"])) == []
    assert changed(scales, lambda s: default(s).outputs["z"].CopyFrom(default(s).outputs["y"])) == []
    (problem,) = changed(scales, lambda s: default(s).inputs["w"].CopyFrom(default(s).inputs["x"]))
    assert problem == "serving_default: input w is new, and callers do not send it"

    def with_default(signatures: Any) -> None:
        default(signatures).inputs["w"].CopyFrom(default(signatures).inputs["x"])
        default(signatures).defaults["w"].dtype = 1

    assert changed(scales, with_default) == []

    def shape(which: str, *dims: int) -> Callable[[Any], None]:
        def change(signatures: Any) -> None:
            info = getattr(default(signatures), which)["x" if which == "inputs" else "y"]
            del info.tensor_shape.dim[:]
            for dim in dims:
                info.tensor_shape.dim.add(size=dim)

        return change

    assert changed(scales, shape("inputs", -1, -1)) == [], "a wider input takes all that the narrow one took"
    assert changed(scales, shape("inputs", -1, 3)) == [
        "serving_default: input x had shape [?, 2] and has [?, 3]"
    ]
    assert changed(scales, shape("outputs", 1, 2)) == []
    assert len(changed(scales, shape("outputs", -1, -1))) == 1
    assert len(changed(scales, shape("outputs", -1))) == 1


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (X * 2, None),
        (X * 2 + 1e-7, None),
        (X * 2.01, r"y is 2\.01 at \[0, 0\] instead of 2 \(4 of 4 values differ"),
        (X[:1] * 2, r"y has shape \[1, 2\] instead of \[2, 2\]"),
        ((X * 2).astype("float64"), "y has type float64 instead of float32"),
    ],
)
def test_differences_are_told_in_words(answer: np.ndarray[Any, Any], problem: str | None) -> None:
    expected = prediction_log(X * 2).predict_log.response
    found = golden.difference(expected, prediction_log(answer).predict_log.response, Tolerance())
    if problem is None:
        assert found is None
    else:
        assert re.search(problem, found or ""), found


def edited(source: Path, path: Path, edit: Callable[[Any], None]) -> Path:
    """A copy of a SavedModel whose meta graph is edited."""
    shutil.copytree(source, path)
    saved_model = savedmodel.read(path).proto
    edit(saved_model.meta_graphs[0])
    (path / "saved_model.pb").write_bytes(saved_model.SerializeToString())
    return path


def with_op(name: str) -> Callable[[Any], None]:
    """The first multiplication becomes another operation."""

    def edit(meta_graph: Any) -> None:
        node = next(node for node in all_nodes(meta_graph.graph_def) if node.op == "Mul")
        node.op = name

    return edit


def test_operations_that_servers_have_not_are_named(scales: Path, models: Path, tmp_path: Path) -> None:
    custom = edited(scales / "3", tmp_path / "custom", with_op("SentencepieceTokenizeOp"))
    with pytest.raises(
        GateError, match="no operation SentencepieceTokenizeOp: stock TensorFlow Serving"
    ) as told:
        publishing.publish(custom, models, NAME)
    assert told.value.gate == "ops"
    assert "--no-load" in str(told.value)
    with pytest.raises(GateError, match=r"calls Python \(EagerPyFunc.*no server has"):
        publishing.publish(edited(scales / "3", tmp_path / "python", with_op("EagerPyFunc")), models, NAME)
    said: list[str] = []
    unloaded = GateSettings(load=False).pipeline()
    publishing.publish(scales / "3", models, NAME, gates=unloaded, progress=said.append)
    assert not any("operation" in line for line in said)
    publishing.publish(custom, models, NAME, gates=unloaded, progress=said.append)
    assert any("warning: TensorFlow here has no operation Sentencepiece" in line for line in said)


def test_graphs_of_a_newer_tensorflow_are_told(scales: Path, models: Path, tmp_path: Path) -> None:
    def newer(meta_graph: Any) -> None:
        meta_graph.meta_info_def.tensorflow_version = "2.99.0"

    def not_for_this_one(meta_graph: Any) -> None:
        meta_graph.graph_def.versions.min_consumer = 10**6

    said: list[str] = []
    publishing.publish(edited(scales / "3", tmp_path / "new", newer), models, NAME, progress=said.append)
    (warning,) = (line for line in said if "exported it" in line)
    assert re.search(r"TensorFlow 2\.99\.0 exported it, and servers have 2\.\d+", warning), warning
    assert "update servers first" in warning
    older = GateSettings(target=ServerTarget("2.9.1")).pipeline()
    publishing.publish(scales / "3", models, NAME, gates=older, progress=said.append)
    assert any("servers have 2.9.1" in line for line in said), said
    with pytest.raises(GateError, match=r"min consumer.*upgrade TensorFlow") as told:
        publishing.publish(edited(scales / "3", tmp_path / "future", not_for_this_one), models, NAME)
    assert told.value.gate == "load"


def test_flags_of_the_servers_decide(scales: Path, models: Path) -> None:
    """Those of a running server, too, as far as its process can be seen."""
    compiled = ("publish", scales / "compiled", NAME, "--models", models, "--dry-run", "--json")
    refused = spikeless(*compiled, "--server-flag=--num_load_threads=1")
    assert refused.returncode == 1
    assert "gate target: XLA compiles a part" in refused.stderr
    assert "--xla_cpu_compilation_enabled" in refused.stderr
    done = spikeless(*compiled, "--server-flag=--xla_cpu_compilation_enabled")
    assert "XLA" not in done.stdout
    with start_server(models) as server:
        done = spikeless(*compiled, "--server", server.target)
        assert done.returncode == (0 if server.engine == "embedded" else 1), done.stderr
    unseen = spikeless(*compiled, "--server", "127.0.0.1:1")
    assert unseen.returncode == 1
    assert "say what it has with --server-flag" in unseen.stderr


def test_what_servers_need_a_flag_for_is_said(scales: Path, models: Path) -> None:
    said: list[str] = []
    publishing.publish(scales / "3", models, NAME, progress=said.append)
    assert not any("XLA" in line for line in said)
    publishing.publish(scales / "compiled", models, NAME, progress=said.append)
    (warning,) = (line for line in said if "XLA" in line)
    assert "jit_compile=True" in warning
    assert "--xla_cpu_compilation_enabled" in warning
