"""From a version directory to a model that is ready for requests: load, then warm up.

A version becomes available only when this has returned, so its first request finds a
graph that is built, optimised and has run.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from pathlib import Path
from typing import Protocol

from spikeless import mapping, warmup
from spikeless.disk import pages
from spikeless.engine import batching
from spikeless.engine.flags import DEFAULTS, ServerFlags
from spikeless.errors import SpikelessError
from spikeless.formats import session_overrides
from spikeless.formats.protos import config_pb2, read_text_proto
from spikeless.formats.variables import check_variables
from spikeless.runtime import CALLING_THREAD, Session
from spikeless.runtime.model import Model, Runner

_log = logging.getLogger(__name__)


class Observer(batching.BatchObserver, Protocol):
    """Told how long loads and runs take, and of batches: `spikeless.engine.metrics`."""

    def load_failed(self, path: Path) -> None: ...
    def restored(self, name: str, version: int, path: Path, seconds: float) -> None: ...
    def warmed(self, name: str, version: int, path: Path, seconds: float, records: int) -> None: ...
    def ran(self, name: str, api: str, seconds: float) -> None: ...


class ModelLoader:
    """Loads every version as the flags say; an observer is told of every load and run.

    Raises:
        SpikelessError: ``--tensorflow_session_config_file`` or
            ``--batching_parameters_file`` cannot be used.
    """

    def __init__(self, flags: ServerFlags = DEFAULTS, observer: Observer | None = None) -> None:
        self._flags = flags
        self._observer = observer
        self._tags = tuple(filter(None, flags.saved_model_tags.split(",")))
        self._session_config = config_pb2.ConfigProto()
        if flags.tensorflow_session_config_file:
            read_text_proto(flags.tensorflow_session_config_file, self._session_config)
        self._batching = batching.Batching(flags, observer) if flags.enable_batching else None
        both = flags.tensorflow_session_parallelism
        if threads := flags.tensorflow_inter_op_parallelism or both:
            self._session_config.inter_op_parallelism_threads = threads
        if threads := flags.tensorflow_intra_op_parallelism or both:
            self._session_config.intra_op_parallelism_threads = threads

    def __call__(self, name: str, version: int, path: Path) -> Model:
        """Load and warm up one version.

        Raises:
            SpikelessError: it could not be loaded, or a warmup record failed.
        """
        config = session_overrides.session_config(path, self._session_config)
        observer = self._observer
        started = time.monotonic()
        try:
            session = self._load(path, config)
        except SpikelessError:
            if observer is not None:
                observer.load_failed(path)
            raise
        model = Model(
            session,
            version,
            tensor_content=self._flags.enable_serialization_as_tensor_content,
            check_method_names=self._flags.enable_signature_method_name_check,
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
        if self._flags.enable_model_warmup:
            elapsed = 1000 * (warmed - loaded)
            _log.info("warmed %s version %d with %d records in %.0f ms", name, version, records, elapsed)
        if observer is not None:
            observer.warmed(name, version, path, warmed - loaded, records)
        return model

    def _load(self, path: Path, config: config_pb2.ConfigProto) -> Runner:
        session = Session.load(path, self._tags, config)
        try:
            # Without its variables a model loads, and every request fails.
            check_variables(path, self._tags)
            return session if self._batching is None else self._batching.wrap(session, path)
        except BaseException:
            session.close()
            raise

    def _warm(self, model: Model, path: Path) -> int:
        if not self._flags.enable_model_warmup:
            return 0
        # On this thread, like the load, or on its own: the others are the requests'.
        here = dataclasses.replace(
            model, session=batching.warming(model.session), inter_op_thread_pool=CALLING_THREAD
        )
        return warmup.replay(
            here,
            warmup.warmup_file(path),
            request_iterations=self._flags.num_request_iterations_for_warmup,
            threads=self._flags.num_model_warmup_threads,
        )


def _expect_look_ups(path: Path) -> None:
    """Tell the kernel that a mapped version's embeddings are read row by row."""
    if not mapping.is_mapped(path):
        return
    try:
        files = mapping.read_manifest(path).files_read_by_row()
        pages.expect_single_pages(path / file for file in files)
    except (SpikelessError, OSError) as error:
        _log.warning("%s: mapped, but the kernel was not told how its files are read: %s", path, error)
