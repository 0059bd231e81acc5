"""Faults at random while load runs; at the end everything that was promoted is served.

In: a seed and a time. Out: what happened, or an AssertionError. The server runs as the
image starts it (`entrypoint`), on whichever engine is tested, and is started again when
it ends, as a container is. Each row of `FAULTS` does something that may happen on a
Tuesday, waits until it is over, and names what the log has to say about it.

    python tests/support/chaos.py --seconds 600 [--seed N]

Callers never stop. Their calls may fail only while a fault has taken the server away,
and are never answered wrongly.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from entrypoint import Container, container
from harness import ENGINE, put_version
from promotion_models import X, settings

from spikeless.client import Client
from spikeless.errors import SpikelessError
from spikeless.formats.states import State, VersionStatus
from spikeless.repository import layout, models_config, publishing
from spikeless.repository.journal import Journal
from spikeless.repository.models_config import new_block, with_versions
from spikeless.rollout import plans
from spikeless.rollout.fleet import FleetSettings
from spikeless.rollout.promotion import promote, rollback
from spikeless.rollout.status import status

#: Pinned and never touched; pinned, promoted and rolled back; the newest version.
STEADY, CHANGING, LOOSE = "steady", "changing", "loose"
#: Seconds that anything may take; machines are slow at times.
PATIENCE = 120.0


def factor(version: int) -> int:
    """What answers of a version are multiplied by."""
    return (version - 1) % 3 + 1


class Callers:
    """Calls every model without a pause, and notes what failed and when."""

    def __init__(self, target: str) -> None:
        self.calls: Counter[str] = Counter()
        #: When the failed call began and ended, and what it was.
        self.failures: list[tuple[float, float, str]] = []
        self.wrong: list[str] = []
        #: Seconds that the slowest answer took.
        self.slowest = 0.0
        self._target = target
        self._ended = threading.Event()
        names = {STEADY: "stable", CHANGING: "stable", LOOSE: ""}
        self._threads = [threading.Thread(target=self._call, args=pair) for pair in names.items()]

    def _call(self, name: str, label: str) -> None:
        # Slow is no failure: a call ends when it is answered, or when its server does.
        with Client(self._target, timeout=PATIENCE) as client:
            while not self._ended.wait(0.01):
                began = time.monotonic()
                try:
                    answer = client.predict(name, {"x": X}, label=label)["y"]
                except SpikelessError as error:
                    self.failures.append((began, time.monotonic(), f"{name}: {error}"))
                    continue
                self.calls[name] += 1
                self.slowest = max(self.slowest, time.monotonic() - began)
                expected = {1} if name == STEADY else {1, 2, 3}
                if not any(np.array_equal(answer, X * one) for one in expected):
                    self.wrong.append(f"{name}: {answer}")

    @contextmanager
    def running(self) -> Iterator[Callers]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            for thread in self._threads:
                thread.join()


@dataclass
class Chaos:
    """A repository, its server, and what was said of both."""

    models: Path
    scales: Path
    server: Container
    #: Progress and errors of promotions.
    said: list[str] = field(default_factory=list)
    #: When the server was away.
    away: list[tuple[float, float]] = field(default_factory=list)
    restarts: int = 0
    _stopping: bool = False

    # What a fault needs ---------------------------------------------------------------

    @property
    def fleet(self) -> FleetSettings:
        return FleetSettings([self.server.target], patience=60.0, load_timeout=PATIENCE)

    def say(self, text: object) -> None:
        self.said.append(str(text))

    def mark(self) -> tuple[int, int]:
        """How much there is of both by now."""
        return self.server.log.stat().st_size, len(self.said)

    def text(self, since: tuple[int, int] = (0, 0)) -> str:
        """The server's log, and what was said, from a mark on."""
        log = self.server.log.read_bytes()[since[0] :].decode(errors="replace")
        return log + "\n".join(self.said[since[1] :])

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            with suppress(SpikelessError, OSError):
                if condition():
                    return
            assert time.monotonic() < deadline, f"waited for {what}; the log ends:\n{self.text()[-6000:]}"
            time.sleep(0.1)

    def next(self, name: str) -> int:
        """The number of a new version; numbers are not used again."""
        known = [*layout.versions(self.models, name), *(one.version for one in self.server_states(name))]
        return max(known) + 1

    def server_states(self, name: str) -> list[VersionStatus]:
        try:
            return list(self.server.client.statuses(name))
        except SpikelessError:
            return []

    def state(self, name: str, version: int) -> State | None:
        return next((one.state for one in self.server_states(name) if one.version == version), None)

    def put(self, name: str, version: int) -> Path:
        """A whole version."""
        return put_version(self.scales / str(factor(version)), self.models / name, version)

    def stable(self, name: str) -> int:
        model = models_config.read(self.models).model(name)
        assert model is not None
        return int(model.version_labels["stable"])

    def serves_what_was_promoted(self) -> bool:
        """Whether labels are where models.config has them, and callers get them."""
        return all(self.server.answers(name, label="stable") == factor(self.stable(name))
                   for name in (STEADY, CHANGING))  # fmt: skip

    @contextmanager
    def without_server(self) -> Iterator[None]:
        """A block at whose end the server is back, started anew."""
        began, restarts = time.monotonic(), self.restarts
        yield
        self.wait_for(lambda: self.restarts > restarts, "the server to end")
        self.wait_for(self.serves_what_was_promoted, "the server to be back")
        self.away.append((began, time.monotonic()))

    def supervise(self) -> None:
        """Start the server again whenever it ends, as an engine does."""
        while not self._stopping:
            code = self.server.process.wait()
            if not self._stopping:
                self.restarts += 1
                self.say(f"supervisor: the container ended with {code}")
                self.server.start()

    @contextmanager
    def supervised(self) -> Iterator[None]:
        thread = threading.Thread(target=self.supervise)
        thread.start()
        try:
            yield
        finally:
            self._stopping = True
            self.server.process.terminate()
            thread.join()

    def promote(self, **more: bool) -> int:
        version = self.next(CHANGING)
        self.put(CHANGING, version)
        promote(self.models, CHANGING, version, self.fleet, settings(**more), self.say)
        return version

    def rollback(self, canary: bool = False) -> None:
        rollback(self.models, CHANGING, self.fleet, canary=canary, progress=self.say)

    def disagreements(self, name: str) -> tuple[str, ...]:
        return status(self.models, name, (self.server.target,))[0].disagreements


# Faults: what happens, and a pattern of what the log says about it --------------------


def refused_by_the_server(chaos: Chaos, spoil: Callable[[Path], None]) -> str:
    """A version of the loose model that cannot be loaded, until a better one comes."""
    version = chaos.next(LOOSE)
    staged = chaos.models.parent / "spoilt"
    shutil.copytree(chaos.scales / str(factor(version)), staged)
    spoil(staged)
    staged.rename(chaos.models / LOOSE / str(version))
    chaos.wait_for(lambda: chaos.state(LOOSE, version) is State.END, f"version {version} to be given up")
    shutil.rmtree(chaos.models / LOOSE / str(version))
    chaos.put(LOOSE, version + 1)
    chaos.wait_for(lambda: chaos.server.answers(LOOSE) == factor(version + 1), "the version after it")
    return rf"name: {LOOSE} version: {version}\}}.*(END|cannot be loaded|error)"


def broken_version(chaos: Chaos) -> str:
    return refused_by_the_server(
        chaos, lambda path: void((path / "saved_model.pb").write_bytes(b"no SavedModel"))
    )


def half_copied_version(chaos: Chaos) -> str:
    return refused_by_the_server(chaos, lambda path: values_of(path).unlink())


def values_of(version: Path) -> Path:
    """The file of a version's parameters."""
    (data,) = (version / "variables").glob("variables.data-*")
    return data


def bad_warmup_record(chaos: Chaos) -> str:
    def spoil(path: Path) -> None:
        (path / "assets.extra").mkdir(exist_ok=True)
        (path / "assets.extra" / "tf_serving_warmup_requests").write_bytes(b"\xff no record " * 9)

    return refused_by_the_server(chaos, spoil)


def void(_: object) -> None:
    """For what returns something."""


def killed_server(chaos: Chaos) -> str:
    with chaos.without_server():
        os.kill(chaos.server.server_pid(), signal.SIGKILL)
    return r"entrypoint: error: the server ended with code 137"


def stopped_container(chaos: Chaos) -> str:
    with chaos.without_server():
        chaos.server.process.terminate()
    return r"supervisor: the container ended with 0"


def hung_server(chaos: Chaos) -> str:
    with chaos.without_server():
        os.kill(chaos.server.server_pid(), signal.SIGSTOP)
    return r"the server is stopped \(SIGSTOP\): killing it"


def canary_on_and_off(chaos: Chaos) -> str:
    version = chaos.promote(canary=True)
    chaos.rollback(canary=True)
    return rf"serving version {version} as {CHANGING}-canary"


def promotion(chaos: Chaos) -> str:
    version = chaos.promote()
    chaos.wait_for(lambda: chaos.server.answers(CHANGING, label="stable") == factor(version), "it")
    return r"moving stable"


def promotion_and_rollback(chaos: Chaos) -> str:
    before = chaos.stable(CHANGING)
    chaos.promote()
    chaos.rollback()
    assert chaos.stable(CHANGING) == before
    return rf"moving stable back to version {before}"


def killed_promoter(chaos: Chaos) -> str:
    """The promotion is finished by the same command."""
    version = chaos.next(CHANGING)
    chaos.put(CHANGING, version)
    command = [sys.executable, "-m", "spikeless", "promote", CHANGING, str(version)]
    process = subprocess.Popen(
        [*command, f"--models={chaos.models}", f"--servers={chaos.server.target}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "as changing-canary" in line or "reloading" in line:
            break
        chaos.say(line)
    process.kill()
    process.wait()
    process.stdout.close()
    promote(chaos.models, CHANGING, version, chaos.fleet, settings(), chaos.say)
    return r"moving stable"


def server_killed_in_a_promotion(chaos: Chaos) -> str:
    with chaos.without_server():
        killer = threading.Timer(0.5, lambda: os.kill(chaos.server.server_pid(), signal.SIGKILL))
        killer.start()
        try:
            chaos.promote()
        except SpikelessError as error:
            chaos.say(error)
        killer.join()
    return r"does not answer, is it being restarted\?|supervisor: the container ended with 137"


def broken_after_promotion(chaos: Chaos) -> str:
    """What is promoted breaks on disk, the server restarts, and another is promoted."""
    chaos.promote()
    broken = chaos.stable(CHANGING)
    values = values_of(chaos.models / CHANGING / str(broken))
    began, restarts = time.monotonic(), chaos.restarts
    values.rename(values.with_name("away"))
    os.kill(chaos.server.server_pid(), signal.SIGKILL)
    chaos.wait_for(lambda: chaos.restarts > restarts, "the server to end")
    chaos.wait_for(lambda: chaos.server.answers(CHANGING, label="stable") > 0, "the version before")
    chaos.wait_for(lambda: chaos.state(CHANGING, broken) is State.END, "the state of the broken one")
    chaos.wait_for(lambda: chaos.server.answers(LOOSE) > 0, "the loose model")
    chaos.away.append((began, time.monotonic()))
    chaos.promote()
    values.with_name("away").rename(values)
    return rf"name: {CHANGING} version: {broken}\}}.*(END|cannot be loaded|error)"


def refused_publication(chaos: Chaos) -> str:
    broken = chaos.models.parent / "refused"
    shutil.copytree(chaos.scales / "1", broken)
    (broken / "saved_model.pb").write_bytes(b"no SavedModel")
    before = layout.versions(chaos.models, LOOSE)
    try:
        publishing.publish(broken, chaos.models, LOOSE)
    except SpikelessError as error:
        chaos.say(f"publish: {error}")
    shutil.rmtree(broken)
    assert layout.versions(chaos.models, LOOSE) == before
    return r"publish: .*saved_model\.pb"


def strict_umask(chaos: Chaos) -> str:
    """Whoever publishes, servers that run as somebody else can read it."""
    # Of the whole process, and therefore in another one.
    script = (
        f"from spikeless.repository import publishing as p; print(p.publish({str(chaos.scales / '1')!r}, "
    )
    script += f"{str(chaos.models)!r}, {CHANGING!r}))"
    done = subprocess.run(
        ["sh", "-c", 'umask 077; exec "$@"', "sh", sys.executable, "-c", script],
        capture_output=True, text=True, check=True, timeout=PATIENCE,
    )  # fmt: skip
    version = Path(done.stdout.strip())
    for path in (version, *version.rglob("*")):
        wanted = 0o555 if path.is_dir() else 0o444
        assert path.stat().st_mode & wanted == wanted, path
    chaos.say(f"published {version} under umask 077")
    return r"under umask 077"


def unknown_model_in_the_file(chaos: Chaos) -> str:
    models_config.edit(chaos.models, {"nowhere": new_block("nowhere", str(chaos.models / "nowhere"))})
    chaos.promote()
    models_config.edit(chaos.models, {"nowhere": None})
    return r"nowhere is left out"


def invalid_label(chaos: Chaos) -> str:
    """A configuration that somebody sends by hand, with a label on nothing."""
    config = models_config.read(chaos.models)
    block = config.block(STEADY)
    assert block is not None
    wrong = config.with_block(STEADY, with_versions(block, [1, 99], {"stable": 99}))
    try:
        chaos.server.client.reload_config(wrong.message)
    except SpikelessError as error:
        chaos.say(error)
    else:
        raise AssertionError("a label on a version that is not there was taken")
    assert chaos.server.answers(STEADY, label="stable") == 1
    return r"Request to assign label to version 99 of model steady"


FAULTS: tuple[Callable[[Chaos], str], ...] = (
    broken_version,
    half_copied_version,
    bad_warmup_record,
    killed_server,
    stopped_container,
    hung_server,
    canary_on_and_off,
    promotion,
    promotion_and_rollback,
    killed_promoter,
    server_killed_in_a_promotion,
    broken_after_promotion,
    refused_publication,
    strict_umask,
    unknown_model_in_the_file,
    invalid_label,
)


# The run ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    faults: Counter[str]
    calls: Counter[str]
    failures: int
    restarts: int
    #: Seconds.
    slowest: float


def run(
    folder: Path, scales: Path, seed: int, seconds: float, faults: tuple[Callable[[Chaos], str], ...] = FAULTS
) -> Result:
    """Let faults happen one after the other until the time is over; each once at least.

    Raises:
        AssertionError: something was lost, a call failed or was answered wrongly that
            should not have, or a fault is not in the log.
    """
    models = folder / "models"
    blocks = {}
    for name in (STEADY, CHANGING, LOOSE):
        put_version(scales / "1", models / name, 1)
        blocks[name] = new_block(name, str(models / name))
    for name in (STEADY, CHANGING):
        blocks[name] = with_versions(blocks[name], [1], {"stable": 1})
    models_config.edit(models, blocks)
    picks = random.Random(seed)
    happened: Counter[str] = Counter()
    with container(models, DRAIN="1") as server:
        chaos = Chaos(models, scales, server)
        chaos.wait_for(chaos.serves_what_was_promoted, "the start")
        callers = Callers(server.target)
        with chaos.supervised(), callers.running():
            until = time.monotonic() + seconds
            waiting = picks.sample(faults, len(faults))
            while waiting or time.monotonic() < until:
                fault = waiting.pop() if waiting else picks.choice(faults)
                mark, began = chaos.mark(), time.monotonic()
                print(f"{fault.__name__} ...", end=" ", flush=True)
                pattern = fault(chaos)
                chaos.wait_for(
                    lambda: re.search(pattern, chaos.text(mark)) is not None,  # noqa: B023
                    f"{pattern} in the log",
                )
                chaos.wait_for(chaos.serves_what_was_promoted, "everything to be served")
                happened[fault.__name__] += 1
                print(f"{time.monotonic() - began:.1f} s", flush=True)
            _check(chaos, callers)
        return Result(happened, callers.calls, len(callers.failures), chaos.restarts, callers.slowest)


def _check(chaos: Chaos, callers: Callers) -> None:
    """Everything is as it should be after the last fault."""
    for name in (STEADY, CHANGING, LOOSE):
        chaos.wait_for(partial(_as_configured, chaos, name), f"{name} to be as models.config says")
        assert Journal(chaos.models, name).unfinished() is None
        newest = max(layout.versions(chaos.models, name))
        if name == LOOSE:
            assert chaos.server.answers(name) == factor(newest)
    assert chaos.stable(CHANGING) in layout.versions(chaos.models, CHANGING)
    assert plans.CANARY_SUFFIX not in " ".join(models_config.read(chaos.models).names)
    assert not callers.wrong, callers.wrong[:5]
    # A call that began in a fault may end after it.
    stray = [
        what for began, ended, what in callers.failures
        if not any(began < until and ended > since for since, until in chaos.away)
    ]  # fmt: skip
    assert not stray, f"{len(stray)} calls failed without a reason: {stray[:5]}"
    assert all(callers.calls[name] for name in (STEADY, CHANGING, LOOSE)), callers.calls


def _as_configured(chaos: Chaos, name: str) -> bool:
    return not chaos.disagreements(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="spikeless-chaos-") as name:
        folder = Path(name)
        (folder / "scales").mkdir()
        build = [sys.executable, str(Path(__file__).with_name("promotion_models.py")), str(folder / "scales")]
        subprocess.run(build, check=True, capture_output=True, timeout=300)
        try:
            result = run(folder, folder / "scales", arguments.seed, arguments.seconds)
        except BaseException:
            log = folder / "entrypoint.log"
            shutil.copy(log, kept := Path(tempfile.gettempdir(), f"chaos-{arguments.seed}.log"))
            print(f"\nseed {arguments.seed} failed; the log is {kept}", flush=True)
            raise
    print(
        f"{ENGINE}: {sum(result.faults.values())} faults, {result.restarts} restarts, "
        f"{sum(result.calls.values())} calls; {result.failures} failed while the server was away; "
        f"the slowest answer took {result.slowest:.1f} s"
    )


if __name__ == "__main__":
    main()
