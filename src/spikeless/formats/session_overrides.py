"""``assets.extra/saved_model_config.pb``: what one model asks of its server's sessions.

In and out: the file, a ``tensorflow.serving.SavedModelConfig``, of which one field
matters here: ``session_overrides.disable_meta_optimizer``, for a graph that was
optimised when it was published. The embedded engine reads it. TensorFlow Serving's
published builds ignore it: its public sources do not implement reading the file.

The message is not among those of the ``tensorflow-serving-api`` wheel, so the field is
declared here, numbered as in
``tensorflow_serving/servables/tensorflow/saved_model_config.proto``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from spikeless.disk.atomic import write_atomically
from spikeless.errors import InvalidArgument
from spikeless.formats.protos import config_pb2, message_class
from spikeless.formats.savedmodel import EXTRA_DIRECTORY

FILE_NAME = "saved_model_config.pb"

_SessionOverrides = message_class("SessionOverrides", disable_meta_optimizer=(3, bool))
_SavedModelConfig = message_class("SavedModelConfig", session_overrides=(1, _SessionOverrides))


def path_in(saved_model: str | os.PathLike[str]) -> Path:
    return Path(saved_model) / EXTRA_DIRECTORY / FILE_NAME


def read(saved_model: str | os.PathLike[str]) -> Any:
    """The SavedModel's configuration; an empty one where it has none.

    Raises:
        InvalidArgument: the file is no such message.
    """
    path = path_in(saved_model)
    config = _SavedModelConfig()
    if path.is_file():
        try:
            config.ParseFromString(path.read_bytes())
        except DecodeError:
            raise InvalidArgument(f"{path} is no SavedModelConfig; remove it or write it again") from None
    return config


def session_config(
    saved_model: str | os.PathLike[str], server: config_pb2.ConfigProto | None = None
) -> config_pb2.ConfigProto:
    """The settings of the model's sessions: the server's, and its own overrides."""
    config = config_pb2.ConfigProto()
    if server is not None:
        config.CopyFrom(server)
    overrides = read(saved_model).session_overrides
    if overrides.HasField("disable_meta_optimizer"):
        config.graph_options.rewrite_options.disable_meta_optimizer = overrides.disable_meta_optimizer
    return config


def disable_optimizer(saved_model: str | os.PathLike[str]) -> None:
    """Write into a SavedModel that its graph needs no optimising; the rest stays."""
    config = read(saved_model)
    config.session_overrides.disable_meta_optimizer = True
    path_in(saved_model).parent.mkdir(exist_ok=True)
    write_atomically(path_in(saved_model), config.SerializeToString())
