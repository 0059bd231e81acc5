"""Promotion in waves: a fleet gets a version part by part, or gives it back.

In: a store, a version, and the reports of the machines that follow the store. Out: the
version promoted for all, or the whole fleet at the version before and an error that
says which machine said what.

Who has the version is a part of each change in the store (`spikeless.store.changes`):
a machine in a wave takes it, any other one, and one that comes up, takes what is
promoted for all. So a command that is killed leaves every machine at a version of its
own, and the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

import msgspec

from spikeless.errors import Cancelled, DataLoss, FailedPrecondition, InvalidArgument, Unavailable
from spikeless.repository.models_config import STABLE
from spikeless.rollout import plans
from spikeless.rollout.promotion import Outcome
from spikeless.store import promotions
from spikeless.store.changes import ROUNDS, Change, Waves, check_node
from spikeless.store.health import Health, HealthLimits, Silence, Standing, Watch, table
from spikeless.store.objects import Store
from spikeless.store.promotions import in_waves
from spikeless.store.reports import NodeReport, Reports
from spikeless.store.settings import StoreSettings
from spikeless.store.wave_changes import WaveChanges, WavesEnded

_SIZE = re.compile(r"([1-9]\d{0,5})(%?)")
ALL = "100%"
#: Seconds after which the report of a machine that was not stopped is removed.
_FORGOTTEN_SECONDS = 7 * 86400.0


@dataclass(frozen=True)
class WaveSettings:
    """How a promotion goes through a fleet."""

    #: How many machines have the version after each wave, such as ``1``, ``10%``, and
    #: ``100%`` at the end.
    sizes: tuple[str, ...] = (ALL,)
    #: The machines of a wave before these, by their names.
    first: tuple[str, ...] = ()
    limits: HealthLimits = field(default_factory=HealthLimits)
    #: Machines that may be silent.
    max_silent: int = 0
    #: Seconds between two looks at the reports.
    interval: float = 5.0
    store: StoreSettings = field(default_factory=StoreSettings)

    def __post_init__(self) -> None:
        for size in self.sizes:
            match = _SIZE.fullmatch(size)
            if match is None or (match[2] and int(match[1]) > 100):
                raise InvalidArgument(f"--waves {size}: say how many machines, as in 1,10%,{ALL}")
        if self.sizes[-1:] != (ALL,):
            raise InvalidArgument(f"--waves {','.join(self.sizes)}: the last wave must be {ALL}")
        for node in self.first:
            check_node(node)


def promote_in_waves(
    store: str,
    name: str,
    version: int,
    settings: WaveSettings,
    *,
    label: str = STABLE,
    reason: str = "",
    dry_run: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    interrupted: threading.Event | None = None,
) -> Outcome:
    """Give a fleet another version, one wave of machines after the other.

    Machines that report (``pull --follow --report``) and have servers take part; others
    get the version at the end. Repeated after a kill, it goes on.

    Args:
        store: the URL of the store.
        progress: called with a line of text now and then.
        interrupted: set it to end early; machines stay where they are.

    Raises:
        NotFound: the store has no such version.
        FailedPrecondition: a machine did badly or was silent, and the version was taken
            back; or another promotion of the model goes on, and nothing was changed.
        Cancelled: it was interrupted.
        Unavailable: the store fails.
    """
    interrupted = interrupted or threading.Event()
    opened = Store(store, settings.store, interrupted)
    changes = WaveChanges(opened, name, label, version, reason)
    rollout = _Rollout(changes, settings, progress, interrupted)
    return rollout.plan() if dry_run else rollout.run()


class _Rollout:
    """One promotion in waves."""

    def __init__(
        self,
        moves: WaveChanges,
        settings: WaveSettings,
        progress: Callable[[str], None],
        interrupted: threading.Event,
    ) -> None:
        self._moves = moves
        self._name, self._version = moves.name, moves.version
        self._settings = settings
        self._progress = progress
        self._interrupted = interrupted
        self._reports = Reports(moves.store)
        self._silence = Silence(settings.limits.patience)
        self._watch = Watch(settings.limits, self._silence)
        #: What was told last of a machine.
        self._told: dict[str, object] = {}
        self._total = len(settings.sizes) + bool(settings.first)

    def plan(self) -> Outcome:
        """What `run` would do, with the machines that report now."""
        last = self._moves.changes.last()
        if last is not None and (running := last.waves_of(self._name)) is not None:
            raise in_waves(running)
        previous = self._moves.here(last)
        steps = []
        if last is not None and previous != self._version:
            ready = self._ready(forget=False)
            waves = self._next(self._moves.new(last, self._settings.sizes, self._settings.first), ready)
            while waves is not None:
                steps.append(f"wave {len(waves.nodes)} of {self._total}: {', '.join(waves.nodes[-1])}")
                waves = self._next(waves, ready)
            steps.append(
                f"moving {self._moves.label} to version {self._version} in {self._moves.store.shown}"
            )
        return self._outcome(plans.DRY_RUN, previous, tuple(steps))

    def run(self) -> Outcome:
        """Go through all waves; raises as `promote_in_waves` does."""
        try:
            waves = self._begin()
            if waves is None:
                return self._outcome(plans.UNCHANGED, self._version)
            while True:
                self._await(waves)
                following = self._advance(waves)
                if following is None:
                    return self._outcome(plans.PROMOTED, waves.previous)
                waves = following
        except WavesEnded as ended:
            return self._ended(ended.change)
        except Cancelled:
            raise Cancelled(
                f"interrupted: machines that have version {self._version} of {self._name} keep it; the same "
                f"command goes on, `spikeless rollback {self._name} --store` ends it"
            ) from None

    def _ended(self, change: Change | None) -> Outcome:
        """The same command elsewhere has done it all, or somebody has ended it."""
        if change is not None and (change.action, change.version) == ("promote", self._version):
            return self._outcome(plans.PROMOTED, change.previous)
        who = "" if change is None else f" by {change.user} on {change.host}: {change.reason or 'no reason'}"
        raise FailedPrecondition(f"{self._name}: the promotion of version {self._version} was ended{who}")

    def _outcome(self, result: str, previous: int | None, steps: tuple[str, ...] = ()) -> Outcome:
        return Outcome(self._name, self._moves.label, self._version, previous, result, steps=steps)

    def _begin(self) -> Waves | None:
        """The waves that go on, or new ones; None where the label is there already."""
        for _ in range(ROUNDS):
            last = self._moves.changes.last()
            running = None if last is None else last.waves_of(self._name)
            if running is not None:
                self._require_same(running)
                self._moves.changes.publish()
                self._progress(f"going on with wave {len(running.nodes)} of {self._total}")
                return running
            if self._moves.here(last) == self._version:
                self._moves.changes.publish()
                return None
            assert last is not None
            waves = self._next(
                self._moves.new(last, self._settings.sizes, self._settings.first), self._ready()
            )
            if waves is None:
                raise FailedPrecondition(
                    f"no machine with a server reports on {self._name} in {self._moves.store.shown}: run "
                    "`spikeless pull --follow --servers HOST:PORT --report 1m` on each"
                )
            if self._moves.advance(last, waves):
                self._say(waves)
                return waves
        raise self._moves.changes.busy()

    def _require_same(self, running: Waves) -> None:
        if (running.label, running.version) != (self._moves.label, self._version):
            raise in_waves(running)
        if (running.sizes, running.first) != (self._settings.sizes, self._settings.first):
            first = f"--wave {','.join(running.first)} " if running.first else ""
            raise FailedPrecondition(
                f"the promotion of version {running.version} of {self._name} began with {first}--waves "
                f"{','.join(running.sizes)}: repeat it with these"
            )

    def _advance(self, waves: Waves) -> Waves | None:
        """The next wave; None when all machines have the version."""
        for _ in range(ROUNDS):
            last, now = self._moves.current()
            if now.nodes != waves.nodes:
                return now  # the same command runs elsewhere, too
            following = self._next(now, self._ready())
            if following is None:
                if self._moves.complete(last, now):
                    return None
            elif self._moves.advance(last, following):
                self._say(following)
                return following
        raise self._moves.changes.busy()

    def _say(self, waves: Waves) -> None:
        self._progress(f"wave {len(waves.nodes)} of {self._total}: {', '.join(waves.nodes[-1])}")

    # Who is next ----------------------------------------------------------------------

    def _ready(self, *, forget: bool = True) -> set[str]:
        """The machines that report on the model and have servers."""
        ready = set()
        for node, report in self._reports.read_all(self._reports.nodes()).items():
            if not isinstance(report, NodeReport):
                reason = str(report)
            elif forget and report.time < time.time() - _FORGOTTEN_SECONDS:
                self._reports.remove(node)
                reason = "it has not reported for a week, and is forgotten"
            elif self._silence.is_silent(report):
                reason = f"its last report is {self._silence.seconds(report):.0f} s old"
            elif not report.servers or report.model(self._name) is None:
                reason = f"it has no server of {self._name}"
            else:
                ready.add(node)
                continue
            self._tell(node, f"it is in no wave: {reason}", "left out")
        return ready

    def _next(self, waves: Waves, ready: set[str]) -> Waves | None:
        """The next wave that has machines; None where there are no more."""
        nodes, reached = list(waves.nodes), set(waves.reached)
        plan: list[str | None] = [*([None] if waves.first else []), *waves.sizes]
        for size in plan[len(nodes) :]:
            if size is None:
                if missing := sorted(set(waves.first) - ready):
                    raise FailedPrecondition(f"--wave: there is no report of {', '.join(missing)}")
                nodes.append(waves.first)
            else:
                left = sorted(ready - reached, key=self._order)
                wanted = _count(size, len(ready | reached)) - len(reached)
                nodes.append(tuple(left[: max(0, wanted)]))
            if nodes[-1]:
                return msgspec.structs.replace(waves, nodes=tuple(nodes))
        return None

    def _order(self, node: str) -> bytes:
        """Each version has its own order, so that not always the same one is first."""
        return hashlib.sha256(f"{self._name}/{self._version}/{node}".encode()).digest()

    # How they do ----------------------------------------------------------------------

    def _await(self, waves: Waves) -> None:
        """Wait until all machines of the waves do well.

        Raises:
            FailedPrecondition: one does badly; the version was taken back.
            WavesEnded: somebody else has ended the waves, or gone on with them.
            Unavailable: the store does not answer for longer than a load may take.
        """
        self._watch.begin_wave()
        token, failing = "", 0.0
        while True:
            try:
                changed = token != (token := promotions.token(self._moves.store))
                if changed and self._moves.current()[1].nodes != waves.nodes:
                    return
                standings = self._watch.standings(waves, self._reports.read_all(waves.reached))
                failing = 0.0
            except (Unavailable, DataLoss) as error:
                self._tell("", str(error), error.code)
                failing = failing or time.monotonic()
                if time.monotonic() - failing > self._settings.limits.load_timeout:
                    raise
            else:
                for one in standings:
                    self._tell(one.node, one.text or one.health.value, (one.health, one.serves))
                if self._is_well(waves, standings):
                    return
            if self._interrupted.wait(self._settings.interval):
                raise Cancelled("interrupted")

    def _tell(self, node: str, text: str, state: object) -> None:
        if self._told.get(node) != state:
            self._progress(f"{node or 'store'}: {text}")
        self._told[node] = state

    def _is_well(self, waves: Waves, standings: list[Standing]) -> bool:
        by_health = {health: [one for one in standings if one.health is health] for health in Health}
        silent, waiting = by_health[Health.SILENT], by_health[Health.WAITING]
        bad = [*by_health[Health.BAD], *silent, *by_health[Health.LEFT]]
        nobody = not by_health[Health.WELL] and not waiting
        if by_health[Health.BAD] or len(silent) > self._settings.max_silent or nobody:
            self._give_back(waves, standings, bad)
        return not waiting

    def _give_back(self, waves: Waves, standings: list[Standing], worst: list[Standing]) -> NoReturn:
        where = f"wave {len(waves.nodes)} of {self._total}"
        reason = f"{where}: " + "; ".join(f"{one.node}: {one.text}" for one in worst)
        self._progress(f"{where} failed: going back to version {waves.previous}")
        for _ in range(ROUNDS):
            last, now = self._moves.current()
            if self._moves.give_back(last, now, reason):
                raise FailedPrecondition(
                    f"{where} of version {self._version} of {self._name} failed; the fleet goes back to "
                    f"version {waves.previous}\n{table(standings)}"
                )
        raise self._moves.changes.busy()


def _count(size: str, machines: int) -> int:
    """How many of so many machines a size is."""
    return math.ceil(machines * int(size[:-1]) / 100) if size.endswith("%") else int(size)
