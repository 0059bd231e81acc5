"""What Spikeless relies on that TensorFlow does not promise, one fact a test.

A failure here names the fact, and the module that has to change for this TensorFlow
before its version goes into the ranges of pyproject.toml. Other tests check what
follows from these facts: test_runtime (values, errors, thread pools), test_mapping
(private memory, each kind of model), test_checkpoint (slices, damage),
test_tensors_against_tensorflow (each type) and test_import_cost (messages without
TensorFlow's Python package).
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from spikeless import runtime
from spikeless.errors import Code, SpikelessError
from spikeless.formats.checkpoint import Checkpoint, rewrite
from spikeless.formats.protos import meta_graph_pb2, saved_model_pb2, tensorflow_directory
from spikeless.mapping import MapSettings, map_saved_model
from spikeless.mapping.optimize import optimize
from spikeless.mapping.rewrite import _NOT_FOLDED, FILE_ATTRIBUTE, MAPPED_OPERATION
from spikeless.runtime import Session
from spikeless.runtime import session as c_api

#: Bytes of the large variable: far more than what a process allocates by chance.
SIZE = 64 << 20


def holds(fact: bool, statement: str, module: str) -> None:
    """Fails with the statement that is no longer true, and with what relies on it."""
    if not fact:
        pytest.fail(f"no longer true of TensorFlow {runtime.version()}: {statement}. {module} relies on it")


def headers() -> str:
    """The C API's headers, which the wheel brings along, without their comments."""
    folder = tensorflow_directory() / "include" / "tensorflow" / "c"
    names = ("c_api.h", "tf_buffer.h", "tf_status.h", "tf_tensor.h", "tf_tstring.h")
    return re.sub(r"//.*", "", "".join((folder / name).read_text() for name in names))


# The C API ----------------------------------------------------------------------------


def test_functions_take_as_many_arguments_as_declared() -> None:
    text = headers()
    for name, (_, arguments) in c_api._SIGNATURES.items():
        found = re.search(rf"\b{name}\(([^)]*)\);", text)
        parameters = (
            [part for part in found[1].split(",") if part.strip() not in ("", "void")] if found else None
        )
        holds(
            parameters is not None and len(parameters) == len(arguments),
            f"{name} takes {len(arguments)} arguments (it takes {parameters})",
            "runtime/session.py, _SIGNATURES",
        )


def test_structures_have_the_declared_fields() -> None:
    for name, declared in (("TF_Buffer", c_api._Buffer), ("TF_Output", c_api._Output)):
        found = re.search(rf"typedef struct {name} {{(.*?)}} {name};", headers(), re.DOTALL)
        fields = re.findall(r";", re.sub(r"\([^()]*\)", "", found[1])) if found else []
        count = len(declared._fields_)
        holds(len(fields) == count, f"{name} has {count} fields", f"runtime/session.py, {declared.__name__}")
    library = c_api._tf()
    buffer = library.NewBufferFromString(b"content", 7)
    try:
        content = ctypes.string_at(buffer.contents.data, buffer.contents.length)
    finally:
        library.DeleteBuffer(buffer)
    holds(content == b"content", "TF_Buffer begins with data and length", "runtime/session.py, _Buffer")


def test_strings_take_24_bytes(saved_models: Path) -> None:
    library = c_api._tf()
    # Inside of a TF_TString, at its limit, beyond it.
    strings = [b"", b"x" * 22, b"x" * 23, b"x" * 1000]
    with Session.load(saved_models / "dtypes") as session, c_api._status(library) as status:
        signature = session.meta_graph.signature_def["string"]
        value = c_api._to_tensor(library, np.array([strings], object).reshape(2, 2))
        results = (ctypes.c_void_p * 1)()
        c_api._session_run(
            library,
            session._enter(),
            None,
            (c_api._Output * 1)(session._output(signature.inputs["x"].name)),
            (ctypes.c_void_p * 1)(value),
            (c_api._Output * 1)(session._output(signature.outputs["y"].name)),
            results,
            status,
        )
        session._leave()
        library.DeleteTensor(value)
        c_api._check(library, status)
        size = library.TensorByteSize(results[0])
        answer = c_api._from_tensor(library, c_api._Held(library, int(results[0] or 0)))
    held = size == len(strings) * c_api._STRING_BYTES and answer.ravel().tolist() == strings
    holds(held, f"a TF_TString takes {c_api._STRING_BYTES} bytes", "runtime/session.py, _STRING_BYTES")


def test_status_codes_are_numbered_as_those_of_grpc(tmp_path: Path) -> None:
    for code in Code:
        if code is not Code.OK:
            held = getattr(tf.errors, code.name) == code
            holds(held, f"{code.name} is {int(code)}", "errors.py, Code")
    with pytest.raises(SpikelessError) as caught:
        Session.load(tmp_path)
    holds(caught.value.code is Code.NOT_FOUND, "a missing SavedModel is NOT_FOUND", "errors.py, Code")


def test_where_restore_runs_can_be_chosen(saved_models: Path) -> None:
    message = ""
    try:
        Session.load(saved_models / "times_two", inter_op_thread_pool=7).close()
    except SpikelessError as error:
        message = str(error)
    held = "Invalid inter_op_thread_pool: 7" in message
    holds(held, "a load heeds RunOptions.inter_op_thread_pool", "runtime/session.py, CALLING_THREAD")
    Session.load(saved_models / "times_two", inter_op_thread_pool=runtime.CALLING_THREAD).close()


# Files --------------------------------------------------------------------------------


def test_the_large_fields_of_a_meta_graph_are_where_they_were() -> None:
    names = {meta_graph_pb2.MetaGraphDef.DESCRIPTOR.fields_by_number[n].name for n in c_api._LARGE_FIELDS}
    held = names == {"graph_def", "object_graph_def"}
    holds(held, f"fields {sorted(c_api._LARGE_FIELDS)} are the graphs", "runtime/session.py, _LARGE_FIELDS")


def test_checkpoints_are_string_tables_that_tensorflow_reads_in_any_layout(tmp_path: Path) -> None:
    prefixes = [tmp_path / "written", tmp_path / "rewritten"]
    tf.raw_ops.SaveV2(
        prefix=str(prefixes[0]),
        tensor_names=["numbers", "text"],
        shape_and_slices=["", ""],
        tensors=[tf.range(1000, dtype=tf.float32), tf.constant(["ü", ""])],
    )
    written = Checkpoint.read(prefixes[0])
    held = set(written.entries) == {b"numbers", b"text"}
    holds(held, "a checkpoint's index maps names to entries", "formats/checkpoint.py, Checkpoint.read")
    rewrite(written, prefixes[1], [(b"numbers",)])
    one, other = (tf.train.load_checkpoint(str(prefix)) for prefix in prefixes)
    held = all(np.array_equal(one.get_tensor(name), other.get_tensor(name)) for name in ("numbers", "text"))
    holds(held, "a tensor may be in a shard of its own", "formats/checkpoint.py, rewrite")


# Mapping ------------------------------------------------------------------------------


def export(folder: Path, size: int) -> None:
    """``stock``, a model with one variable of so many bytes, and it ``mapped``."""
    model = tf.Module()
    model.table = tf.Variable(tf.random.stateless_normal([size // 256, 64], [1, 2]), name="table")
    model.look = tf.function(
        lambda ids: {"rows": tf.gather(model.table, ids)},
        input_signature=[tf.TensorSpec([None], tf.int64, "ids")],
    )
    tf.saved_model.save(model, str(folder / "stock"), {"serving_default": model.look})
    map_saved_model(folder / "stock", folder / "mapped", MapSettings())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    export(folder, SIZE)
    return folder


@dataclass(frozen=True)
class Memory:
    """Private memory beyond the bare runtime's, in bytes; mapped variables."""

    loaded: int
    closed: int
    mapped: int


#: Loads a model, asks it once, closes it. Prints the fields of `Memory`.
_MEASURE = """
import sys
import numpy as np
from spikeless import runtime
from spikeless.disk.proc import mapped_files, private_memory

runtime.version()
before = private_memory()
with runtime.Session.load(sys.argv[1]) as session:
    signature = session.meta_graph.signature_def["serving_default"]
    feeds = {signature.inputs["ids"].name: np.arange(100)}
    session.run(feeds, [signature.outputs["rows"].name])
    loaded = private_memory() - before
    mapped = sum("variables.data-00001" in file.path for file in mapped_files())
runtime.return_free_memory()
print(loaded, private_memory() - before, mapped)
"""


def measure(model: Path) -> Memory:
    command = [sys.executable, "-c", _MEASURE, str(model)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    return Memory(*map(int, done.stdout.split()))


def test_a_variable_adopts_the_mapped_memory(large: Path) -> None:
    memory = measure(large / "mapped")
    held = memory.mapped == 1 and memory.loaded < SIZE / 4
    holds(held, f"AssignVariableOp adopts its value's buffer ({memory})", "mapping/rewrite.py")


def test_memory_of_a_closed_session_is_given_back(large: Path) -> None:
    memory = measure(large / "stock")
    held = memory.loaded > SIZE and memory.closed < SIZE / 4
    statement = f"with TF_ONEDNN_USE_SYSTEM_ALLOCATOR=1, tensors come from malloc ({memory})"
    holds(held, statement, "runtime/session.py, _load_library")


def test_an_attribute_keeps_a_mapped_constant_from_being_folded(tmp_path: Path) -> None:
    # Small enough for TensorFlow to fold; below 100 KiB it does so in any case.
    export(tmp_path, 4 << 20)
    statement = f"constants with {_NOT_FOLDED} are not folded"
    holds(measure(tmp_path / "mapped").mapped == 1, statement, "mapping/rewrite.py, _NOT_FOLDED")
    file = tmp_path / "mapped" / "saved_model.pb"
    saved_model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    for meta_graph in saved_model.meta_graphs:
        graph = meta_graph.graph_def
        for node in (
            *graph.node,
            *(node for function in graph.library.function for node in function.node_def),
        ):
            if node.op == MAPPED_OPERATION:
                assert FILE_ATTRIBUTE in node.attr
                del node.attr[_NOT_FOLDED]
    file.unlink()
    file.write_bytes(saved_model.SerializeToString())
    statement = f"constants without {_NOT_FOLDED} are folded, so that it is needed"
    holds(measure(tmp_path / "mapped").mapped == 0, statement, "mapping/rewrite.py, _NOT_FOLDED")


def test_grappler_fuses_for_a_cpu_that_only_the_graph_names(tmp_path: Path) -> None:
    model = tf.Module()
    model.kernel, model.bias = tf.Variable(tf.ones([8, 4])), tf.Variable(tf.ones([4]))
    model.dense = tf.function(
        lambda x: {"y": tf.nn.relu(tf.nn.bias_add(x @ model.kernel, model.bias))},
        input_signature=[tf.TensorSpec([None, 8], tf.float32, "x")],
    )
    tf.saved_model.save(model, str(tmp_path), {"serving_default": model.dense})
    saved_model = saved_model_pb2.SavedModel.FromString((tmp_path / "saved_model.pb").read_bytes())
    meta_graph = saved_model.meta_graphs[0]
    optimize(meta_graph)
    operations = {node.op for node in meta_graph.graph_def.node}
    statement = f"Grappler fuses MatMul, BiasAdd and Relu without a device (it left {sorted(operations)})"
    holds("_FusedMatMul" in operations, statement, "mapping/optimize.py, _DEVICE")
