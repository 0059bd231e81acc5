"""TensorFlow's C runtime through ctypes: load a SavedModel, run it, close it.

In: a SavedModel directory, then named NumPy arrays. Out: NumPy arrays. This is the same
loader, session and set of kernels that TensorFlow Serving uses, in
``libtensorflow_cc.so.2`` of the ``tensorflow`` wheel, called with the GIL released.
TensorFlow's Python package is not imported.

All of ctypes is in this module. The functions are declared in ``tensorflow/c/c_api.h``,
``tf_buffer.h``, ``tf_status.h``, ``tf_tensor.h`` and ``tf_tstring.h``.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint8, c_void_p
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from spikeless.errors import FailedPrecondition, InvalidArgument, TensorFlowError
from spikeless.formats import wire
from spikeless.formats.protos import config_pb2, meta_graph_pb2, op_def_pb2, tensorflow_directory, types_pb2
from spikeless.formats.tensors import as_bytes, data_type, numpy_dtype

#: Restore and initialise on the calling thread instead of the pool that requests run on
#: (``RunOptions.inter_op_thread_pool``), so that a load does not take that pool's
#: threads from them.
CALLING_THREAD = -1


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("length", c_size_t),
        ("deallocator", c_void_p),
    ]


class _Output(ctypes.Structure):
    """One output of an operation in a graph."""

    _fields_ = [("operation", c_void_p), ("index", c_int)]


_STRING_BYTES = 24  # sizeof(TF_TString), fixed by its ABI
_BUFFER = POINTER(_Buffer)
#: Where tensors go or come from, the tensors, and how many.
_TENSORS = (POINTER(_Output), POINTER(c_void_p), c_int)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "TF_Version": (c_char_p, []),
    "TF_GetAllOpList": (_BUFFER, []),
    "TF_NewStatus": (c_void_p, []),
    "TF_DeleteStatus": (None, [c_void_p]),
    "TF_GetCode": (c_int, [c_void_p]),
    "TF_Message": (c_char_p, [c_void_p]),
    "TF_NewBuffer": (_BUFFER, []),
    "TF_NewBufferFromString": (_BUFFER, [c_char_p, c_size_t]),
    "TF_DeleteBuffer": (None, [_BUFFER]),
    "TF_NewGraph": (c_void_p, []),
    "TF_DeleteGraph": (None, [c_void_p]),
    "TF_GraphOperationByName": (c_void_p, [c_void_p, c_char_p]),
    "TF_OperationNumOutputs": (c_int, [c_void_p]),
    "TF_NewSessionOptions": (c_void_p, []),
    "TF_SetConfig": (None, [c_void_p, c_char_p, c_size_t, c_void_p]),
    "TF_DeleteSessionOptions": (None, [c_void_p]),
    "TF_LoadSessionFromSavedModel": (
        c_void_p,
        [c_void_p, _BUFFER, c_char_p, POINTER(c_char_p), c_int, c_void_p, _BUFFER, c_void_p],
    ),
    "TF_SessionRun": (
        None,
        [c_void_p, _BUFFER, *_TENSORS, *_TENSORS, POINTER(c_void_p), c_int, _BUFFER, c_void_p],
    ),
    "TF_CloseSession": (None, [c_void_p, c_void_p]),
    "TF_DeleteSession": (None, [c_void_p, c_void_p]),
    "TF_AllocateTensor": (c_void_p, [c_int, POINTER(c_int64), c_int, c_size_t]),
    "TF_DeleteTensor": (None, [c_void_p]),
    "TF_TensorType": (c_int, [c_void_p]),
    "TF_NumDims": (c_int, [c_void_p]),
    "TF_Dim": (c_int64, [c_void_p, c_int]),
    "TF_TensorByteSize": (c_size_t, [c_void_p]),
    "TF_TensorData": (c_void_p, [c_void_p]),
    "TF_StringInit": (None, [c_void_p]),
    "TF_StringCopy": (None, [c_void_p, c_char_p, c_size_t]),
    "TF_StringGetDataPointer": (c_void_p, [c_void_p]),
    "TF_StringGetSize": (c_size_t, [c_void_p]),
}


#: The functions that may take long. Only they give the GIL away: for the others, to
#: give it away and to get it back among many threads would cost far more than what they
#: do.
_LONG = frozenset(
    {
        "TF_CloseSession",
        "TF_DeleteGraph",
        "TF_DeleteSession",
        "TF_LoadSessionFromSavedModel",
        "TF_SessionRun",
    }
)
#: From this many bytes on, copying takes long.
_LARGE_COPY = 1 << 18


#: The functions of the C API that are used here, each an attribute.
_Library = SimpleNamespace


@functools.cache
def _load_library() -> _Library:
    # Errors come back as statuses; what TensorFlow logs besides is mostly about
    # GPUs that are not there.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Otherwise tensors come from oneDNN's own pool (``mklcpu``). It never gives
    # memory back: after five reloads it held three copies of the parameters; it
    # refused a second version of 8 GiB on a machine of 24; and a preloaded jemalloc
    # never sees a parameter.
    os.environ.setdefault("TF_ONEDNN_USE_SYSTEM_ALLOCATOR", "1")
    directory = tensorflow_directory()
    suffix = "2.dylib" if os.uname().sysname == "Darwin" else "so.2"
    path = directory / f"libtensorflow_cc.{suffix}"
    if not path.exists():
        raise FailedPrecondition(f"{path} is missing: install the tensorflow wheel in full")
    library, holding_gil = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
    functions = _Library()
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library if name in _LONG else holding_gil, name)
        function.restype, function.argtypes = result, arguments
        setattr(functions, name.removeprefix("TF_"), function)
    return functions


_library_lock = threading.Lock()


def _tf() -> _Library:
    with _library_lock:  # without it, two first callers would both load it
        return _load_library()


def version() -> str:
    """The version of the TensorFlow runtime, such as ``2.20.0``."""
    return str(_tf().Version().decode())


def op_names() -> frozenset[str]:
    """The names of all operations that the TensorFlow runtime has."""
    buffer = _tf().GetAllOpList()
    try:
        content = ctypes.string_at(buffer.contents.data, buffer.contents.length)
    finally:
        _tf().DeleteBuffer(buffer)
    return frozenset(op.name for op in op_def_pb2.OpList.FromString(content).op)


def return_free_memory() -> None:
    """Return memory that was freed to the kernel (``malloc_trim``).

    It stops every thread that allocates while it looks: something for the time before
    requests. Without an effect where the C library is not glibc, or another allocator
    is preloaded.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(c_size_t(0))


def _check(tf: _Library, status: int) -> None:
    """Raise what the call with this TF_Status reported."""
    code = tf.GetCode(status)
    if code:
        raise TensorFlowError(code, tf.Message(status).decode("utf-8", "replace"))


@contextmanager
def _status(tf: _Library) -> Iterator[int]:
    status = tf.NewStatus()
    try:
        yield status
    finally:
        tf.DeleteStatus(status)


@contextmanager
def _buffer(tf: _Library, content: bytes) -> Iterator[Any]:
    buffer = tf.NewBufferFromString(content, len(content))
    try:
        yield buffer
    finally:
        tf.DeleteBuffer(buffer)


#: ``memmove`` without giving the GIL away.
_memmove = ctypes.PyDLL(None).memmove
_memmove.restype, _memmove.argtypes = c_void_p, [c_void_p, c_void_p, c_size_t]


def _copy(target: int, array: np.ndarray[Any, Any]) -> None:
    """Copy numbers in C's order, and in the byte order of this machine."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    size = array.nbytes
    if size >= _LARGE_COPY:
        contiguous = np.ascontiguousarray(array)
        ctypes.memmove(target, contiguous.__array_interface__["data"][0], size)
    elif size:
        # To copy a few bytes twice costs less than to ask NumPy for their address.
        _memmove(target, array.tobytes(), size)


class _Held:
    """Owns one TF_Tensor for as long as arrays look into its memory."""

    def __init__(self, tf: _Library, handle: int) -> None:
        self.handle: int | None = handle
        self._delete = tf.DeleteTensor

    def release(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            self._delete(handle)

    __del__ = release


#: What a tensor is fed with: an array, or several of one type that are stacked along
#: their first axis.
Feed = np.ndarray[Any, Any] | Sequence[np.ndarray[Any, Any]]


def _to_tensor(tf: _Library, feed: Feed) -> int:
    """Copy arrays into a new TF_Tensor, which the caller owns."""
    if isinstance(feed, np.ndarray):
        arrays, shape = [feed], feed.shape
    else:
        arrays, shape = list(feed), (sum(map(len, feed)), *feed[0].shape[1:])
    number = data_type(arrays[0].dtype)
    dims = _dims(shape)
    if number == types_pb2.DT_STRING:
        strings = chain.from_iterable(array.reshape(-1).tolist() for array in arrays)
        return _to_string_tensor(tf, as_bytes(list(strings)), dims)
    handle = _allocate(tf, number, dims, sum([array.nbytes for array in arrays]))
    address = tf.TensorData(handle)
    for array in arrays:
        _copy(address, array)
        address += array.nbytes
    return handle


@functools.lru_cache(maxsize=1024)
def _dims(shape: tuple[int, ...]) -> Any:
    """A shape as C takes it, which only reads it."""
    return (c_int64 * len(shape))(*shape)


def _allocate(tf: _Library, number: int, dims: Any, size: int) -> int:
    handle: int | None = tf.AllocateTensor(number, dims, len(dims), size)
    if not handle:
        raise MemoryError(f"no memory for a tensor of {size} bytes")
    return handle


def _to_string_tensor(tf: _Library, values: list[bytes], dims: Any) -> int:
    handle = _allocate(tf, types_pb2.DT_STRING, dims, len(values) * _STRING_BYTES)
    address = tf.TensorData(handle)
    for index, value in enumerate(values):
        element = address + index * _STRING_BYTES
        tf.StringInit(element)
        tf.StringCopy(element, value, len(value))
    return handle


def _from_tensor(tf: _Library, tensor: _Held) -> np.ndarray[Any, Any]:
    """An array over a TF_Tensor's memory, which it keeps alive; strings are copied."""
    handle = tensor.handle
    number = tf.TensorType(handle)
    shape = tuple(tf.Dim(handle, axis) for axis in range(tf.NumDims(handle)))
    dtype = numpy_dtype(number)
    size, address = tf.TensorByteSize(handle), tf.TensorData(handle)
    if number == types_pb2.DT_STRING:
        flat = np.empty(size // _STRING_BYTES, dtype=object)
        for index in range(len(flat)):
            element = address + index * _STRING_BYTES
            flat[index] = ctypes.string_at(tf.StringGetDataPointer(element), tf.StringGetSize(element))
        tensor.release()
        return flat.reshape(shape)
    if not size:
        tensor.release()
        return np.empty(shape, dtype=dtype)
    memory = (c_uint8 * size).from_address(address)
    memory._tensor = tensor
    return np.frombuffer(memory, dtype=dtype).reshape(shape)


#: Fields of MetaGraphDef that can be as large as the model: ``graph_def`` and
#: ``object_graph_def``.
_LARGE_FIELDS = frozenset({2, 7})


def _parse_without_graph(content: memoryview) -> meta_graph_pb2.MetaGraphDef:
    """A MetaGraphDef without the fields that nobody reads after the load.

    Parsing a large graph would hold the GIL, and with it all requests, for as long as
    it takes. So only the top level of the message is walked, and the large fields are
    never looked into.
    """
    kept = b"".join(whole for number, whole, _ in wire.fields(content) if number not in _LARGE_FIELDS)
    return meta_graph_pb2.MetaGraphDef.FromString(kept)


def _session_run(
    tf: _Library,
    session: int,
    options: Any,
    feeds: Any,
    values: Any,
    fetches: Any,
    results: Any,
    status: int,
) -> None:
    """``TF_SessionRun`` of ctypes arrays, without target operations or run metadata."""
    count, wanted = len(values), len(results)
    tf.SessionRun(session, options, feeds, values, count, fetches, results, wanted, None, 0, None, status)


#: Machine -> the bytes of C's ``fenv_t``, where in them the control register is, and
#: the bits in it that make denormal numbers zero.
_FLOATING_POINT = {"x86_64": (32, 28, 0x8040), "aarch64": (8, 0, 1 << 24)}
_AS_IT_IS = nullcontext()


class _FlushingDenormals(AbstractContextManager[None]):
    """This thread takes denormal numbers for zero, as TensorFlow's own do."""

    def __init__(self) -> None:
        size, offset, bits = _FLOATING_POINT[platform.machine()]
        library = ctypes.PyDLL("libm.so.6")
        self._set = library.fesetenv
        self._ordinary, self._flushing = (c_uint8 * size)(), (c_uint8 * size)()
        for environment in (self._ordinary, self._flushing):
            library.fegetenv(environment)
        control = ctypes.c_uint32.from_buffer(self._flushing, offset)
        control.value |= bits

    def __enter__(self) -> None:
        self._set(self._flushing)

    def __exit__(self, *_: object) -> None:
        self._set(self._ordinary)


@functools.cache
def _flushing_denormals() -> AbstractContextManager[None]:
    return _FlushingDenormals() if platform.machine() in _FLOATING_POINT else _AS_IT_IS


#: Operations that may run for ever, or wait for something, whatever they are fed with.
_UNBOUNDED = re.compile(
    r"(Stateless)?While|For|LoopCond|NextIteration|.*PyFunc.*|.*Queue.*|.*Barrier.*|.*Batch(Function)?|Unbatch.*"
    r"|.*Stage.*|.*Stack.*V2|.*Iterator.*|.*Dataset.*|.*Mutex.*|.*Recv|_?Send|ReadFile|.*Reader.*|Rpc.*|.*Remote.*"
)


def _is_bounded(meta_graph: meta_graph_pb2.MetaGraphDef) -> bool:
    """Whether there is no such operation, as far as the meta graph says what it has."""
    operations = [operation.name for operation in meta_graph.meta_info_def.stripped_op_list.op]
    return bool(operations) and not any(map(_UNBOUNDED.fullmatch, operations))


@functools.cache
def _on_calling_thread() -> Any:
    """The options of such runs, for as long as the process lives."""
    content = config_pb2.RunOptions(inter_op_thread_pool=CALLING_THREAD).SerializeToString()
    return _tf().NewBufferFromString(content, len(content))


#: Combinations of tensors of one session that are kept.
_MOST_ARRAYS = 256


class Session(AbstractContextManager["Session"]):
    """A loaded SavedModel: runs any number of calls at once from any number of threads.

    Close it only when no call is running any more; ``close`` waits for those that are.
    """

    def __init__(
        self, session: int, graph: int, meta_graph: meta_graph_pb2.MetaGraphDef, runs_inline: bool = False
    ) -> None:
        self.meta_graph = meta_graph
        #: A run ends by itself, in a time that its inputs' sizes bound.
        self.is_bounded = _is_bounded(meta_graph)
        # Whether the session config lets operations run on the threads that call.
        self._runs_inline = runs_inline
        self._tf = _tf()
        self._session: int | None = session
        self._graph = graph
        self._running = 0
        # Taken by each run: a lock costs less than a condition around one.
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._outputs: dict[str, _Output] = {}
        self._arrays: dict[tuple[str, ...], Any] = {}

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        tags: Collection[str] = ("serve",),
        config: config_pb2.ConfigProto | None = None,
        inter_op_thread_pool: int | None = CALLING_THREAD,
    ) -> Session:
        """Build the graph of a SavedModel, restore its variables, run its initialiser.

        Args:
            path: the SavedModel's directory.
            tags: the meta graph to load is the one with exactly these tags.
            config: session settings; TensorFlow's defaults without it.
            inter_op_thread_pool: where restore and initialisation run:
                ``CALLING_THREAD``, the index of one of the config's
                ``session_inter_op_thread_pool`` entries, or None for the requests'
                pool.

        Raises:
            TensorFlowError: TensorFlow could not load it; code and message are
                TensorFlow's.
        """
        tf = _tf()
        options = config_pb2.RunOptions()
        if inter_op_thread_pool is not None:
            options.inter_op_thread_pool = inter_op_thread_pool
        names = (c_char_p * len(tags))(*(tag.encode() for tag in sorted(tags)))
        session_options, graph, meta_graph = tf.NewSessionOptions(), tf.NewGraph(), tf.NewBuffer()
        try:
            with _status(tf) as status, _buffer(tf, options.SerializeToString()) as run_options:
                settings = config_pb2.ConfigProto()
                settings.device_count["GPU"] = 0  # not looked for: this engine runs on the CPU
                if config is not None:
                    settings.MergeFrom(config)
                content = settings.SerializeToString()
                tf.SetConfig(session_options, content, len(content), status)
                _check(tf, status)
                session = tf.LoadSessionFromSavedModel(
                    session_options,
                    run_options,
                    os.fsencode(Path(path)),
                    names,
                    len(names),
                    graph,
                    meta_graph,
                    status,
                )
                _check(tf, status)
            buffer = meta_graph.contents
            view = (c_uint8 * buffer.length).from_address(buffer.data) if buffer.length else b""
            definition = _parse_without_graph(memoryview(view).cast("B"))
        except BaseException:
            tf.DeleteGraph(graph)
            raise
        finally:
            tf.DeleteBuffer(meta_graph)
            tf.DeleteSessionOptions(session_options)
        return cls(session, graph, definition, settings.inter_op_parallelism_threads < 0)

    def run(
        self,
        feeds: Mapping[str, Feed],
        fetches: Sequence[str],
        timeout: float | None = None,
        inter_op_thread_pool: int | None = None,
    ) -> list[np.ndarray[Any, Any]]:
        """One call: ``feeds`` by tensor name in, the tensors ``fetches`` out, in order.

        A feed is an array, or a sequence of arrays of one type that become one tensor,
        stacked along their first axis. ``inter_op_thread_pool`` is as in ``load``; None
        is the requests' pool. On the calling thread nothing can cut a run off.

        Raises:
            TensorFlowError: the kernels' error, or DEADLINE_EXCEEDED after ``timeout``
                seconds.
            InvalidArgument: a tensor that is not in the graph.
            FailedPrecondition: the session is closed.
        """
        tf = self._tf
        flushing = self._runs_inline or inter_op_thread_pool == CALLING_THREAD
        inputs, outputs = self._all_outputs(tuple(feeds)), self._all_outputs(tuple(fetches))
        values = (c_void_p * len(feeds))()
        results = (c_void_p * len(fetches))()
        run_options = own_options = status = None
        try:
            for index, array in enumerate(feeds.values()):
                values[index] = _to_tensor(tf, array)
            if inter_op_thread_pool == CALLING_THREAD:
                run_options = _on_calling_thread()
            elif timeout is not None or inter_op_thread_pool is not None:
                options = config_pb2.RunOptions(inter_op_thread_pool=inter_op_thread_pool)
                if timeout is not None:
                    options.timeout_in_ms = max(1, int(timeout * 1000))
                content = options.SerializeToString()
                run_options = own_options = tf.NewBufferFromString(content, len(content))
            status = tf.NewStatus()
            session = self._enter()
            try:
                with _flushing_denormals() if flushing else _AS_IT_IS:
                    _session_run(tf, session, run_options, inputs, values, outputs, results, status)
            finally:
                self._leave()
            _check(tf, status)
        finally:
            for value in values:
                if value:
                    tf.DeleteTensor(value)
            if own_options:
                tf.DeleteBuffer(own_options)
            if status:
                tf.DeleteStatus(status)
        # Owned before the first is looked into: an error in one must not lose the
        # others.
        held = [_Held(tf, result) for result in results if result]
        return [_from_tensor(tf, tensor) for tensor in held]

    @contextmanager
    def bare_call(
        self, feeds: Mapping[str, np.ndarray[Any, Any]], fetches: Sequence[str]
    ) -> Iterator[Callable[[], None]]:
        """A ``TF_SessionRun`` to repeat and time, with the feeds copied in beforehand.

        The results of a call are freed unread. Arguments and errors are those of `run`.
        """
        tf = self._tf
        inputs, outputs = self._all_outputs(tuple(feeds)), self._all_outputs(tuple(fetches))
        values = (c_void_p * len(feeds))(*(_to_tensor(tf, array) for array in feeds.values()))
        session = self._enter()
        try:
            with _status(tf) as status:

                def call() -> None:
                    results = (c_void_p * len(fetches))()
                    _session_run(tf, session, None, inputs, values, outputs, results, status)
                    _check(tf, status)
                    for result in results:
                        tf.DeleteTensor(result)

                yield call
        finally:
            self._leave()
            for value in values:
                tf.DeleteTensor(value)

    def _enter(self) -> int:
        """The session, which stays open until ``_leave``."""
        with self._lock:
            if self._session is None:
                raise FailedPrecondition("the session is closed")
            self._running += 1
            return self._session

    def _leave(self) -> None:
        with self._lock:
            self._running -= 1
            if self._session is None:
                self._idle.notify_all()

    def _all_outputs(self, names: tuple[str, ...]) -> Any:
        """The sources of tensors, as C takes them; those of a signature are kept."""
        outputs = self._arrays.get(names)
        if outputs is None:
            outputs = (_Output * len(names))(*map(self._output, names))
            if len(self._arrays) < _MOST_ARRAYS:
                self._arrays[names] = outputs
        return outputs

    def _output(self, name: str) -> _Output:
        """The source of a tensor such as ``dense/BiasAdd:0``, looked up once."""
        output = self._outputs.get(name)
        if output is None:
            operation_name, _, index = name.partition(":")
            self._enter()
            try:
                operation = self._tf.GraphOperationByName(self._graph, operation_name.encode())
                known = operation and int(index or 0) < self._tf.OperationNumOutputs(operation)
            finally:
                self._leave()
            if not known:
                raise InvalidArgument(
                    f"Tensor {name}, specified in the signature, was not found in the graph"
                )
            output = self._outputs[name] = _Output(operation, int(index or 0))
        return output

    def close(self) -> None:
        """Wait for running calls, then free the session; again does nothing."""
        with self._idle:
            session, self._session = self._session, None
            if session is None:
                return
            self._idle.wait_for(lambda: not self._running)
        with _status(self._tf) as status:
            self._tf.CloseSession(session, status)
            self._tf.DeleteSession(session, status)
        self._tf.DeleteGraph(self._graph)

    def __exit__(self, *_: object) -> None:
        self.close()
