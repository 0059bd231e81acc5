"""The messages of TensorFlow and TensorFlow Serving, without importing TensorFlow.

The generated modules live inside the ``tensorflow`` package, so a plain import of one
of them runs ``tensorflow/__init__.py``: seconds of time, half a gigabyte of memory and
a garbage collection of about 100 ms that looks like a reload spike. Here a bare
package of that name stands in while the messages are imported (tens of milliseconds)
and is taken away afterwards, so that a later ``import tensorflow`` gets the real one
and shares the message classes.

Modules of this package import messages from here only, hence each ``as``.
(``model_service_pb2`` and ``prediction_service_pb2`` hold nothing but service
descriptors and are left out: current protobuf cannot import those of TensorFlow
Serving 2.20.)
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import Message

from spikeless.errors import InvalidArgument, NotFound

_M = TypeVar("_M", bound=Message)
_Field = descriptor_pb2.FieldDescriptorProto
_FIELD_TYPES = {bool: _Field.TYPE_BOOL, int: _Field.TYPE_INT64, str: _Field.TYPE_STRING}
_declared = descriptor_pool.DescriptorPool()


def message_class(name: str, **fields: tuple[int, Any]) -> type[Any]:
    """A message that the Python packages of TensorFlow Serving leave out.

    Args:
        name: of the message.
        fields: the number and the type of each optional field: ``bool``, ``int`` (64
            bits), ``str`` or another class that this function made; ``list[...]`` of
            one is a repeated field.
    """
    file = descriptor_pb2.FileDescriptorProto(name=f"spikeless/{name}.proto", package="spikeless")
    message = file.message_type.add(name=name)
    for field, (number, kind) in fields.items():
        added = message.field.add(name=field, number=number, label=_Field.LABEL_OPTIONAL)
        if typing.get_origin(kind) is list:
            added.label = _Field.LABEL_REPEATED
            (kind,) = typing.get_args(kind)
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
        # Both as TensorFlow Serving says it.
        what = f"Error parsing text-format {message.DESCRIPTOR.full_name}: {error}"
        raise InvalidArgument(f"Invalid protobuf file: '{os.fspath(file)}': {what}") from None
    return message


def tensorflow_directory() -> Path:
    """The folder of the installed ``tensorflow`` wheel, found without importing it."""
    spec = importlib.util.find_spec("tensorflow")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("tensorflow is not installed: run `pip install spikeless`")
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
    from tensorflow.core.example import example_pb2 as example_pb2
    from tensorflow.core.example import feature_pb2 as feature_pb2
    from tensorflow.core.framework import attr_value_pb2 as attr_value_pb2
    from tensorflow.core.framework import function_pb2 as function_pb2
    from tensorflow.core.framework import graph_pb2 as graph_pb2
    from tensorflow.core.framework import node_def_pb2 as node_def_pb2
    from tensorflow.core.framework import op_def_pb2 as op_def_pb2
    from tensorflow.core.framework import tensor_pb2 as tensor_pb2
    from tensorflow.core.framework import tensor_shape_pb2 as tensor_shape_pb2
    from tensorflow.core.framework import tensor_slice_pb2 as tensor_slice_pb2
    from tensorflow.core.framework import types_pb2 as types_pb2
    from tensorflow.core.protobuf import config_pb2 as config_pb2
    from tensorflow.core.protobuf import meta_graph_pb2 as meta_graph_pb2
    from tensorflow.core.protobuf import saved_model_pb2 as saved_model_pb2
    from tensorflow.core.protobuf import tensor_bundle_pb2 as tensor_bundle_pb2
    from tensorflow_serving.apis import classification_pb2 as classification_pb2
    from tensorflow_serving.apis import get_model_metadata_pb2 as get_model_metadata_pb2
    from tensorflow_serving.apis import get_model_status_pb2 as get_model_status_pb2
    from tensorflow_serving.apis import inference_pb2 as inference_pb2
    from tensorflow_serving.apis import input_pb2 as input_pb2
    from tensorflow_serving.apis import model_management_pb2 as model_management_pb2
    from tensorflow_serving.apis import model_pb2 as model_pb2
    from tensorflow_serving.apis import model_service_pb2_grpc as model_service_pb2_grpc
    from tensorflow_serving.apis import predict_pb2 as predict_pb2
    from tensorflow_serving.apis import prediction_log_pb2 as prediction_log_pb2
    from tensorflow_serving.apis import prediction_service_pb2_grpc as prediction_service_pb2_grpc
    from tensorflow_serving.apis import regression_pb2 as regression_pb2
    from tensorflow_serving.config import model_server_config_pb2 as model_server_config_pb2
