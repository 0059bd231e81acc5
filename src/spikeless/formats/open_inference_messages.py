"""The messages of the Open Inference Protocol (V2), which no package of ours brings.

Out: the message classes of ``inference.GRPCInferenceService``, made from the tables
below, which have the names and numbers of the published protocol
(``open_inference_grpc.proto``). They live in a pool of their own, so that a client of
the protocol with generated modules may be loaded in the same process.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "inference"
SERVICE = f"{_PACKAGE}.GRPCInferenceService"
#: Its methods: each takes a message ``<method>Request`` and answers with
#: ``<method>Response``.
METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _Field.TYPE_BOOL,
    "bytes": _Field.TYPE_BYTES,
    "double": _Field.TYPE_DOUBLE,
    "float": _Field.TYPE_FLOAT,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
}
_PARAMETERS = "map<string, InferParameter>"
#: Message -> field -> type and number. A message inside another has a dotted name.
_MESSAGES: dict[str, dict[str, tuple[str, int]]] = {
    "InferParameter": {
        "bool_param": ("bool", 1),
        "int64_param": ("int64", 2),
        "string_param": ("string", 3),
        "double_param": ("double", 4),
        "uint64_param": ("uint64", 5),
    },
    "InferTensorContents": {
        "bool_contents": ("repeated bool", 1),
        "int_contents": ("repeated int32", 2),
        "int64_contents": ("repeated int64", 3),
        "uint_contents": ("repeated uint32", 4),
        "uint64_contents": ("repeated uint64", 5),
        "fp32_contents": ("repeated float", 6),
        "fp64_contents": ("repeated double", 7),
        "bytes_contents": ("repeated bytes", 8),
    },
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": ("bool", 1)},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": ("bool", 1)},
    "ModelReadyRequest": {"name": ("string", 1), "version": ("string", 2)},
    "ModelReadyResponse": {"ready": ("bool", 1)},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": {
        "name": ("string", 1),
        "version": ("string", 2),
        "extensions": ("repeated string", 3),
    },
    "ModelMetadataRequest": {"name": ("string", 1), "version": ("string", 2)},
    "ModelMetadataResponse": {
        "name": ("string", 1),
        "versions": ("repeated string", 2),
        "platform": ("string", 3),
        "inputs": ("repeated ModelMetadataResponse.TensorMetadata", 4),
        "outputs": ("repeated ModelMetadataResponse.TensorMetadata", 5),
    },
    "ModelMetadataResponse.TensorMetadata": {
        "name": ("string", 1),
        "datatype": ("string", 2),
        "shape": ("repeated int64", 3),
    },
    "ModelInferRequest": {
        "model_name": ("string", 1),
        "model_version": ("string", 2),
        "id": ("string", 3),
        "parameters": (_PARAMETERS, 4),
        "inputs": ("repeated ModelInferRequest.InferInputTensor", 5),
        "outputs": ("repeated ModelInferRequest.InferRequestedOutputTensor", 6),
        "raw_input_contents": ("repeated bytes", 7),
    },
    "ModelInferRequest.InferInputTensor": {
        "name": ("string", 1),
        "datatype": ("string", 2),
        "shape": ("repeated int64", 3),
        "parameters": (_PARAMETERS, 4),
        "contents": ("InferTensorContents", 5),
    },
    "ModelInferRequest.InferRequestedOutputTensor": {"name": ("string", 1), "parameters": (_PARAMETERS, 2)},
    "ModelInferResponse": {
        "model_name": ("string", 1),
        "model_version": ("string", 2),
        "id": ("string", 3),
        "parameters": (_PARAMETERS, 4),
        "outputs": ("repeated ModelInferResponse.InferOutputTensor", 5),
        "raw_output_contents": ("repeated bytes", 6),
    },
    "ModelInferResponse.InferOutputTensor": {
        "name": ("string", 1),
        "datatype": ("string", 2),
        "shape": ("repeated int64", 3),
        "parameters": (_PARAMETERS, 4),
        "contents": ("InferTensorContents", 5),
    },
}
#: Messages of which one field is set at most, by the name of the choice.
_CHOICES = {"InferParameter": "parameter_choice"}


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="open_inference_grpc.proto", package=_PACKAGE, syntax="proto3"
    )
    made: dict[str, descriptor_pb2.DescriptorProto] = {}
    for name, fields in _MESSAGES.items():
        outer, _, own = name.rpartition(".")
        message = made[outer].nested_type.add(name=own) if outer else file.message_type.add(name=own)
        made[name] = message
        if name in _CHOICES:
            message.oneof_decl.add(name=_CHOICES[name])
        for field, (kind, number) in fields.items():
            if kind == _PARAMETERS:
                entry = message.nested_type.add(name="ParametersEntry")
                entry.options.map_entry = True
                _add_field(entry, "key", "string", 1)
                _add_field(entry, "value", "InferParameter", 2)
                kind = f"repeated {name}.ParametersEntry"
            added = _add_field(message, field, kind, number)
            if name in _CHOICES:
                added.oneof_index = 0
    service = file.service.add(name=SERVICE.removeprefix(f"{_PACKAGE}."))
    for method in METHODS:
        service.method.add(
            name=method,
            input_type=f".{_PACKAGE}.{method}Request",
            output_type=f".{_PACKAGE}.{method}Response",
        )
    return file


def _add_field(message: descriptor_pb2.DescriptorProto, name: str, kind: str, number: int) -> Any:
    repeated, _, kind = kind.rpartition(" ")
    label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
    field = message.field.add(name=name, number=number, label=label)
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
    return field


#: The declaration as a serialized ``FileDescriptorProto``, for reflection.
FILE = _file().SerializeToString()
_pool = descriptor_pool.DescriptorPool()
_pool.AddSerializedFile(FILE)


def message_class(name: str) -> type[Any]:
    """The class of a message, such as ``ModelInferRequest``."""
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
