"""Plans: the states of ``models.config`` from one version of a model to another.

In: what it says of a model now, and what is wanted. Out: a `Plan`, a row of states that
are each safe to serve and to stop at, or an error that says why there is none. Nothing
is read or written here.

TensorFlow Serving's rules decide the order. A request without version or label goes to
the highest version that is loaded under the model's name, so an unchecked version must
not be loaded under that name: it is the servable ``<name>-canary`` first, loaded from
the same directory. A label may only point at a version that is available, and a server
applies labels before the versions of the same configuration: so a version is added
first, and a label moves in a step of its own. No version above the stable one is loaded
under the model's name, so that requests without a label and requests for ``stable`` get
the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from spikeless.errors import FailedPrecondition, InvalidArgument, NotFound
from spikeless.repository.journal import ChangeBegun, Entry, Step, outcomes
from spikeless.repository.models_config import (
    STABLE,
    Blocks,
    ModelsConfig,
    model_in,
    new_block,
    with_versions,
)

CANARY_SUFFIX = "-canary"

PROMOTE, ROLLBACK = "promote", "rollback"
#: Results, as the journal and the commands name them.
PROMOTED, CANARY, ROLLED_BACK, UNDONE, ENDED = "promoted", "canary", "rolled back", "undone", "canary ended"
UNCHANGED, PUT_BACK, DRY_RUN = "unchanged", "put back", "dry run"


@dataclass(frozen=True)
class Plan:
    """All states, the first of which is how things are before."""

    action: str
    version: int
    label: str
    #: The version that the label points at before.
    previous: int | None
    result: str
    steps: tuple[Step, ...]
    #: The version to compare with.
    stable: int | None = None

    @property
    def states(self) -> list[Blocks]:
        return [step.blocks for step in self.steps]

    @property
    def changes(self) -> bool:
        """Whether any state differs from the first."""
        return any(blocks != self.states[0] for blocks in self.states)

    def current(self, config: ModelsConfig) -> Blocks:
        """What a ``models.config`` says of the models in this plan."""
        return {name: config.block(name) for name in self.states[0]}


@dataclass(frozen=True)
class ServedModel:
    """A model in ``models.config``, and the versions that are served under its name."""

    name: str
    before: Blocks
    served: frozenset[int]
    #: Where servers find it.
    base_path: str

    @property
    def canary(self) -> str:
        return self.name + CANARY_SUFFIX

    @property
    def block(self) -> str:
        block = self.before[self.name] or new_block(self.name, self.base_path)
        model = model_in(block)
        if not set(model.model_version_policy.specific.versions) - self.served:
            return block
        # Servers have something else of it: that is where its labels are, too.
        instead = max(self.served)
        labels = {
            label: number if number in self.served else instead
            for label, number in model.version_labels.items()
        }
        return with_versions(block, self.served, labels)

    @property
    def labels(self) -> dict[str, int]:
        return dict(model_in(self.block).version_labels)

    @property
    def stable(self) -> int | None:
        """The version that most requests get; None when none is served."""
        return self.labels.get(STABLE, max(self.served, default=None))

    def state(self, served: Iterable[int], labels: Mapping[str, int], canary: str | None) -> Blocks:
        """A state of ``models.config``; without ``served`` the model stays."""
        versions = frozenset(served)
        block = with_versions(self.block, versions, labels) if versions else self.before[self.name]
        return {self.name: block, self.canary: canary}


def promotion(
    model: ServedModel, version: int, label: str, *, canary: bool, keep_previous: bool, takes_unlabelled: bool
) -> Plan:
    """From what is served now to ``version`` behind ``label``.

    With ``canary``, ``version`` is only served as ``<name>-canary``.

    Raises:
        FailedPrecondition: requests that name no label would reach another version than
            the stable one.
    """
    name, served, labels, stable = model.name, model.served, model.labels, model.stable
    _check_no_other_canary(model, version)
    moved = labels | {label: version}
    top = moved.get(STABLE, stable)
    keep = set(moved.values())
    if label != STABLE or (version == stable and keep_previous):
        keep |= served
    elif stable is not None and keep_previous:
        keep.add(stable)
    if not takes_unlabelled and top is not None:
        if not canary:
            check_none_above(name, moved, top)
        keep = {number for number in keep if number <= top}

    steps = [Step("as it was", model.before)]
    if version in served:
        if canary:
            raise FailedPrecondition(f"version {version} of {name} is served already: it is no canary")
        # Pinned, so that nothing that is published meanwhile takes the version's place.
        pinned = model.state(served, labels, model.before[model.canary])
        steps.append(Step(f"checking version {version}", pinned, ask=name, compare=True))
    else:
        block = with_versions(new_block(model.canary, model_in(model.block).base_path), [version], {})
        staged = model.state(served, labels, block)
        title = f"serving version {version} as {model.canary}"
        steps.append(Step(title, staged, loads=True, ask=model.canary, compare=True))
    if not canary:
        if version not in served:
            added = model.state(served | {version}, labels, None)
            steps.append(Step(f"adding version {version} to {name}", added, loads=True, ask=name))
        steps.append(Step(f"moving {label}", model.state(keep, moved, None)))
    previous = labels.get(label, stable if label == STABLE else None)
    result = CANARY if canary else PROMOTED
    return Plan(PROMOTE, version, label, previous, result, tuple(steps), stable)


def _check_no_other_canary(model: ServedModel, version: int) -> None:
    block = model.before[model.canary]
    others = set(model_in(block).model_version_policy.specific.versions) - {version} if block else set()
    if others:
        raise FailedPrecondition(
            f"version {min(others)} is the canary of {model.name}: promote it, or end it with "
            f"`spikeless rollback {model.name} --canary`"
        )


def check_none_above(name: str, labels: Mapping[str, int], top: int) -> None:
    """Check that requests without a label reach no version above the stable one.

    Raises:
        FailedPrecondition: a label would point at one.
    """
    above = {label: version for label, version in labels.items() if version > top}
    if above:
        raise FailedPrecondition(
            f"labels {above} of {name} would be above the stable version {top}, and requests without a label "
            "go to the highest version that is loaded: use --canary, move those labels first, or say "
            "--takes-unlabelled where every caller names a label"
        )


def rollback(model: ServedModel, target: int, label: str) -> Plan:
    """From what is served back to an earlier version behind ``label``.

    Raises:
        InvalidArgument: the version is a later one.
        FailedPrecondition: another label keeps a later version loaded.
    """
    labels = model.labels
    now = labels[label]
    if target > now:
        raise InvalidArgument(f"{label} of {model.name} is version {now}; to go on to {target}, promote it")
    moved = labels | {label: target}
    top = moved.get(STABLE, max(model.served, default=target))
    check_none_above(model.name, moved, top)
    keep = {number for number in model.served if number <= top} | set(moved.values())
    canary = model.before[model.canary]
    steps = [Step("as it was", model.before)]
    if target not in model.served:
        added = model.state(model.served | {target}, labels, canary)
        steps.append(Step(f"loading version {target} again", added, loads=True))
    steps.append(Step(f"moving {label} back to version {target}", model.state(keep, moved, canary)))
    return Plan(ROLLBACK, target, label, now, ROLLED_BACK, tuple(steps))


def undo(unfinished: ChangeBegun) -> Plan:
    """Back to how things were before a promotion that was cut short."""
    before = unfinished.states[0]
    return Plan(
        ROLLBACK,
        unfinished.version,
        unfinished.label,
        unfinished.previous,
        UNDONE,
        (Step("as it was", before), Step("undoing the promotion that was cut short", before)),
    )


def end_canary(model: ServedModel) -> Plan:
    """Take ``<name>-canary`` out of service.

    Raises:
        NotFound: there is none.
    """
    block = model.before[model.canary]
    if block is None:
        raise NotFound(f"{model.name} has no canary")
    version = model_in(block).model_version_policy.specific.versions[0]
    after = {**model.before, model.canary: None}
    steps = (Step("as it was", model.before), Step(f"ending {model.canary}", after))
    return Plan(ROLLBACK, version, "", None, ENDED, steps)


def version_before(entries: Iterable[Entry], label: str, now: int) -> int | None:
    """The version to roll ``label`` back to, from a journal; None if it does not tell.

    After a rollback that is the current version: repeating it does not go back twice.
    """
    reached = previous = None
    for change, result in outcomes(entries):
        if not isinstance(change, ChangeBegun) or change.label != label:
            continue
        if result == PROMOTED:
            reached, previous = change.version, change.previous
        elif result == ROLLED_BACK:
            reached = previous = change.version
        elif result == UNDONE:
            reached = previous = change.previous
    return previous if reached == now else None
