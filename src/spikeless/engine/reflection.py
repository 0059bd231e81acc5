"""gRPC server reflection: clients ask the server itself what its services are.

In: a gRPC server. Out: the same with the reflection service (v1alpha), which
TensorFlow Serving has as well. It is for a process that is a server: the files of all
services go into the process's one pool of descriptors.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from spikeless.formats import open_inference_messages

_SERVICES = {"model_service": "ModelService", "prediction_service": "PredictionService"}


def enable(server: grpc.Server) -> None:
    """Add the service to a server that has not started."""
    for module in _SERVICES:
        descriptor_pool.Default().AddSerializedFile(_descriptor(module))
    descriptor_pool.Default().AddSerializedFile(open_inference_messages.FILE)
    services = [f"tensorflow.serving.{service}" for service in _SERVICES.values()]
    services += [open_inference_messages.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME]
    reflection.enable_server_reflection(services, server)


def _descriptor(module: str) -> bytes:
    """The serialized file descriptor in a generated module that is not imported.

    The modules of TensorFlow Serving 2.20 cannot be: see `spikeless.formats.protos`.
    """
    package = importlib.util.find_spec("tensorflow_serving.apis")
    assert package is not None
    assert package.submodule_search_locations
    source = (Path(package.submodule_search_locations[0]) / f"{module}_pb2.py").read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "AddSerializedFile":
            content = ast.literal_eval(node.args[0])
            assert isinstance(content, bytes)
            return content
        # As generated for 2.20: serialized_pb=_b("..."), bytes as text.
        if isinstance(node, ast.keyword) and node.arg == "serialized_pb" and isinstance(node.value, ast.Call):
            text = ast.literal_eval(node.value.args[0])
            assert isinstance(text, str)
            return text.encode("latin-1")
    raise AssertionError(f"tensorflow_serving.apis.{module}_pb2 has no file descriptor")
