"""Which calls the gRPC server's loop waits for."""

from __future__ import annotations

import pytest

from spikeless.engine.transport.pace import Pace, Paces


def quick() -> Pace:
    """That of calls that were quick in the pool."""
    pace = Pace()
    assert not pace.is_quick()
    pace.ran(1e-4, may_be_inline=True, computing=None)
    return pace


def until_quick(pace: Pace) -> int:
    """Calls that go to the pool before the next one that does not."""
    return next(count for count in range(1 << 15) if pace.is_quick())


def test_a_method_decides() -> None:
    pace = quick()
    assert pace.is_quick()
    pace.ran(1e-4, may_be_inline=False, computing=1e-4)
    assert not pace.is_quick()


def test_a_busy_machine_does_not_send_calls_to_the_pool() -> None:
    """There they would wait longer still: for each other, too."""
    pace = quick()
    for _ in range(100):
        pace.ran(5e-2, may_be_inline=True, computing=None)
    for _ in range(5):
        assert pace.is_quick()
        pace.ran(9e-3, may_be_inline=True, computing=2e-4)
    assert pace.is_quick()


def test_calls_that_become_slow_leave() -> None:
    pace = quick()
    for _ in range(30):
        pace.ran(1.5e-3, may_be_inline=True, computing=5e-4)
    assert not pace.is_quick()


@pytest.mark.parametrize(("seconds", "computing"), [(3e-3, 3e-3), (6e-2, 0.0)])
def test_a_slow_call_sends_those_after_it_to_the_pool(seconds: float, computing: float) -> None:
    """More of them each time, until calls have been quick for long."""
    pace = quick()
    skipped = []
    for _ in range(3):
        pace.ran(seconds, may_be_inline=True, computing=computing)
        skipped.append(until_quick(pace))
    assert skipped[0] > 0
    assert skipped[1] == 2 * skipped[0]
    assert skipped[2] == 4 * skipped[0]
    for _ in range(1001):
        pace.ran(1e-4, may_be_inline=True, computing=1e-4)
    pace.ran(seconds, may_be_inline=True, computing=computing)
    assert until_quick(pace) == skipped[0]


def test_calls_of_one_kind_share_their_pace() -> None:
    paces = Paces()
    first = paces.of("/a", b"\x0a\x01m123")
    assert first is not None
    assert paces.of("/a", b"\x0a\x01m456") is first
    assert paces.of("/a", b"\x0a\x01n123") is not first
    assert paces.of("/b", b"\x0a\x01m123") is not first
    for other in (b"", b"\x12\x01m", b"\x0a\x80\x01", b"\x0a\x01" + bytes(1 << 17)):
        assert paces.of("/a", other) is None
