"""TensorFlow's C runtime: load, run, close."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import psutil
import pytest

from spikeless import runtime
from spikeless.errors import Code, FailedPrecondition, InvalidArgument, SpikelessError
from spikeless.formats.protos import config_pb2
from spikeless.runtime import Session

Array = np.ndarray[Any, Any]


def tensor(session: Session, signature: str, alias: str) -> str:
    definition = session.meta_graph.signature_def[signature]
    infos = definition.inputs if alias in definition.inputs else definition.outputs
    return str(infos[alias].name)


def run(session: Session, signature: str, output: str, **inputs: Array) -> Array:
    feeds = {tensor(session, signature, alias): value for alias, value in inputs.items()}
    (result,) = session.run(feeds, [tensor(session, signature, output)])
    return result


@pytest.fixture(scope="module")
def times(saved_models: Path) -> Iterator[Session]:
    with Session.load(saved_models / "times_two") as session:
        yield session


def test_version() -> None:
    assert runtime.version().startswith("2.")


def test_the_meta_graph_comes_without_its_graph(times: Session) -> None:
    assert {"serving_default", "spin"} <= set(times.meta_graph.signature_def)
    assert list(times.meta_graph.meta_info_def.tags) == ["serve"]
    assert not times.meta_graph.graph_def.node
    assert not times.meta_graph.object_graph_def.nodes


def test_outputs_outlive_the_session(saved_models: Path) -> None:
    with Session.load(saved_models / "times_two") as session:
        result = run(session, "serving_default", "y", x=np.arange(100_000, dtype=np.float32))
    gc.collect()
    np.testing.assert_array_equal(result, 2 * np.arange(100_000))


@pytest.mark.parametrize(
    "value",
    [
        np.array([[1, 2]], np.float16),
        np.array([[1, 2]], ml_dtypes.bfloat16),
        np.array([[1, 2], [3, 4]], np.float64)[::-1],
        np.asfortranarray(np.arange(6, dtype=np.int32).reshape(3, 2)),
        np.array([[1, 2]], dtype=">i8"),
        np.array([[True, False]]),
        np.array([[1j, 2]], np.complex64),
        np.empty((0, 2), np.uint16),
        # As large as those that are copied while other threads run.
        np.arange(1 << 16, dtype=np.float64).reshape(-1, 2)[::-1],
        np.arange(1 << 16, dtype=">i8").reshape(-1, 2),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}",
)
def test_values_come_back(saved_models: Path, value: Array) -> None:
    with Session.load(saved_models / "dtypes") as session:
        result = run(session, value.dtype.newbyteorder("=").name, "y", x=value)
    assert result.tolist() == value.tolist()
    assert result.shape == value.shape


def test_strings_come_back(saved_models: Path) -> None:
    values = np.array([[b"", b"short"], [b"\x00" * 22, b"x" * 1_000_000]], dtype=object)
    with Session.load(saved_models / "dtypes") as session:
        assert run(session, "string", "y", x=values).tolist() == values.tolist()


def test_memory_is_given_back(times: Session) -> None:
    value = np.ones(1_000_000, np.float32)
    run(times, "serving_default", "y", x=value)
    before = psutil.Process().memory_info().rss
    for _ in range(100):
        run(times, "serving_default", "y", x=value)
    assert psutil.Process().memory_info().rss - before < 100e6, "800 MB went through"


def test_a_bare_call_is_repeated(times: Session) -> None:
    feeds = {tensor(times, "serving_default", "x"): np.ones(1_000_000, np.float32)}
    fetches = [tensor(times, "serving_default", "y")]
    before = psutil.Process().memory_info().rss
    with times.bare_call(feeds, fetches) as call:
        for _ in range(100):
            call()
    assert psutil.Process().memory_info().rss - before < 100e6, "400 MB came back"
    with times.bare_call({}, fetches) as call, pytest.raises(SpikelessError) as caught:
        call()
    assert caught.value.code is Code.INVALID_ARGUMENT


#: Frees 64 MiB in small pieces, all but the last, which keeps the heap from shrinking
#: by itself. Prints the private memory before and after what was freed is given back.
_FREED = """
import ctypes
from spikeless import runtime
from spikeless.disk.proc import private_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
pieces = [libc.malloc(1024) for _ in range(1 << 16)]
for piece in pieces:
    ctypes.memset(piece, 1, 1024)
for piece in pieces[:-1]:
    libc.free(piece)
del pieces
before = private_memory()
runtime.return_free_memory()
print(before, private_memory())
"""


def test_freed_memory_is_given_back_to_the_kernel() -> None:
    command = [sys.executable, "-c", _FREED]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    before, after = map(int, done.stdout.split())
    assert before - after > 48 << 20


def test_errors_have_tensorflows_code_and_message(saved_models: Path, times: Session, tmp_path: Path) -> None:
    with pytest.raises(SpikelessError, match="Could not find SavedModel") as caught:
        Session.load(tmp_path)
    assert caught.value.code is Code.NOT_FOUND
    with pytest.raises(SpikelessError, match=r"supplied tags: \{ gpu \}") as caught:
        Session.load(saved_models / "times_two", tags=["gpu"])
    assert caught.value.code is Code.NOT_FOUND
    with pytest.raises(InvalidArgument, match="Tensor nothing:0, specified in the signature, was not found"):
        times.run({}, ["nothing:0"])
    with pytest.raises(SpikelessError) as caught:
        times.run({}, [tensor(times, "serving_default", "y")])
    assert caught.value.code is Code.INVALID_ARGUMENT
    spin = {tensor(times, "spin", "steps"): np.array(10**9, np.int32)}
    with pytest.raises(SpikelessError) as caught:
        times.run(spin, [tensor(times, "spin", "y")], timeout=0.05)
    assert caught.value.code is Code.DEADLINE_EXCEEDED


def test_where_a_load_runs_is_told_to_tensorflow(saved_models: Path) -> None:
    """A pool that does not exist is refused; the calling thread needs none."""
    assert Session.load.__kwdefaults__ is None
    assert Session.load.__defaults__[-1] == runtime.CALLING_THREAD == -1  # type: ignore[index]
    with pytest.raises(SpikelessError, match="Invalid inter_op_thread_pool: 7"):
        Session.load(saved_models / "times_two", inter_op_thread_pool=7)
    pools = config_pb2.ConfigProto()
    pools.session_inter_op_thread_pool.add()
    pools.session_inter_op_thread_pool.add(num_threads=1)
    for pool in (-1, 0, 1, None):
        Session.load(saved_models / "times_two", config=pools, inter_op_thread_pool=pool).close()


def test_where_a_run_runs_is_told_to_tensorflow(times: Session) -> None:
    feeds = {tensor(times, "serving_default", "x"): np.array([1, 2], np.float32)}
    fetches = [tensor(times, "serving_default", "y")]
    for pool in (runtime.CALLING_THREAD, 0, None):
        (result,) = times.run(feeds, fetches, inter_op_thread_pool=pool)
        assert result.tolist() == [2, 4]
    with pytest.raises(SpikelessError, match="Invalid inter_op_thread_pool: 7"):
        times.run(feeds, fetches, inter_op_thread_pool=7)


def test_closing_waits_for_the_last_run(saved_models: Path) -> None:
    session = Session.load(saved_models / "times_two")
    results: list[object] = []
    run(session, "spin", "y", steps=np.array(1, np.int32))  # so that the next run looks nothing up

    def spin() -> None:
        results.append(run(session, "spin", "y", steps=np.array(3000, np.int32)))

    thread = threading.Thread(target=spin)
    thread.start()
    while not session._running:
        assert thread.is_alive()
    session.close()
    thread.join()
    assert len(results) == 1
    session.close()
    with pytest.raises(FailedPrecondition, match="the session is closed"):
        run(session, "serving_default", "y", x=np.ones(1, np.float32))
