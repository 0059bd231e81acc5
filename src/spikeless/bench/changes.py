"""What changes versions while a load runs, and when it is called.

In: SavedModels or a command, and the settings of a run. Out: a callable that makes the
next change, and a thread that calls it at its moments.
"""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from spikeless.bench.events import PUBLISH_ALL
from spikeless.bench.run_file import Publish, Settings
from spikeless.bench.servers import from_here
from spikeless.disk.atomic import DIRECTORY_MODE, size_of
from spikeless.errors import FailedPrecondition
from spikeless.repository import layout, publishing
from spikeless.repository.candidate import Candidate
from spikeless.repository.gates import GATES, Gate
from spikeless.repository.journal import Journal, Removed
from spikeless.rollout.prune import free_hidden, hide


@contextmanager
def staged(
    saved_models: Sequence[Path],
    models: Path,
    name: str,
    count: int,
    *,
    gates: Sequence[Gate] = GATES,
    link: bool = False,
) -> Iterator[Callable[[], Path]]:
    """Stage the next `count` versions; gives a callable that publishes the next one.

    Publishing is a rename and a line in the journal, so it takes no time from the load.
    The SavedModels take turns. Give two (or one twice), so that the old and the new
    version share no file; else the new one would find its files in the processor's
    caches. The first version of each SavedModel is checked, with the `gates` and by its
    digests; later ones are hard links to it. With `link` the first ones are hard links
    to the SavedModels, which then must not be changed. Versions that were not published
    are deleted at the end of the block.

    Raises:
        SpikelessError: what `spikeless.repository.publishing.stage` raises.
    """
    with ExitStack() as stack:
        candidates: list[Candidate] = []
        for number in range(count):
            twin = number - len(saved_models)
            candidate = (
                publishing.stage(saved_models[number], models, name, gates=gates, link=link)
                if twin < 0
                else publishing.stage(candidates[twin].path, models, name, gates=(), link=True, digests=False)
            )
            candidates.append(stack.enter_context(candidate))
        waiting = iter(candidates)
        yield lambda: next(waiting).publish()


@contextmanager
def staged_in_turn(
    saved_models: Sequence[Path], models: Path, names: Sequence[str], count: int, *, link: bool = False
) -> Iterator[Callable[[], Path]]:
    """As `staged`, for several models that take turns; `count` is of all of them."""
    with ExitStack() as stack:
        series = [
            stack.enter_context(
                staged(saved_models, models, name, len(range(number, count, len(names))), link=link)
            )
            for number, name in enumerate(names)
        ]
        turns = itertools.cycle(series)
        yield lambda: next(turns)()


@contextmanager
def unloadable(
    saved_models: Sequence[Path], models: Path, name: str, count: int
) -> Iterator[tuple[Sequence[int], Callable[[], Path]]]:
    """Publish `count` versions and one more; gives them, and what removes the next one.

    They are removed from the oldest to the last but one; the newest stays. A removed
    version is out of the server's sight by one rename, and off the disk at the end of
    the block, as are those that were not removed.

    Raises:
        SpikelessError: what `staged` raises.
    """
    with staged(saved_models, models, name, count + 1) as publish:
        versions = [publish() for _ in range(count + 1)]
    waiting = versions[:-1]

    def remove() -> Path:
        version = waiting.pop(0)
        hide(version, layout.state_directory(models, name))
        Journal(models, name).append(Removed(int(version.name), size_of(saved_models[0])))
        return version

    try:
        yield [int(version.name) for version in versions], remove
    finally:
        while waiting:
            remove()
        free_hidden(layout.state_directory(models, name))


@contextmanager
def served_config(models: Path, names: Sequence[str], versions: Sequence[int] = ()) -> Iterator[Path]:
    """What makes a server serve these models; gone at the end of the block.

    Of each model it is the newest version, or all of `versions`.
    """
    listed = " ".join(f"versions: {version}" for version in versions)
    policy = f"model_version_policy {{ specific {{ {listed} }} }} " if versions else ""
    blocks = "\n".join(
        f"  config {{ name: {json.dumps(name)} base_path: {json.dumps(str((models / name).absolute()))} "
        f'model_platform: "tensorflow" {policy}}}'
        for name in names
    )
    with tempfile.TemporaryDirectory(prefix="spikeless-bench-") as directory:
        Path(directory).chmod(DIRECTORY_MODE)
        config = Path(directory) / "models.config"
        config.write_text(f"model_config_list {{\n{blocks}\n}}\n")
        yield config


def publisher(command: str) -> Callable[[], object]:
    """A callable that runs `command`, split as by a shell, and fails when it fails.

    Raises:
        FailedPrecondition: there is no such program.
    """
    arguments = shlex.split(command)
    if not arguments or shutil.which(arguments[0]) is None:
        raise FailedPrecondition(f"`{command}` cannot be run: there is no such program")

    def call() -> str:
        try:
            done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        except OSError as error:
            raise FailedPrecondition(f"`{command}` cannot be run: {error.strerror}") from None
        if done.returncode:
            raise FailedPrecondition(f"`{command}` exited with {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    return call


class ChangeSeries:
    """Calls `publish` in a thread, at each of ``settings.publish_moments``."""

    def __init__(self, settings: Settings, publish: Callable[[], object] | None) -> None:
        self.published: list[Publish] = []
        self._moments = settings.publish_moments
        models = settings.published_models or ("",)
        #: The models of each moment.
        turns = [models] if settings.event == PUBLISH_ALL else [(model,) for model in models]
        self._turns = itertools.cycle(turns)
        self._publish = publish
        self._error: Exception | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, start: float) -> None:
        self._thread = threading.Thread(target=self._call, args=(start,), daemon=True)
        self._thread.start()

    def _call(self, start: float) -> None:
        try:
            for moment, models in zip(self._moments, self._turns, strict=False):
                if self._ended.wait(max(0.0, start + moment - time.monotonic())):
                    return
                for model in models:
                    self._change(start, model)
        except Exception as error:
            self._error = error

    def _change(self, start: float, model: str) -> None:
        assert self._publish is not None
        begin = time.monotonic()
        result = self._publish()
        end = time.monotonic()
        text = "" if result is None else from_here(str(result))
        self.published.append(Publish(begin - start, end - start, text, model))

    def check(self) -> None:
        """Raises FailedPrecondition when publishing has failed."""
        if self._error is not None:
            raise FailedPrecondition(f"publishing failed: {self._error}") from self._error

    def end(self) -> None:
        """Make no more calls, and wait for one in progress."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
