"""The engine's door: what a queue is bounded by, and when it says to come again."""

from __future__ import annotations

import pytest

from service.engine.door import MAX_RETRY_AFTER, Door, Pace
from service.errors import Overloaded, QuotaExceeded


def test_prompts_that_wait_are_bounded_in_tokens() -> None:
    door = Door(8, max_waiting_tokens=100)
    door.enter(None, 1, 5000)  # whoever finds nobody waiting waits for nobody
    with pytest.raises(Overloaded, match="prompts of 5000 tokens wait already, of 100 may"):
        door.enter(None, 1, 1)
    door.leave_queue(5000)
    door.enter(None, 2, 30)
    with pytest.raises(Overloaded, match="this is 41 more"):
        door.enter(None, 1, 41)
    door.enter(None, 1, 40)
    for tokens in (30, 30, 40):
        door.leave_queue(tokens)
    door.enter(None, 1, 5000)


def test_without_a_bound_only_requests_count() -> None:
    door = Door(2)
    door.enter(None, 1, 10**6)
    door.enter(None, 1, 10**6)
    with pytest.raises(Overloaded, match="2 sequences wait already"):
        door.enter(None, 1, 1)


def test_one_tenant_leaves_room_for_others() -> None:
    door = Door(8, max_waiting_tokens=100)
    door.shared = lambda: True
    door.enter(None, 2, 20, "acme")
    with pytest.raises(QuotaExceeded, match="2 sequences wait already, 2 of them yours, 8 may"):
        door.enter(None, 5, 1, "acme")
    with pytest.raises(QuotaExceeded, match="of 40 tokens wait already, 40 of them yours, of 100"):
        door.enter(None, 1, 21, "acme")
    door.enter(None, 1, 20, "acme")
    door.enter(None, 1, 30, "zeta")  # whoever has none there yet: as much as there is
    with pytest.raises(QuotaExceeded):
        door.enter(None, 1, 1, "zeta")
    with pytest.raises(Overloaded):
        door.enter(None, 1, 11, "beta")
    assert [door.waiting_of(name) for name in ("acme", "zeta", "beta")] == [3, 1, 0]
    for tokens, tenant in ((20, "acme"), (30, "zeta"), (20, "acme"), (20, "acme")):
        door.leave_queue(tokens, tenant)
    assert (door.waiting, door.waiting_of("acme")) == (0, 0)
    door.shared = lambda: False
    for _ in range(8):
        door.enter(None, 1, 1, "acme")
    with pytest.raises(Overloaded):
        door.enter(None, 1, 1, "acme")


def test_it_says_to_come_again_when_there_will_be_room() -> None:
    """By the pace at which the queue became shorter while there was one."""
    pace = Pace()
    assert pace.seconds(10**6, now=0.0) == 1.0  # nothing is known
    pace.begin(now=100.0)
    for number in range(1, 9):
        pace.left(50, now=100.0 + number)  # fifty a second
    pace.begin(now=500.0)  # nobody waited in between
    assert pace.seconds(500, now=500.0) == pytest.approx(10.0)
    assert pace.seconds(10, now=500.0) == 1.0
    assert pace.seconds(10**6, now=500.0) == MAX_RETRY_AFTER
    assert pace.seconds(500, now=520.0) > 30.0  # nobody has left for long
    for number in range(1, 41):
        pace.left(200, now=500.0 + number)  # it goes faster now
    assert pace.seconds(2000, now=540.0) == pytest.approx(10.0, rel=0.1)
