"""Building warmup files for real SavedModels, from samples and from nothing."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from saved_models import DTYPES

from spikeless.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SpikelessError,
    Unimplemented,
)
from spikeless.formats import tfrecord
from spikeless.formats.protos import example_pb2, prediction_log_pb2
from spikeless.formats.savedmodel import CLASSIFY_METHOD, REGRESS_METHOD
from spikeless.formats.tensors import to_numpy, to_proto
from spikeless.runtime import Session
from spikeless.runtime.model import Model
from spikeless.warmup import BuildSettings, SampleFile, build, make_requests, replay, warmup_file
from spikeless.warmup.records import Record, read
from spikeless.warmup.requests import Servable

Log: TypeAlias = prediction_log_pb2.PredictionLog
Change = Callable[[Log], None]


@pytest.fixture
def signatures(saved_models: Path, tmp_path: Path) -> Path:
    """A copy of the model with many signatures."""
    return shutil.copytree(saved_models / "signatures", tmp_path / "signatures")


@pytest.fixture
def examples(saved_models: Path, tmp_path: Path) -> Path:
    """A copy of the model that takes examples."""
    return shutil.copytree(saved_models / "examples", tmp_path / "examples")


def settings(*files: str | Path | SampleFile, **more: Any) -> BuildSettings:
    samples = tuple(file if isinstance(file, SampleFile) else SampleFile(Path(file)) for file in files)
    return BuildSettings(samples=samples, **more)


def built(model: Path, settings: BuildSettings) -> list[Record]:
    """The records that ``build`` writes, after the model has answered them all."""
    path = build(model, settings)
    assert path == warmup_file(model)
    assert os.listdir(path.parent) == [path.name]
    with Session.load(model) as session:
        replay(Model(session), path)
    return list(read(path))


def tensors(record: Record) -> dict[str, Any]:
    return {alias: to_numpy(tensor) for alias, tensor in record.request.inputs.items()}


def kinds(records: list[Record]) -> list[tuple[str, ...]]:
    return [
        (str(record.kind), *(task.model_spec.signature_name for task in record.request.tasks))
        if str(record.kind) == "MultiInference"
        else (str(record.kind), record.request.model_spec.signature_name)
        for record in records
    ]


def refused(model: Path, settings: BuildSettings, error: type[SpikelessError], message: str) -> None:
    """``build`` raises, and neither writes nor changes a file."""
    before = sorted(os.walk(model))
    with pytest.raises(error, match=message) as info:
        build(model, settings)
    assert type(info.value) is error
    assert sorted(os.walk(model)) == before


def write_json(tmp_path: Path, *documents: Any, name: str = "samples.json") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(document) for document in documents))
    return path


def example(**features: Sequence[Any]) -> example_pb2.Example:
    message = example_pb2.Example()
    for name, values in features.items():
        feature = message.features.feature[name]
        if isinstance(values[0], bytes):
            feature.bytes_list.value.extend(values)
        elif isinstance(values[0], int):
            feature.int64_list.value.extend(values)
        else:
            feature.float_list.value.extend(values)
    return message


X = [1.0, 2.0, 3.0, 4.0]


# From samples


def test_json_document(signatures: Path, tmp_path: Path) -> None:
    path = tmp_path / "pretty.json"
    path.write_text(json.dumps({"instances": [X, X]}, indent=2))
    (record,) = built(signatures, settings(path))
    assert str(record.kind) == "Predict"
    assert record.request.model_spec.name == "default"
    assert record.request.model_spec.signature_name == "serving_default"
    np.testing.assert_array_equal(tensors(record)["x"], [X, X])


def test_json_lines_for_several_signatures(signatures: Path, tmp_path: Path) -> None:
    mixed = {
        "signature_name": "mixed",
        "inputs": {
            "ids": [7],
            "name": [{"b64": "/w=="}],
            "flag": [[True]],
            "weight": [[0.5, 1, 2]],
        },
    }
    path = write_json(tmp_path, {"instances": [X]}, mixed, {"inputs": {"x": [X]}}, name="s.jsonl")
    records = built(signatures, settings(path))
    assert kinds(records) == [
        ("Predict", "serving_default"),
        ("Predict", "mixed"),
        ("Predict", "serving_default"),
    ]
    assert tensors(records[1])["name"].tolist() == [b"\xff"]


def test_npz(signatures: Path, tmp_path: Path) -> None:
    np.savez(
        tmp_path / "mixed.npz",
        ids=np.array([1, 2]),
        name=np.array(["a", "é"]),
        flag=np.array([[True], [False]]),
        weight=np.zeros([2, 3]),
    )
    (record,) = built(signatures, settings(SampleFile(tmp_path / "mixed.npz", "mixed")))
    assert tensors(record)["name"].tolist() == [b"a", "é".encode()]
    assert tensors(record)["ids"].tolist() == [1, 2]


def test_npz_of_a_type_that_numpy_does_not_know(saved_models: Path, tmp_path: Path) -> None:
    model = shutil.copytree(saved_models / "dtypes", tmp_path / "dtypes")
    array = np.array([[1, 2]], ml_dtypes.bfloat16)
    np.savez(tmp_path / "s.npz", x=array)
    (record,) = built(model, settings(SampleFile(tmp_path / "s.npz", "bfloat16")))
    np.testing.assert_array_equal(tensors(record)["x"], array)


def test_csv_of_features_with_and_without_header(signatures: Path, tmp_path: Path) -> None:
    (tmp_path / "bare.csv").write_text("1,2,3,4\n5,6,7,8\n")
    (tmp_path / "header.csv").write_text("\ufeffa, b, c, d\r\n1,2,3,4\r\n\r\n5,6,7,8\r\n", encoding="utf-8")
    for name in ("bare.csv", "header.csv"):
        records = built(signatures, settings(tmp_path / name))
        assert [tensors(record)["x"].tolist() for record in records] == [[[1, 2, 3, 4]], [[5, 6, 7, 8]]]


def test_csv_of_inputs(signatures: Path, saved_models: Path, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("rate,x\n2,0.5\n3,1e3\n")
    records = built(signatures, settings(SampleFile(tmp_path / "s.csv", "scaled")))
    assert [tensors(record) for record in records] == [{"rate": 2, "x": [0.5]}, {"rate": 3, "x": [1000]}]
    (tmp_path / "ids.csv").write_text("ids\n7\n")
    (record,) = built(signatures, settings(tmp_path / "ids.csv", signatures=("gather",)))
    assert tensors(record)["ids"].tolist() == [7]


def test_csv_of_every_dtype(saved_models: Path, tmp_path: Path) -> None:
    model = shutil.copytree(saved_models / "dtypes", tmp_path / "dtypes")
    cells = {"bool": "true,0", "string": "x,y"}
    files = []
    for dtype in set(DTYPES) - {"string"}:  # strings are no features
        path = tmp_path / f"{dtype}.csv"
        path.write_text(f"first,second\n{cells.get(dtype, '1,2')}\n")
        files.append(SampleFile(path, dtype))
    for record, file in zip(built(model, settings(*files)), files, strict=True):
        expected = [[True, False]] if file.signature == "bool" else [[1, 2]]
        assert tensors(record)["x"].tolist() == expected


@pytest.mark.parametrize("zipped", [False, True])
def test_examples_go_to_every_signature_that_takes_them(examples: Path, tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "examples.tfrecord"
    tfrecord.write(path, [example(x=X).SerializeToString(), example(x=X, bias=[1.0]).SerializeToString()])
    if zipped:
        path.write_bytes(gzip.compress(path.read_bytes()))
    shutil.rmtree(examples / "assets.extra", ignore_errors=True)
    records = built(
        examples,
        settings(
            path,
            signatures=("classify", "regress"),
            multi_inference=(("regress", "classify"),),
            model_name="m",
        ),
    )
    each = [("Classify", "classify"), ("Regress", "regress"), ("MultiInference", "regress", "classify")]
    assert kinds(records) == each * 2
    assert records[3].request.input.example_list.examples[0] == example(x=X, bias=[1.0])
    tasks = records[2].request.tasks
    assert [task.method_name for task in tasks] == [REGRESS_METHOD, CLASSIFY_METHOD]
    assert {task.model_spec.name for task in tasks} == {"m"}
    assert kinds(built(examples, settings(path)))[:4] == [
        ("Classify", "classify"),
        ("Regress", "elsewhere"),
        ("Regress", "regress"),
        ("Regress", "regress_other"),
    ]


def test_json_examples_with_context(examples: Path, tmp_path: Path) -> None:
    document = {"signature_name": "regress", "context": {"bias": 2.0}, "examples": [{"x": X}]}
    (record,) = built(examples, settings(write_json(tmp_path, document)))
    assert str(record.kind) == "Regress"
    assert record.request.input.example_list_with_context.context == example(bias=[2.0])


def test_examples_for_a_predict_signature_go_serialized(signatures: Path, tmp_path: Path) -> None:
    path = tmp_path / "examples"
    message = example(x=X, tag=[b"t"], ids=[1, 2])
    tfrecord.write(path, [message.SerializeToString()])
    (record,) = built(signatures, settings(SampleFile(path, "parsed")))
    assert str(record.kind) == "Predict"
    assert example_pb2.Example.FromString(tensors(record)["examples"][0]) == message


def test_prediction_logs_keep_the_request_only(signatures: Path, tmp_path: Path) -> None:
    log = prediction_log_pb2.PredictionLog()
    request = log.predict_log.request
    request.model_spec.name, request.model_spec.version.value = "mine", 7
    request.inputs["x"].CopyFrom(to_proto(np.ones([1, 4], np.float32)))
    request.output_filter.append("scores")
    log.predict_log.response.outputs["scores"].CopyFrom(to_proto(np.ones(1000)))
    log.log_metadata.sampling_config.sampling_rate = 0.5
    path = tmp_path / "logs"
    tfrecord.write(path, [log.SerializeToString()])
    (record,) = built(signatures, settings(path))
    assert not record.log.predict_log.HasField("response")
    assert not record.log.HasField("log_metadata")
    assert record.request.model_spec.name == "mine"
    assert not record.request.model_spec.HasField("version")
    assert record.request.model_spec.signature_name == "serving_default"
    assert record.request.output_filter == ["scores"]
    (renamed,) = built(signatures, settings(path, model_name="yours"))
    assert renamed.request.model_spec.name == "yours"
    # What was built is itself a file of samples.
    again = shutil.copy(warmup_file(signatures), tmp_path / "again")
    assert [record.log for record in built(signatures, settings(again))] == [renamed.log]


# From the signature alone


def test_every_signature_without_samples(signatures: Path) -> None:
    records = built(signatures, settings(dims={None: (5,), "x": (4,)}))
    assert kinds(records) == [("Predict", key) for key in Servable.read(signatures).signatures]
    by_key = {record.request.model_spec.signature_name: tensors(record) for record in records}
    assert by_key["sequence"]["tokens"].tolist() == [[1] * 5]
    assert by_key["fixed"]["x"].shape == (2, 3)
    assert by_key["any_rank"]["x"].shape == (1, 4)
    assert by_key["scaled"]["rate"].shape == ()
    assert by_key["mixed"]["flag"].tolist() == [[True]]
    assert by_key["mixed"]["name"].tolist() == [b"1"]
    np.testing.assert_allclose(by_key["serving_default"]["x"], [[0, 0.1, 0.2, 0.3]], rtol=1e-6)
    parsed = example_pb2.Example.FromString(by_key["parsed"]["examples"][0])
    assert set(parsed.features.feature) == {"x", "tag", "ids"}
    first = warmup_file(signatures).read_bytes()
    build(signatures, settings(dims={None: (5,), "x": (4,)}))
    assert warmup_file(signatures).read_bytes() == first


def test_every_dtype_without_samples(saved_models: Path, tmp_path: Path) -> None:
    model = shutil.copytree(saved_models / "dtypes", tmp_path / "dtypes")
    assert len(built(model, settings(batch_sizes=(1, 3)))) == 2 * len(DTYPES)


def test_examples_without_samples(examples: Path) -> None:
    records = built(examples, settings(multi_inference=(("classify", "regress", "regress_other"),)))
    assert kinds(records) == [
        ("Classify", "classify"),
        ("Regress", "elsewhere"),
        ("Regress", "regress"),
        ("Regress", "regress_other"),
        ("Predict", "serving_default"),
        ("MultiInference", "classify", "regress", "regress_other"),
    ]
    (message,) = records[0].request.input.example_list.examples
    assert set(message.features.feature) == {"x", "bias"}


def test_named_signatures_that_no_sample_is_for_are_made_up(signatures: Path, tmp_path: Path) -> None:
    path = write_json(tmp_path, {"instances": [X]}, {"signature_name": "gather", "instances": [9]})
    records = built(signatures, settings(path, signatures=("serving_default", "fixed")))
    assert kinds(records) == [("Predict", "serving_default"), ("Predict", "gather"), ("Predict", "fixed")]


def test_a_kind_that_the_method_name_does_not_tell(signatures: Path) -> None:
    chosen = settings(signatures=("classes",), kinds={"classes": "Classify"})
    assert [request.kind.name for request in make_requests(signatures, chosen)] == ["Classify"]


# Batches


def test_batches_are_cut_from_all_samples_and_filled_from_the_first(signatures: Path, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("".join(f"{row},0,0,0\n" for row in range(5)))
    records = built(signatures, settings(tmp_path / "s.csv", batch_sizes=(1, 2, 8)))
    rows = [tensors(record)["x"][:, 0].tolist() for record in records]
    assert rows == [[0], [1], [2], [3], [4], [0, 1], [2, 3], [4, 0], [0, 1, 2, 3, 4, 0, 1, 2]]


def test_rows_that_differ_in_shape_or_in_fixed_inputs_stay_apart(signatures: Path, tmp_path: Path) -> None:
    path = write_json(
        tmp_path,
        {"signature_name": "sequence", "instances": [[1, 2]]},
        {"signature_name": "sequence", "instances": [[1, 2, 3]]},
        {"signature_name": "scaled", "inputs": {"x": [1, 2], "rate": 1}},
        {"signature_name": "scaled", "inputs": {"x": [3], "rate": 2}},
        {"signature_name": "scaled", "inputs": {"x": [4], "rate": 1}},
        {"signature_name": "fixed", "inputs": [[1, 2, 3], [4, 5, 6]]},
    )
    records = built(signatures, settings(path, batch_sizes=(3,)))
    assert [tensors(record)["tokens"].shape for record in records[:2]] == [(3, 2), (3, 3)]
    assert [(tensors(record)["x"].tolist(), tensors(record)["rate"]) for record in records[2:4]] == [
        ([1, 2, 4], 1),
        ([3, 3, 3], 2),
    ]
    assert tensors(records[4])["x"].shape == (2, 3)
    assert len(records) == 5


def test_batches_of_examples_keep_their_context(examples: Path, tmp_path: Path) -> None:
    path = write_json(
        tmp_path,
        {"signature_name": "regress", "examples": [{"x": X}]},
        {"signature_name": "regress", "examples": [{"x": [5.0, 6.0, 7.0, 8.0]}]},
        {"signature_name": "regress", "context": {"bias": 1.0}, "examples": [{"x": X}]},
    )
    plain, with_context = built(examples, settings(path, batch_sizes=(3,)))
    assert [
        e.features.feature["x"].float_list.value[0] for e in plain.request.input.example_list.examples
    ] == [
        1,
        5,
        1,
    ]
    assert len(with_context.request.input.example_list_with_context.examples) == 3


@given(st.integers(1, 7), st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_every_row_is_in_every_batch_size(
    saved_models: Path, tmp_path_factory: pytest.TempPathFactory, rows: int, sizes: list[int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    path.write_text("".join(f"{row},0,0,0\n" for row in range(rows)))
    requests = make_requests(saved_models / "signatures", settings(path, batch_sizes=tuple(sizes)))
    arrays = [to_numpy(request.message.inputs["x"])[:, 0] for request in requests]
    for size in sizes:
        batches = [array for array in arrays if len(array) == size]
        assert set(np.concatenate(batches)) == set(range(rows))
    assert len(arrays) == sum(-(-rows // size) for size in sizes)


# Refusals


def test_a_directory_that_is_no_saved_model(tmp_path: Path) -> None:
    refused(tmp_path, settings(), NotFound, "is no SavedModel")
    refused(tmp_path / "none", settings(), NotFound, "does not exist")


def test_unknown_names(signatures: Path, tmp_path: Path) -> None:
    path = write_json(tmp_path, {"instances": [X]})
    named = write_json(tmp_path, {"signature_name": "none", "instances": [X]}, name="named.json")
    have = "there is no signature 'none'; the model has: any_rank, "
    refused(signatures, settings(signatures=("none",)), NotFound, have)
    refused(signatures, settings(kinds={"none": "Predict"}), NotFound, have)
    refused(signatures, settings(multi_inference=(("none",),)), NotFound, have)
    refused(signatures, settings(SampleFile(path, "none")), NotFound, have)
    refused(signatures, settings(named), NotFound, f"named.json: {have}")
    refused(signatures, settings(dims={"none": (1,)}), InvalidArgument, "no signature has input 'none'")
    refused(signatures, settings(tmp_path / "none.json"), NotFound, "none.json is no file")
    refused(signatures, settings(tmp_path), NotFound, "neither a file nor a folder with .tfrecord files")


@pytest.mark.parametrize("name", ["s.json", "s.jsonl", "s.csv", "s.tfrecord"])
def test_empty_files(signatures: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("" if name == "s.tfrecord" else "\n")
    refused(signatures, settings(tmp_path / name), InvalidArgument, f"{name} holds no sample")


def test_an_empty_archive_and_a_csv_with_nothing_but_a_header(signatures: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz")
    refused(signatures, settings(tmp_path / "s.npz"), InvalidArgument, r"s\.npz holds no sample")
    (tmp_path / "s.csv").write_text("a,b,c,d\n")
    refused(signatures, settings(tmp_path / "s.csv"), InvalidArgument, r"s\.csv holds no sample")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"inputs": {"x": [X], "y": 1}}, 'unknown input "y"; the signature has: x'),
        ({"instances": [{"y": X}]}, "element: 0 key: y .* does not have named input: y"),
        ({"inputs": {"y": [X]}}, 'unknown input "y"'),
        ({"instances": [["a"] * 4]}, '"a" Type: String is not of expected type: float'),
        ({"instances": [[1, 2, 3]]}, r"has shape \[1, 3\], but the signature takes x: DT_FLOAT \[\?, 4\]"),
        ({"instances": [1]}, r"has shape \[1\], but the signature takes x"),
        ({"rows": [X]}, "Missing 'inputs' or 'instances' key"),
        ({"signature_name": "mixed", "inputs": {"ids": [1]}}, "Missing named input: flag"),
        ({"examples": [{"x": 1}]}, "examples cannot be sent to Predict signature 'serving_default'"),
    ],
)
def test_json_that_does_not_fit(signatures: Path, tmp_path: Path, document: Any, message: str) -> None:
    refused(
        signatures, settings(write_json(tmp_path, document)), InvalidArgument, rf"samples\.json: .*{message}"
    )
    lines = write_json(tmp_path, {"instances": [X]}, document, name="s.jsonl")
    refused(signatures, settings(lines), InvalidArgument, rf"s\.jsonl: line 2: .*{message}")


def test_json_that_is_broken(signatures: Path, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{\n"instances": [[1,,]]\n}')
    refused(signatures, settings(tmp_path / "s.json"), InvalidArgument, r"s\.json: JSON Parse error.*line 2")
    (tmp_path / "s.jsonl").write_text('{"instances": [[1, 2, 3, 4]]}\n{"instances": [[1')
    refused(
        signatures, settings(tmp_path / "s.jsonl"), InvalidArgument, r"s\.jsonl: line 2: JSON Parse error"
    )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.ones([1, 4], np.float32)}, "has no input 'y'; it has: x: DT_FLOAT"),
        ({"x": np.ones([1, 4])}, r"input 'x' is DT_DOUBLE, but the signature takes x: DT_FLOAT \[\?, 4\]"),
        ({"x": np.ones([4], np.float32)}, r"input 'x' has shape \[4\]"),
        ({"x": np.ones([1, 5], np.float32)}, r"input 'x' has shape \[1, 5\]"),
        ({"x": np.array([object()])}, "cannot be read as an .npz"),
        ({"x": np.array(["2020-01-01"], "M8[D]")}, "no TensorFlow type for NumPy dtype"),
    ],
)
def test_npz_that_does_not_fit(
    signatures: Path, tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "s.npz", **arrays)
    refused(signatures, settings(tmp_path / "s.npz"), InvalidArgument, rf"s\.npz.*{message}")


def test_npz_that_is_damaged_or_lacks_an_input(signatures: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    np.savez(path, ids=np.ones(3, np.int64))
    lacking = "lacks input 'flag', 'name', 'weight'"
    refused(signatures, settings(SampleFile(path, "mixed")), InvalidArgument, lacking)
    content = path.read_bytes()
    bare = io.BytesIO()
    np.save(bare, np.ones(3))
    for damaged in (content[:50], b"text", content[:60] + b"xxxx" + content[64:], bare.getvalue()):
        path.write_bytes(damaged)
        refused(signatures, settings(path), InvalidArgument, "cannot be read as an .npz")


@pytest.mark.parametrize(
    ("signature", "text", "message"),
    [
        (None, "1,2,3\n", r"s\.csv: line 1: input 'x' has shape \[1, 3\]"),
        (None, "1,2,3,4\n1,2,3\n", "line 2 has 3 columns, but the first line has 4"),
        (None, "a,b,c,d\n1,2,3,x\n", "line 2: .*'x': not all are values of type DT_FLOAT"),
        (None, '1,2,3,"4\n', "cannot be read as CSV"),
        ("mixed", "1,2\n", "features of a signature with one numeric input"),
        ("gather", "1,2\n", "features of a signature with one numeric input"),
        ("scaled", "x,rate,z\n1,2,3\n", "line 2: column 'z' is no input of signature 'scaled'"),
        ("scaled", "x\n1\n", "line 2: .*lacks input 'rate'"),
        ("gather", "ids\n1.5\n", "'1.5': not all are values of type DT_INT32"),
        ("gather", "ids\n3000000000\n", "not all are values of type DT_INT32"),
        ("mixed", "flag,ids,name,weight\nmaybe,1,a,1\n", "'maybe': not all are values of type DT_BOOL"),
    ],
)
def test_csv_that_does_not_fit(
    signatures: Path, tmp_path: Path, signature: str, text: str, message: str
) -> None:
    (tmp_path / "s.csv").write_text(text)
    refused(signatures, settings(SampleFile(tmp_path / "s.csv", signature)), InvalidArgument, message)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (example(bias=[1.0]), r"record 1: an example lacks feature 'x', DT_FLOAT \[4\]"),
        (example(x=[1.0]), "record 1: feature 'x' has 1 values, but the model parses"),
        (example(x=[1, 2, 3, 4]), "record 1: feature 'x' is a int64_list, but the model parses"),
    ],
)
def test_examples_that_do_not_fit(examples: Path, tmp_path: Path, message: Any, text: str) -> None:
    path = tmp_path / "records"
    tfrecord.write(path, [message.SerializeToString()])
    refused(examples, settings(path), InvalidArgument, text)


def test_tfrecords_that_hold_something_else(signatures: Path, examples: Path, tmp_path: Path) -> None:
    path = tmp_path / "records"
    tfrecord.write(path, [b"\xff\xff"])
    refused(
        examples, settings(path), InvalidArgument, "record 1: is neither a tf.Example nor a PredictionLog"
    )
    for field in ("session_run_log", "predict_streamed_log"):
        log = prediction_log_pb2.PredictionLog()
        getattr(log, field).SetInParent()
        tfrecord.write(path, [log.SerializeToString()])
        refused(signatures, settings(path), Unimplemented, f"record 1: no server replays a {field}")
    path.write_text("text")
    refused(signatures, settings(path), DataLoss, "record 1 is truncated")


def test_prediction_logs_that_do_not_fit(signatures: Path, examples: Path, tmp_path: Path) -> None:
    path = tmp_path / "logs"

    def check(model: Path, change: Change, error: type[SpikelessError], message: str) -> None:
        log = prediction_log_pb2.PredictionLog()
        change(log)
        tfrecord.write(path, [log.SerializeToString()])
        refused(model, settings(path), error, message)

    def predict(log: Log) -> None:
        log.predict_log.request.inputs["x"].CopyFrom(to_proto(np.ones([1, 4], np.float32)))

    def unknown_output(log: Log) -> None:
        predict(log)
        log.predict_log.request.output_filter.append("none")

    def damaged(log: Log) -> None:
        predict(log)
        log.predict_log.request.inputs["x"].tensor_content = b"123"

    def classify(log: Log) -> None:
        log.classify_log.request.model_spec.signature_name = "regress"
        log.classify_log.request.input.example_list.examples.append(example(x=X))

    def no_example(log: Log) -> None:
        log.regress_log.request.model_spec.signature_name = "regress"

    def tasks(*keys: str, method: str = REGRESS_METHOD) -> Change:
        def change(log: Log) -> None:
            request = log.multi_inference_log.request
            request.input.example_list.examples.append(example(x=X))
            for key in keys:
                request.tasks.add(method_name=method).model_spec.signature_name = key

        return change

    check(signatures, unknown_output, InvalidArgument, "has no output 'none'")
    check(signatures, damaged, InvalidArgument, "tensor_content has 3 bytes")
    check(examples, classify, InvalidArgument, "signature 'regress' cannot answer Classify")
    check(examples, no_example, InvalidArgument, "holds no example")
    log = lambda log: log.multi_inference_log.SetInParent()  # noqa: E731
    check(examples, log, InvalidArgument, "has no tasks")
    check(examples, tasks("regress", "regress"), InvalidArgument, "asks twice")
    check(examples, tasks("regress", method="x"), Unimplemented, "cannot ask for method 'x'")


def test_multi_inference_of_predict_signatures(examples: Path) -> None:
    joined = settings(multi_inference=(("classify", "serving_default"),))
    refused(examples, joined, InvalidArgument, "'serving_default' is Predict")


def test_unknown_dimensions_without_a_size(signatures: Path) -> None:
    refused(
        signatures,
        settings(signatures=("sequence",)),
        InvalidArgument,
        r"input 'tokens' has shape \[\?, \?\]: .*--dim tokens=SIZE, or give samples",
    )
    refused(
        signatures,
        settings(signatures=("sequence",), dims={"tokens": (1, 2)}),
        InvalidArgument,
        "tokens=SIZE",
    )
    refused(
        signatures, settings(signatures=("any_rank",)), InvalidArgument, r"\[\.\.\.\]: .*--dim x=SIZE,\.\.\."
    )


def test_sizes_that_cannot_be(signatures: Path) -> None:
    refused(signatures, settings(batch_sizes=(0,)), InvalidArgument, "batch size 0: it must be 1 or more")
    refused(signatures, settings(dims={"x": (-1,)}), InvalidArgument, "of x: none may be negative")


@pytest.mark.parametrize(
    ("model", "signature"), [("signatures", "serving_default"), ("examples", "classify")]
)
def test_batches_that_no_message_can_hold(
    saved_models: Path, tmp_path: Path, model: Path, signature: str
) -> None:
    """Refused before memory is taken for them."""
    copied = shutil.copytree(saved_models / model, tmp_path / "model")
    too_large = settings(signatures=(signature,), batch_sizes=(10**9,))
    refused(copied, too_large, ResourceExhausted, "a batch of 1000000000")


def test_inputs_that_disagree_about_the_batch(signatures: Path, tmp_path: Path) -> None:
    document = {
        "signature_name": "mixed",
        "inputs": {"ids": [1, 2], "name": ["a"], "flag": [[True]], "weight": [[1, 2, 3]]},
    }
    path = write_json(tmp_path, document)
    refused(
        signatures, settings(path, batch_sizes=(2,)), InvalidArgument, "equally many rows.*ids: 2, name: 1"
    )


def test_a_thousand_records_and_one_more(signatures: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("1,2,3,4\n" * 1000)
    assert len(built(signatures, settings(path))) == 1000
    path.write_text("1,2,3,4\n" * 1001)
    refused(signatures, settings(path), ResourceExhausted, "1001 records: .* more than 1000")
    assert len(built(signatures, settings(path, batch_sizes=(100,)))) == 11


def test_a_refusal_keeps_the_file_that_is_there(signatures: Path, tmp_path: Path) -> None:
    path = build(signatures, settings(write_json(tmp_path, {"instances": [X]})))
    content = path.read_bytes()
    refused(signatures, settings(signatures=("none",)), NotFound, "none")
    assert path.read_bytes() == content


def test_a_directory_that_cannot_be_written_to(signatures: Path) -> None:
    (signatures / "assets.extra").write_text("a file")
    with pytest.raises(FailedPrecondition, match="tf_serving_warmup_requests cannot be written"):
        build(signatures, settings(signatures=("serving_default",)))
    assert (signatures / "assets.extra").read_text() == "a file"


@given(st.binary(max_size=200), st.sampled_from(["json", "jsonl", "npz", "csv", "tfrecord"]))
def test_any_bytes_are_samples_or_a_spikeless_error(
    saved_models: Path, tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes(content)
    with pytest.raises(SpikelessError):
        make_requests(saved_models / "signatures", settings(path))
