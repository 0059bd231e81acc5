"""The messages of TensorFlow and TensorFlow Serving, without importing TensorFlow.

The generated modules live inside the ``tensorflow`` package, so a plain import of one
of them runs ``tensorflow/__init__.py``: seconds of time, half a gigabyte of memory and
a garbage collection of about 100 ms that looks like a reload spike. Here a bare
package of that name stands in while the messages are imported (tens of milliseconds)
and is taken away afterwards, so that a later ``import tensorflow`` gets the real one
and shares the message classes.

Modules of this package import messages from here only. (``model_service_pb2`` and
``prediction_service_pb2`` hold nothing but service descriptors and are left out:
current protobuf cannot import those of 2.20.0.)
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import Message

from spikeless.errors import InvalidArgument, NotFound

_M = TypeVar("_M", bound=Message)
_Field = descriptor_pb2.FieldDescriptorProto
_FIELD_TYPES = {bool: _Field.TYPE_BOOL, str: _Field.TYPE_STRING}
_declared = descriptor_pool.DescriptorPool()


def message_class(name: str, **fields: tuple[int, type[Any]]) -> type[Any]:
    """A message that the Python packages of TensorFlow Serving leave out.

    Args:
        name: of the message.
        fields: the number and the type of each optional field: ``bool``, ``str`` or
            another class that this function made.
    """
    file = descriptor_pb2.FileDescriptorProto(name=f"spikeless/{name}.proto", package="spikeless")
    message = file.message_type.add(name=name)
    for field, (number, kind) in fields.items():
        added = message.field.add(name=field, number=number, label=_Field.LABEL_OPTIONAL)
        if kind in _FIELD_TYPES:
            added.type = _FIELD_TYPES[kind]
        else:
            added.type, added.type_name = _Field.TYPE_MESSAGE, f".{kind.DESCRIPTOR.full_name}"
            file.dependency.append(kind.DESCRIPTOR.file.name)
    _declared.Add(file)
    return message_factory.GetMessageClass(_declared.FindMessageTypeByName(f"spikeless.{name}"))


def read_text_proto(file: str | os.PathLike[str], message: _M) -> _M:
    """Parse a file in protocol buffer text format into ``message``, and return it.

    Raises:
        NotFound: the file cannot be read.
        InvalidArgument: it holds no such message.
    """
    try:
        text_format.Parse(Path(file).read_text(), message)
    except OSError as error:
        raise NotFound(f"cannot read {os.fspath(file)}: {error.strerror}") from None
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"Invalid protobuf file: '{os.fspath(file)}': {error}") from None
    return message


def tensorflow_directory() -> Path:
    """The folder of the installed ``tensorflow`` wheel, found without importing it."""
    spec = importlib.util.find_spec("tensorflow")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("tensorflow is not installed: run `pip install -r requirements.txt`")
    return Path(spec.submodule_search_locations[0])


@contextmanager
def _bare_tensorflow() -> Iterator[None]:
    if "tensorflow" in sys.modules:
        yield
        return
    bare = types.ModuleType("tensorflow")
    bare.__path__ = [str(tensorflow_directory())]
    sys.modules["tensorflow"] = bare
    try:
        yield
    finally:
        if sys.modules.get("tensorflow") is bare:
            del sys.modules["tensorflow"]


with _bare_tensorflow():
    from tensorflow.core.example import example_pb2, feature_pb2
    from tensorflow.core.framework import (
        attr_value_pb2,
        function_pb2,
        graph_pb2,
        node_def_pb2,
        op_def_pb2,
        tensor_pb2,
        tensor_shape_pb2,
        tensor_slice_pb2,
        types_pb2,
        versions_pb2,
    )
    from tensorflow.core.protobuf import (
        config_pb2,
        meta_graph_pb2,
        rewriter_config_pb2,
        saved_model_pb2,
        saved_object_graph_pb2,
        saver_pb2,
        struct_pb2,
        tensor_bundle_pb2,
        trackable_object_graph_pb2,
    )
    from tensorflow_serving.apis import (
        classification_pb2,
        get_model_metadata_pb2,
        get_model_status_pb2,
        inference_pb2,
        input_pb2,
        model_management_pb2,
        model_pb2,
        model_service_pb2_grpc,
        predict_pb2,
        prediction_log_pb2,
        prediction_service_pb2_grpc,
        regression_pb2,
        status_pb2,
    )
    from tensorflow_serving.config import (
        file_system_storage_path_source_pb2,
        model_server_config_pb2,
        platform_config_pb2,
    )

__all__ = [
    "attr_value_pb2",
    "classification_pb2",
    "config_pb2",
    "example_pb2",
    "feature_pb2",
    "file_system_storage_path_source_pb2",
    "function_pb2",
    "get_model_metadata_pb2",
    "get_model_status_pb2",
    "graph_pb2",
    "inference_pb2",
    "input_pb2",
    "message_class",
    "meta_graph_pb2",
    "model_management_pb2",
    "model_pb2",
    "model_server_config_pb2",
    "model_service_pb2_grpc",
    "node_def_pb2",
    "op_def_pb2",
    "platform_config_pb2",
    "predict_pb2",
    "prediction_log_pb2",
    "prediction_service_pb2_grpc",
    "read_text_proto",
    "regression_pb2",
    "rewriter_config_pb2",
    "saved_model_pb2",
    "saved_object_graph_pb2",
    "saver_pb2",
    "status_pb2",
    "struct_pb2",
    "tensor_bundle_pb2",
    "tensor_pb2",
    "tensor_shape_pb2",
    "tensor_slice_pb2",
    "tensorflow_directory",
    "trackable_object_graph_pb2",
    "types_pb2",
    "versions_pb2",
]
