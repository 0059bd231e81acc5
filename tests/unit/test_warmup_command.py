"""``spikeless warmup build|inspect|verify`` on real SavedModels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spikeless import warmup
from spikeless.cli import main
from spikeless.errors import InvalidArgument, NotFound
from spikeless.formats import tfrecord
from spikeless.formats.protos import prediction_log_pb2, tensor_pb2
from spikeless.formats.tensors import to_proto

#: Exit code, standard output and standard error of a command.
Spikeless = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def model(saved_models: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_models / "signatures", tmp_path / "signatures")


@pytest.fixture
def spikeless(capsys: pytest.CaptureFixture[str]) -> Spikeless:
    """Run the command: its exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as info:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return info.value.code, captured.out, captured.err

    return run


def test_build_inspect_verify(spikeless: Spikeless, model: Path, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"instances": [[1, 2, 3, 4]]}\n{"signature_name": "gather", "instances": [9]}\n')
    code, out, err = spikeless(
        *("warmup", "build", model, "--samples", samples, "--batch-sizes", "1,8", "--name", "m"),
        *("--signature", "sequence", "--signature", "serving_default", "--dim", "tokens=7"),
    )
    path = warmup.warmup_file(model)
    assert (code, out, err) == (0, f"{path}: 6 records, {path.stat().st_size} bytes\n", "")

    code, out, _ = spikeless("warmup", "inspect", model, "--json")
    assert code == 0
    records = json.loads(out)
    assert [record["number"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert {record["kind"] for record in records} == {"Predict"}
    assert {record["model"] for record in records} == {"m"}
    assert [record["signatures"] for record in records[::2]] == [
        ["serving_default"],
        ["gather"],
        ["sequence"],
    ]
    assert records[5]["inputs"] == [{"name": "tokens", "dtype": "DT_INT32", "shape": [8, 7]}]
    assert [record["bytes"] for record in records] == [len(content) for content in tfrecord.read(path)]
    code, out, _ = spikeless("warmup", "inspect", path, "--all")
    assert code == 0
    assert "x: DT_FLOAT [8, 4]" in out
    assert out.count("Predict") == 6
    shutil.copy(path, tmp_path / "once")
    tfrecord.write(path, 20 * list(tfrecord.read(tmp_path / "once")))
    code, out, _ = spikeless("warmup", "inspect", path)
    assert (out.count("Predict"), out.count(" 20 ")) == (6, 6), "alike records are one line"
    shutil.move(tmp_path / "once", path)

    code, out, _ = spikeless("warmup", "verify", model, "--json", "--request-iterations", "2")
    assert code == 0
    result = json.loads(out)
    assert result["records"] == 6
    assert [first["signatures"] for first in result["first_requests"]] == [
        ["serving_default"],
        ["gather"],
        ["sequence"],
    ]
    assert [first["record"] for first in result["first_requests"]] == [1, 3, 5]
    assert all(first["cold_ms"] > 0 and first["warm_ms"] > 0 for first in result["first_requests"])
    code, out, _ = spikeless("warmup", "verify", model)
    assert code == 0
    assert "after warmup ms" in out
    assert "6 records replayed in " in out


def test_every_kind(spikeless: Spikeless, saved_models: Path, tmp_path: Path) -> None:
    model = shutil.copytree(saved_models / "examples", tmp_path / "examples")
    code, out, _ = spikeless("warmup", "build", model, "--multi-inference", "classify,regress")
    assert code == 0
    code, out, _ = spikeless("warmup", "verify", model, "--json")
    assert code == 0
    firsts = [(first["kind"], *first["signatures"]) for first in json.loads(out)["first_requests"]]
    assert firsts == [
        ("Classify", "classify"),
        ("Regress", "elsewhere"),
        ("Regress", "regress"),
        ("Regress", "regress_other"),
        ("Predict", "serving_default"),
        ("MultiInference", "classify", "regress"),
    ]
    (record,) = [record for record in warmup.inspect(model) if record.kind == "MultiInference"]
    assert [str(summary) for summary in record.inputs] == ["examples: tf.Example [1]"]


def test_samples_with_a_signature_and_a_kind(spikeless: Spikeless, model: Path, tmp_path: Path) -> None:
    (tmp_path / "a=b.csv").write_text("1,2,3,4\n")
    np.savez(tmp_path / "ids.npz", ids=np.array([3], np.int32))
    code, _, err = spikeless(
        *("warmup", "build", model, "--samples", tmp_path / "a=b.csv"),
        *("--samples", f"gather={tmp_path / 'ids.npz'}", "--signature", "serving_default:Predict"),
    )
    assert (code, err) == (0, "")
    assert [record.signatures for record in warmup.inspect(model)] == [("serving_default",), ("gather",)]


def test_verify_names_the_first_bad_record_and_its_cause(
    spikeless: Spikeless, model: Path, tmp_path: Path
) -> None:
    samples = tmp_path / "samples.jsonl"
    rows = ({"signature_name": "gather", "instances": [index]} for index in (1, 10, 20))
    samples.write_text("\n".join(map(json.dumps, rows)))
    assert spikeless("warmup", "build", model, "--samples", samples)[0] == 0
    code, out, err = spikeless("warmup", "verify", model)
    assert (code, out) == (1, "")
    assert err.startswith(
        f"spikeless: error: warmup record 2 of {warmup.warmup_file(model)}: indices[0] = 10 "
    )


def test_verify_without_a_model_or_a_file(spikeless: Spikeless, model: Path, tmp_path: Path) -> None:
    code, _, err = spikeless("warmup", "verify", model)
    assert code == 1
    assert f"does not exist; write it with `spikeless warmup build {model}`" in err
    code, _, err = spikeless("warmup", "verify", tmp_path)
    assert code == 1
    assert "is no SavedModel" in err


def test_records_that_cannot_be_replayed_are_still_listed(
    spikeless: Spikeless, model: Path, tmp_path: Path
) -> None:
    session_run, nothing, odd = (prediction_log_pb2.PredictionLog() for _ in range(3))
    session_run.session_run_log.SetInParent()
    odd.predict_log.request.inputs["[x]"].CopyFrom(tensor_pb2.TensorProto(dtype=99))
    odd.predict_log.request.inputs["[x]"].tensor_shape.unknown_rank = True
    path = tmp_path / "warmup"
    tfrecord.write(path, [log.SerializeToString() for log in (session_run, nothing, odd)])
    assert [(record.kind, record.signatures) for record in warmup.inspect(path)] == [
        ("session_run_log", ()),
        (None, ()),
        ("Predict", ("serving_default",)),
    ]
    code, out, _ = spikeless("warmup", "inspect", path)
    assert code == 0
    for text in ("session_run_log", "(no request)", "[x]: DT_99 [...]"):
        assert text in out
    warmup.warmup_file(model).parent.mkdir()
    shutil.copy(path, warmup.warmup_file(model))
    with pytest.raises(warmup.WarmupError, match=r"record 1 .*Unsupported log_type"):
        warmup.verify(model)


def test_inspect_refuses_what_is_no_warmup_file(spikeless: Spikeless, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="cannot be read"):
        list(warmup.inspect(tmp_path))
    tfrecord.write(tmp_path / "f", [to_proto(np.ones(3)).SerializeToString(), b"\xff"])
    with pytest.raises(InvalidArgument, match="warmup record"):
        list(warmup.inspect(tmp_path / "f"))
    (tmp_path / "f").write_text("some text that is no record")
    code, out, err = spikeless("warmup", "inspect", tmp_path / "f")
    assert (code, out) == (1, "")
    assert "Please verify your warmup data is in TFRecord format" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["build"],
        ["build", "m", "--batch-sizes", "1,x"],
        ["build", "m", "--dim", "1,2"],
        ["build", "m", "--dim", "tokens=x"],
        ["verify", "m", "--request-iterations", "0"],
        ["none"],
    ],
)
def test_wrong_usage_exits_2(spikeless: Spikeless, arguments: list[str]) -> None:
    code, out, err = spikeless("warmup", *arguments)
    assert (code, out) == (2, "")
    assert "Usage: spikeless warmup" in err


def test_an_error_exits_1_and_writes_nothing(spikeless: Spikeless, model: Path) -> None:
    code, out, err = spikeless("warmup", "build", model)
    assert (code, out) == (1, "")
    assert err.startswith("spikeless: error: Predict any_rank without samples: input 'x' has shape [...]")
    assert not (model / "assets.extra").exists()
