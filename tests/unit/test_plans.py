"""Plans: which states lead from one version to another, each of them safe."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from spikeless.errors import FailedPrecondition, InvalidArgument, NotFound
from spikeless.repository.journal import ChangeBegun, ChangeEnded, Checked, Entry, Step
from spikeless.repository.models_config import model_in, new_block, with_versions
from spikeless.rollout.plans import Plan, ServedModel, end_canary, promotion, rollback, undo, version_before


def model(
    served: Collection[int] = (1,), labels: dict[str, int] | None = None, canary: int | None = None
) -> ServedModel:
    block = None
    if served:
        labels = {"stable": max(served)} if labels is None else labels
        block = with_versions(new_block("m", "/models/m"), served, labels)
    other = None if canary is None else with_versions(new_block("m-canary", "/models/m"), [canary], {})
    return ServedModel("m", {"m": block, "m-canary": other}, frozenset(served), "/models/m")


def plan_of(model: ServedModel, version: int, label: str = "stable", **more: bool) -> Plan:
    options = {"canary": False, "keep_previous": True, "takes_unlabelled": False, **more}
    return promotion(model, version, label, **options)


def shape(plan: Plan) -> list[tuple[list[int], dict[str, int], int | None]]:
    """Each state as (versions, labels, canary)."""
    found = []
    for blocks in plan.states:
        own = model_in(blocks["m"]) if blocks["m"] else None
        canary = model_in(blocks["m-canary"]) if blocks["m-canary"] else None
        found.append(
            (
                sorted(own.model_version_policy.specific.versions) if own else [],
                dict(own.version_labels) if own else {},
                canary.model_version_policy.specific.versions[0] if canary else None,
            )
        )
    return found


def test_a_promotion_loads_as_canary_then_adds_then_moves() -> None:
    assert shape(plan_of(model([1]), 2)) == [
        ([1], {"stable": 1}, None),
        ([1], {"stable": 1}, 2),
        ([1, 2], {"stable": 1}, None),
        ([1, 2], {"stable": 2}, None),
    ]
    assert shape(plan_of(model([1, 2]), 3))[-1] == ([2, 3], {"stable": 3}, None), "one before stays"
    assert shape(plan_of(model([1]), 2, keep_previous=False))[-1] == ([2], {"stable": 2}, None)
    assert shape(plan_of(model([1], canary=2), 2))[:2] == [([1], {"stable": 1}, 2)] * 2
    assert shape(plan_of(model([1]), 2, canary=True)) == [
        ([1], {"stable": 1}, None),
        ([1], {"stable": 1}, 2),
    ]


def test_the_first_version_of_a_model() -> None:
    assert shape(plan_of(model([]), 1)) == [
        ([], {}, None),
        ([], {}, 1),
        ([1], {}, None),
        ([1], {"stable": 1}, None),
    ]


def test_what_is_loaded_already_is_not_loaded_again() -> None:
    assert shape(plan_of(model([1, 2], {"stable": 1}), 2)) == [
        ([1, 2], {"stable": 1}, None),
        ([1, 2], {"stable": 1}, None),
        ([1, 2], {"stable": 2}, None),
    ]
    assert not plan_of(model([1, 2]), 2).changes, "promoting what is stable changes nothing"


def test_an_older_version_takes_the_newer_one_out() -> None:
    assert shape(plan_of(model([2]), 1))[-1] == ([1], {"stable": 1}, None)


def test_the_policy_latest_becomes_a_specific_one() -> None:
    block = new_block("m", "/models/m")
    latest = ServedModel("m", {"m": block, "m-canary": None}, frozenset([4]), "/models/m")
    plan = plan_of(latest, 5)
    assert plan.states[0] == {"m": block, "m-canary": None}
    assert shape(plan)[1] == ([4], {}, 5)
    assert shape(plan)[-1] == ([4, 5], {"stable": 5}, None)
    assert plan.previous == 4


def test_refusals() -> None:
    with pytest.raises(FailedPrecondition, match=r"labels \{'blue': 2\} of m would be above the stable"):
        plan_of(model([1]), 2, "blue")
    assert shape(plan_of(model([1]), 2, "blue", takes_unlabelled=True))[-1][1] == {"stable": 1, "blue": 2}
    assert shape(plan_of(model([2]), 1, "old"))[-1] == ([1, 2], {"stable": 2, "old": 1}, None)
    with pytest.raises(FailedPrecondition, match="version 3 is the canary of m: promote it, or end it"):
        plan_of(model([1], canary=3), 2)
    with pytest.raises(FailedPrecondition, match="served already"):
        plan_of(model([1, 2]), 1, canary=True)
    with pytest.raises(FailedPrecondition, match="'new': 2"):
        rollback(model([1, 2], {"stable": 2, "new": 2}), 1, "stable")
    with pytest.raises(InvalidArgument, match="promote it"):
        rollback(model([1, 2], {"stable": 1}), 2, "stable")
    with pytest.raises(NotFound, match="no canary"):
        end_canary(model())


def test_a_rollback_is_one_step_when_the_version_is_loaded() -> None:
    assert shape(rollback(model([1, 2]), 1, "stable")) == [
        ([1, 2], {"stable": 2}, None),
        ([1], {"stable": 1}, None),
    ]
    assert shape(rollback(model([2], canary=3), 1, "stable")) == [
        ([2], {"stable": 2}, 3),
        ([1, 2], {"stable": 2}, 3),
        ([1], {"stable": 1}, 3),
    ]


def test_undoing_and_ending() -> None:
    plan = plan_of(model([1]), 2)
    steps = tuple(Step(step.title, step.blocks) for step in plan.steps)
    record = ChangeBegun("1", "promote", 2, "stable", 1, steps=steps)
    assert undo(record).states[-1] == plan.states[0]
    assert shape(end_canary(model([1], canary=2)))[-1] == ([1], {"stable": 1}, None)


numbers = st.integers(0, 6)


@given(st.sets(numbers, min_size=1), st.data(), numbers, st.booleans(), st.booleans())
def test_every_state_is_safe_to_serve(
    served: set[int], data: st.DataObject, version: int, canary: bool, keep: bool
) -> None:
    """Requests without a label get the stable version; labels point at loaded ones."""
    stable = max(served)
    before = model(served, {"stable": stable, "other": data.draw(st.sampled_from(sorted(served)))})
    try:
        plan = plan_of(before, version, canary=canary, keep_previous=keep)
    except FailedPrecondition:
        assume(False)
    states = shape(plan)
    for (old, _, _), (versions, labels, _) in pairwise(states):
        assert set(labels.values()) <= set(old) & set(versions)
        assert stable in versions or labels["stable"] in versions
    last_versions, last_labels, last_canary = states[-1]
    assert max(last_versions) == last_labels["stable"]
    assert last_labels["stable"] == (stable if canary else version)
    assert (last_canary is not None) == canary
    for versions, labels, candidate in states:
        if candidate is not None:
            assert max(versions) == labels["stable"], "nothing but the stable version gets requests meanwhile"


def change(
    identity: str, action: str, version: int, previous: int, result: str, label: str = "stable"
) -> list[Entry]:
    return [
        ChangeBegun(identity, action, version, label, previous),
        Checked(identity, "127.0.0.1:8500", "m", 1),
        ChangeEnded(identity, result),
    ]


def test_the_version_before() -> None:
    records = change("a", "promote", 5, 3, "promoted")
    assert version_before(records, "stable", 5) == 3
    assert version_before(records, "stable", 4) is None, "models.config was edited since"
    assert version_before(records, "blue", 5) is None
    records += change("b", "promote", 6, 5, "put back") + change("c", "promote", 9, 5, "canary")
    assert version_before(records, "stable", 5) == 3
    records += change("d", "rollback", 3, 5, "rolled back")
    assert version_before(records, "stable", 3) == 3, "a rollback is not rolled back further"
    records += change("e", "rollback", 7, 3, "undone")
    assert version_before(records, "stable", 3) == 3
