"""From a version directory to a model that is ready for requests: load, then warm up.

A version becomes available only when this has returned, so its first request finds a graph that is built,
optimised and has run.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from spikeless import mapping, warmup
from spikeless.disk import pages
from spikeless.errors import SpikelessError
from spikeless.formats import session_overrides
from spikeless.formats.protos import config_pb2
from spikeless.runtime import CALLING_THREAD, Session
from spikeless.runtime.model import Model

_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Who wants to know what loading and running take, in seconds: ``spikeless.engine.metrics``."""

    def load_failed(self, path: Path) -> None: ...
    def restored(self, name: str, version: int, path: Path, seconds: float) -> None: ...
    def warmed(self, name: str, version: int, path: Path, seconds: float, records: int) -> None: ...
    def ran(self, name: str, api: str, seconds: float) -> None: ...


@dataclass(frozen=True)
class ModelLoader:
    """How every version is loaded; the fields are TensorFlow Serving's flags of the same meaning."""

    #: The meta graph to load is the one with these tags.
    saved_model_tags: tuple[str, ...] = ("serve",)
    #: Threads for independent operations of one session; 0 lets TensorFlow choose, -1 is the caller's thread,
    #: which saves small models the waking of another one, but which deadlines do not interrupt.
    inter_op_parallelism: int = 0
    #: Threads inside one operation, shared by all sessions; 0 lets TensorFlow choose.
    intra_op_parallelism: int = 0
    enable_model_warmup: bool = True
    num_request_iterations_for_warmup: int = 1
    enable_serialization_as_tensor_content: bool = False
    enable_signature_method_name_check: bool = False
    #: Told of every load and run.
    observer: Observer | None = None
    #: Further settings of every session, as in a platform configuration file.
    session_config: config_pb2.ConfigProto = field(default_factory=config_pb2.ConfigProto)

    def __call__(self, name: str, version: int, path: Path) -> Model:
        """Load and warm up one version.

        Raises:
            SpikelessError: it could not be loaded, or a warmup record failed.
        """
        config = session_overrides.session_config(path, self.session_config)
        if self.inter_op_parallelism:
            config.inter_op_parallelism_threads = self.inter_op_parallelism
        if self.intra_op_parallelism:
            config.intra_op_parallelism_threads = self.intra_op_parallelism
        observer = self.observer
        started = time.monotonic()
        try:
            session = Session.load(path, self.saved_model_tags, config)
        except SpikelessError:
            if observer is not None:
                observer.load_failed(path)
            raise
        model = Model(
            session,
            version,
            tensor_content=self.enable_serialization_as_tensor_content,
            check_method_names=self.enable_signature_method_name_check,
            on_run=None if observer is None else functools.partial(observer.ran, name),
        )
        loaded = time.monotonic()
        if observer is not None:
            observer.restored(name, version, path, loaded - started)
        _log.info("restored %s version %d in %.0f ms", name, version, 1000 * (loaded - started))
        try:
            _expect_look_ups(path)
            records = self._warm(model, path)
        except BaseException:
            model.close()
            raise
        warmed = time.monotonic()
        if self.enable_model_warmup:
            elapsed = 1000 * (warmed - loaded)
            _log.info("warmed %s version %d with %d records in %.0f ms", name, version, records, elapsed)
        if observer is not None:
            observer.warmed(name, version, path, warmed - loaded, records)
        return model

    def _warm(self, model: Model, path: Path) -> int:
        if not self.enable_model_warmup:
            return 0
        # On this thread, as the load: it may have yielded, and the others are the requests'.
        here = dataclasses.replace(model, inter_op_thread_pool=CALLING_THREAD)
        iterations = self.num_request_iterations_for_warmup
        return warmup.replay(here, warmup.warmup_file(path), request_iterations=iterations)


def _expect_look_ups(path: Path) -> None:
    """Prepare the kernel for look-ups in a mapped version's embeddings; only speed depends on it."""
    if not mapping.is_mapped(path):
        return
    try:
        files = mapping.read_manifest(path).files_read_by_row()
        pages.expect_single_pages(path / file for file in files)
    except (SpikelessError, OSError) as error:
        _log.warning("%s: mapped, but the kernel was not told how its files are read: %s", path, error)
