"""Where the configuration comes from: flags, or a file that is looked at again.

In: flags. Out: a ``ModelServerConfig``.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from spikeless.engine.flags import ServerFlags
from spikeless.engine.served_models import ServedModels
from spikeless.errors import InvalidArgument
from spikeless.formats.protos import model_server_config_pb2, read_text_proto

_log = logging.getLogger(__name__)


def read_model_config(path: str | os.PathLike[str]) -> model_server_config_pb2.ModelServerConfig:
    """Read a ``ModelServerConfig`` in text format; raises as `read_text_proto` does."""
    return read_text_proto(path, model_server_config_pb2.ModelServerConfig())


def check_named(flags: ServerFlags) -> None:
    """Raise InvalidArgument where flags do not say what to serve."""
    if not flags.model_config_file and not flags.model_base_path:
        raise InvalidArgument("--model_base_path is needed, or --model_config_file: what should be served?")


def initial(flags: ServerFlags) -> model_server_config_pb2.ModelServerConfig:
    """The configuration of the start; raises as `read_text_proto` does."""
    config = model_server_config_pb2.ModelServerConfig()
    if not flags.model_config_file:
        config.model_config_list.config.add(
            name=flags.model_name,
            base_path=os.path.abspath(flags.model_base_path),
            model_platform="tensorflow",
        )
        return config
    file = Path(flags.model_config_file)
    if not file.exists() and file.parent.is_dir():
        _log.warning("%s is not there yet: no model is served until one is promoted", file)
        return config
    return read_model_config(file)


class ConfigFile:
    """Looks at ``--model_config_file`` again and again, where flags say so."""

    def __init__(
        self,
        flags: ServerFlags,
        core: ServedModels,
        stopping: threading.Event,
        reloaded: Callable[[], None] = lambda: None,
    ) -> None:
        """``reloaded`` is called after each change that is in force."""
        self._path = flags.model_config_file
        self._seconds = flags.model_config_file_poll_wait_seconds
        self._core = core
        self._stopping = stopping
        self._reloaded = reloaded

    def start(self) -> None:
        """Look at it on a thread of its own, until the server stops."""
        if self._path and self._seconds > 0:
            threading.Thread(target=self._watch, name="config", daemon=True).start()

    def _watch(self) -> None:
        complaint = ""
        refused: model_server_config_pb2.ModelServerConfig | None = None
        while not self._stopping.wait(self._seconds):
            config = None
            try:
                config = read_model_config(self._path)
                if config in (self._core.config, refused):
                    continue
                _log.info("%s has changed: reloading", self._path)
                self._core.reload_config(config)
                complaint, refused = "", None
                self._reloaded()
            except Exception as error:
                # Logged once for each cause, not at every poll.
                if str(error) != complaint:
                    _log.error("%s is not in force, the models stay as they are: %s", self._path, error)
                complaint, refused = str(error), config
