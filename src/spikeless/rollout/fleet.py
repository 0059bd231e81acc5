"""A fleet: the servers of one repository, reloaded with one configuration.

In: what ``models.config`` should say about some models. Out: servers that serve just
that, reloaded one after the other or a few at a time, or an error that says where each
server stands.

First a server accepts the configuration; then its states, labels and answers are polled
until they are what is wanted. A server that does not answer for a moment may be
restarting and is waited for: it reads the same ``models.config``.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from spikeless.client import Client, RemoteError
from spikeless.errors import (
    Cancelled,
    Code,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    SpikelessError,
    Unavailable,
)
from spikeless.formats.protos import model_server_config_pb2
from spikeless.formats.states import State, VersionStatus
from spikeless.repository import layout, models_config
from spikeless.repository.models_config import Blocks, model_in

Progress = Callable[[str], None]

_POLL_SECONDS = 0.03
#: Seconds until a server has begun what it has accepted; until then, a failure from
#: before is just that.
_BEGIN_SECONDS = 3.0
#: Seconds until a server has taken out of service what it no longer should serve.
_SETTLE_SECONDS = 30.0
_CALL_SECONDS = 5.0
#: Seconds of loading after which the reason may be that loads fail and are repeated.
_HINT_SECONDS = 60.0
_RETRIES_HINT = (
    "a server that repeats failed loads does not say that they fail: start it with "
    "--max_num_load_retries=0, and it says so at once"
)
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class FleetSettings:
    """Which servers there are, and how gently they are treated."""

    #: ``[grpcs://]host:port`` of each server's gRPC port, in the order in which they
    #: are changed.
    targets: Sequence[str]
    #: Seconds between two servers that begin to load; up to half of it is added at
    #: random, so that hosts which share a disk do not read it at the same moment.
    stagger: float = 0.0
    #: Servers that load at the same time.
    at_most: int = 1
    #: Seconds that one server may take to load a version.
    load_timeout: float = 600.0
    #: Seconds for which a server may be silent before it counts as gone.
    patience: float = 15.0

    def __post_init__(self) -> None:
        if not self.targets:
            raise InvalidArgument("no server is named: give --servers HOST:PORT[,HOST:PORT...], or a file")
        if len(set(self.targets)) < len(self.targets):
            raise InvalidArgument(f"a server is named twice: {', '.join(self.targets)}")
        if self.at_most < 1 or self.stagger < 0:
            raise InvalidArgument("--at-most must be 1 or more, --stagger 0 or more")


def parse_targets(text: str) -> tuple[str, ...]:
    """``a:8500,b:8500``, or a file with one server a line and ``#`` comments."""
    if Path(text).is_file():
        lines = Path(text).read_text().splitlines()
        parts = [line.partition("#")[0].strip() for line in lines]
    else:
        parts = [part.strip() for part in text.split(",")]
    targets = tuple(part for part in parts if part)
    for target in targets:
        if not _is_target(target):
            raise InvalidArgument(f"{target!r} is neither [grpcs://]HOST:PORT nor a file of them")
    return targets


def parse_target(text: str) -> str:
    """One server, ``a:8500``."""
    if not _is_target(text):
        raise InvalidArgument(f"{text!r} is not [grpcs://]HOST:PORT, such as 127.0.0.1:8500")
    return text


def _is_target(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and int(port) < 65536


@dataclass(frozen=True)
class Wanted:
    """What a server should serve."""

    #: Model -> the versions that are available.
    versions: Mapping[str, Collection[int]] = field(default_factory=dict)
    #: Model -> label -> version.
    labels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def wanted(blocks: Blocks) -> Wanted:
    """What the texts of models in ``models.config`` ask for.

    A model without specific versions asks for nothing.
    """
    versions, labels = {}, {}
    for name, block in blocks.items():
        model = model_in(block) if block is not None else None
        if model is not None and model.model_version_policy.HasField("specific"):
            versions[name] = tuple(model.model_version_policy.specific.versions)
            labels[name] = dict(model.version_labels)
    return Wanted(versions, labels)


class FleetError(SpikelessError):
    """A server did not do what it should; ``report`` has a line for each."""

    def __init__(self, target: str, cause: SpikelessError, report: Mapping[str, str]) -> None:
        lines = [f"{target}: {cause}"]
        if len(report) > 1:
            lines += [f"  {server}: {state}" for server, state in report.items()]
        super().__init__("\n".join(lines))
        self.report = report
        self.code = cause.code


class Fleet:
    """Connections to all servers; a context manager that closes them."""

    def __init__(
        self,
        models: str | os.PathLike[str],
        settings: FleetSettings,
        progress: Progress = lambda line: None,
        interrupted: threading.Event | None = None,
    ) -> None:
        self.models = Path(models)
        self.settings = settings
        #: Called with each line of progress.
        self.progress = progress
        #: Set to end a change early.
        self.interrupted = interrupted or threading.Event()
        timeout = min(_CALL_SECONDS, settings.patience)
        self.clients = {target: Client(target, timeout) for target in settings.targets}

    def close(self) -> None:
        for client in self.clients.values():
            client.close()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def statuses(self, name: str) -> dict[str, list[VersionStatus]]:
        """The states of a model's versions on each server; none where it is unknown.

        Raises:
            Unavailable: a server does not answer.
        """
        return {target: states(client, name) for target, client in self.clients.items()}

    def apply(self, blocks: Blocks, *, staggered: bool = False, keep_going: bool = False) -> None:
        """Make every server serve what ``models.config`` says, with ``blocks`` in it.

        Args:
            blocks: models that have changed.
            staggered: begin with servers one after the other, as the settings say.
            keep_going: continue with the other servers after a failure.

        Raises:
            FleetError: a server failed; those after it were left alone, unless
                ``keep_going``.
        """
        report = dict.fromkeys(self.clients, "left alone")
        failures: dict[str, SpikelessError] = {}
        stop = threading.Event()

        def work(target: str) -> None:
            if stop.is_set():
                return
            started = time.monotonic()
            try:
                _Reload(self, self.clients[target], blocks).run()
                report[target] = f"done in {time.monotonic() - started:.1f} s"
                self.report(target, report[target])
            except SpikelessError as error:
                report[target] = f"failed: {error}"
                failures[target] = error
                if not keep_going:
                    stop.set()

        with ThreadPoolExecutor(self.settings.at_most if staggered else len(self.clients)) as pool:
            pending = []
            for number, target in enumerate(self.clients):
                if number and staggered and self.settings.stagger:
                    self._await_turn(target, stop)
                pending.append(pool.submit(work, target))
            for future in pending:
                future.result()
        for target in self.clients:
            if target in failures:
                raise FleetError(target, failures[target], report)

    def _await_turn(self, target: str, stop: threading.Event) -> None:
        pause = self.settings.stagger * random.uniform(1.0, 1.5)
        self.report(target, f"waits {pause:.1f} s for its turn")
        until = time.monotonic() + pause
        while time.monotonic() < until and not stop.wait(min(_POLL_SECONDS, pause)):
            if self.interrupted.is_set():
                stop.set()

    def report(self, target: str, text: str) -> None:
        """Report progress on one server."""
        self.progress(f"{target}: {text}")

    def check_interrupted(self) -> None:
        """Raise Cancelled when ``interrupted`` is set."""
        if self.interrupted.is_set():
            raise Cancelled("interrupted")


def states(client: Client, name: str) -> list[VersionStatus]:
    """The states of a model's versions; none when the server does not know it."""
    try:
        return client.statuses(name)
    except SpikelessError as error:
        if error.code is Code.NOT_FOUND:
            return []
        raise


#: What a server answers with, or gRPC for it, when it is restarting, hangs or has too
#: much to do.
_PASSING = (Code.UNAVAILABLE, Code.CANCELLED, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED)


class _Silent(SpikelessError):
    """A server did not answer just now."""

    code = Code.UNAVAILABLE


class _StillUnloading(SpikelessError):
    """A server has mixed up a version with an earlier one of the same name."""

    def __init__(self, answer: SpikelessError) -> None:
        super().__init__(str(answer))
        self.answer = answer


class _Reload:
    """One server on its way to what is wanted."""

    def __init__(self, fleet: Fleet, client: Client, blocks: Blocks) -> None:
        self._fleet = fleet
        self._client = client
        self._blocks = blocks
        self._wanted = wanted(blocks)
        self._heard = time.monotonic()
        self._deadline = self._heard + fleet.settings.load_timeout
        self._reported: dict[tuple[str, int], State] = {}
        # Models with versions on their way that are not wanted, and how long to wait.
        self._others: set[str] = set()
        self._others_until: float | None = None
        # Failures from before, which the server forgets when it begins anew.
        self._old: dict[tuple[str, int], str] = {}
        # What was said of what the server cannot have.
        self._said: set[str] = set()

    def run(self) -> None:
        """Send the configuration, and poll the server until it is in force.

        Raises:
            SpikelessError: it was refused, a version cannot be loaded, the server is
                gone or too slow.
        """
        self._fleet.report(self._client.target, "reloading")
        self._note_old_states()
        began, waiting = time.monotonic(), False
        while True:
            try:
                self._send()
                self._follow()
                return
            except _StillUnloading as refusal:
                self._check_time()
                if time.monotonic() - began > _SETTLE_SECONDS:
                    raise refusal.answer from None
                self._pause()
            except _Silent as silence:
                # It may be restarting, and have lost the configuration: it is sent
                # again.
                if self._silent_for() > self._fleet.settings.patience:
                    raise Unavailable(
                        f"the server has not answered for {self._fleet.settings.patience:g} s: {silence}"
                    ) from None
                if not waiting:
                    self._fleet.report(self._client.target, "does not answer, is it being restarted?")
                waiting = True
                self._pause()

    def _note_old_states(self) -> None:
        with suppress(SpikelessError):
            for name in self._wanted.versions:
                for status in states(self._client, name):
                    self._reported[name, status.version] = status.state
                    if status.state is State.END:
                        self._old[name, status.version] = str(status.error)

    def _send(self) -> None:
        """Send the newest content of the file, locked until the server has answered."""
        with models_config.sending(self._fleet.models) as config:
            for name, block in self._blocks.items():
                config = config.with_block(name, block)
            message = self._what_can_be_had(config.message)
            left = max(self._deadline - time.monotonic(), _CALL_SECONDS)
            answered = self._client.start_reload(message, left)
            patient_until = time.monotonic() + _CALL_SECONDS
            while not self._has_answered(answered):
                self._check_time()
                # A model that is new to the server is loaded before the answer comes.
                try:
                    self._ask(self._loaded)
                except _Silent:
                    if self._silent_for() > self._fleet.settings.patience:
                        raise
                if time.monotonic() > patient_until:
                    patient_until = self._deadline
                    self._fleet.report(self._client.target, "has not taken the configuration yet")
        self._heard = time.monotonic()

    def _what_can_be_had(
        self, config: model_server_config_pb2.ModelServerConfig
    ) -> model_server_config_pb2.ModelServerConfig:
        """The configuration without what would make this server refuse all of it.

        That is labels of versions that it has not, since it started with less, and
        models without any version, for which TensorFlow Serving waits. Its states go on
        saying what is missing.
        """
        adapted = model_server_config_pb2.ModelServerConfig()
        for model in config.model_config_list.config:
            known = {
                status.version: status.state
                for status in self._ask(partial(states, self._client, model.name))
            }
            if not known and model.name not in self._blocks and not self._on_disk(model.name):
                self._report_once(f"{model.name} is left out: it has no version")
                continue
            sent = adapted.model_config_list.config.add()
            sent.CopyFrom(model)
            for label, version in model.version_labels.items():
                if known.get(version, State.END) is State.END:
                    self._leave_label(sent, label, version)
        return adapted

    def _on_disk(self, name: str) -> bool:
        return bool(layout.versions(self._fleet.models, name))

    def _leave_label(self, model: model_server_config_pb2.ModelConfig, label: str, version: int) -> None:
        """Let a label stay where the server has it, if it has it."""
        try:
            now = self._ask(partial(self._client.version_of, model.name, label))
        except RemoteError:
            del model.version_labels[label]
            where = "is left out"
        else:
            model.version_labels[label] = now
            where = f"stays on version {now}"
        self._report_once(f"label {label} of {model.name} {where}: version {version} is not available")

    def _report_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._fleet.report(self._client.target, text)

    def _has_answered(self, answered: Callable[[float | None], bool]) -> bool:
        try:
            return answered(_POLL_SECONDS)
        except SpikelessError as error:
            if error.code in _PASSING:
                raise _Silent(str(error)) from None
            # The states may know better than the answer why a version cannot be loaded.
            self._ask(self._loaded)
            # A server that still unloads a version of the name, such as an earlier
            # canary, takes that one's end for a failure.
            if "did not become available" in str(error):
                raise _StillUnloading(error) from None
            raise

    def _follow(self) -> None:
        """Wait until every version is available, then until labels are in force."""
        began = time.monotonic()
        hint_at = began + _HINT_SECONDS
        while not self._ask(self._loaded):
            self._check_time()
            self._pause()
            if time.monotonic() > hint_at:
                hint_at = self._deadline
                self._fleet.report(self._client.target, f"still loading; {_RETRIES_HINT}")
            if time.monotonic() - began > _BEGIN_SECONDS:
                self._old.clear()
        loaded = time.monotonic()
        while problem := self._ask(self._not_in_force):
            self._check_time()
            self._pause()
            if time.monotonic() - loaded > _SETTLE_SECONDS:
                raise FailedPrecondition(
                    f"{problem}; does the server read another --model_config_file over and over?"
                )

    def _ask(self, question: Callable[[], _Answer]) -> _Answer:
        try:
            answer = question()
        except RemoteError as error:
            if error.code in _PASSING:
                raise _Silent(str(error)) from None
            raise
        except Unavailable as error:
            raise _Silent(str(error)) from None
        self._heard = time.monotonic()
        return answer

    def _loaded(self) -> bool:
        """Whether every wanted version is available, and no other one is on its way.

        Reports each change of state.
        """
        if not all([self._all_available(name) for name in self._wanted.versions]):
            return False
        now = time.monotonic()
        self._others_until = self._others_until or now + _SETTLE_SECONDS
        return not self._others or now > self._others_until

    def _all_available(self, name: str) -> bool:
        missing = set(self._wanted.versions[name])
        self._others.discard(name)
        for status in states(self._client, name):
            key = (name, status.version)
            if status.version not in missing:
                # A server that polls the file system may have begun it just before: it
                # becomes available, too, and takes requests until it is unloaded.
                if status.state in (State.START, State.LOADING):
                    self._others.add(name)
                continue
            if status.state is not State.END:
                self._old.pop(key, None)
            if self._reported.get(key) is not status.state:
                self._reported[key] = status.state
                self._fleet.report(
                    self._client.target, f"{name} version {status.version}: {status.state.name}"
                )
            if status.state is State.AVAILABLE:
                missing.remove(status.version)
            elif status.state is State.END and status.error and self._old.get(key) != str(status.error):
                raise FailedPrecondition(f"{name} version {status.version} cannot be loaded: {status.error}")
        return not missing

    def _not_in_force(self) -> str:
        """What is served otherwise than wanted; empty if nothing is."""
        for name, numbers in self._wanted.versions.items():
            for status in states(self._client, name):
                if status.state is State.AVAILABLE and status.version not in numbers:
                    return f"version {status.version} of {name} is still served"
            asked = {"": max(numbers), **self._wanted.labels[name]}
            for label, version in asked.items():
                found = self._client.version_of(name, label)
                if found != version:
                    what = f"label {label}" if label else "a request without a label"
                    return f"{what} of {name} gets version {found} instead of {version}"
        return ""

    def _silent_for(self) -> float:
        return time.monotonic() - self._heard

    def _check_time(self) -> None:
        self._fleet.check_interrupted()
        if time.monotonic() > self._deadline:
            known = ", ".join(
                f"{name} {number}: {state.name}" for (name, number), state in self._reported.items()
            )
            raise DeadlineExceeded(
                f"not done after {self._fleet.settings.load_timeout:g} s ({known or 'no state is known'}); "
                f"the server's log may say why, --load-timeout gives it longer; {_RETRIES_HINT}"
            )

    def _pause(self) -> None:
        self._fleet.interrupted.wait(_POLL_SECONDS)
