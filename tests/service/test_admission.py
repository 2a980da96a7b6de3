"""Admission: refusals that cost nothing, and counts that always come back to zero."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from service.admission import MAX_RETRY_AFTER, Admission, Loading, State
from service.errors import Draining, Overloaded, QuotaExceeded, ServiceError


def ready(max_queue: int = 4, waiting: int = 0) -> Admission:
    admission = Admission(max_queue)
    admission.open(lambda: waiting)
    return admission


@pytest.mark.parametrize(
    ("state", "error"),
    [("loading", Loading), ("draining", Draining), ("failed", ServiceError)],
)
def test_nobody_comes_in_but_when_it_is_ready(state: State, error: type[Exception]) -> None:
    admission = Admission(4)
    admission.state = state
    with pytest.raises(error):
        admission.admit()
    assert admission.inside == admission.preparing == 0


def test_draining_is_not_undone_by_a_base_that_comes_late() -> None:
    admission = Admission(4)
    admission.drain()
    admission.open(lambda: 0)
    with pytest.raises(Draining):
        admission.admit()


@pytest.mark.parametrize(("preparing", "waiting"), [(4, 0), (2, 2), (0, 4), (0, 9)])
def test_who_prepares_counts_like_who_waits(preparing: int, waiting: int) -> None:
    admission = ready(max_queue=4, waiting=0)
    for _ in range(preparing):
        admission.admit()
    admission._waiting = lambda: waiting
    with pytest.raises(Overloaded, match=f"{preparing + waiting} requests wait, the bound is 4"):
        admission.admit()


def test_one_tenant_leaves_room_for_others() -> None:
    """What prepares counts as what waits: 2 and 2 of 8 are acme's, and then 1 and 1 zeta's."""
    waits = {"acme": 2, "zeta": 1}
    several = True
    admission = Admission(8)
    admission.open(lambda: sum(waits.values()), lambda name: waits.get(name, 0), lambda: several)
    waits["zeta"] = 0
    acme = [admission.admit("acme") for _ in range(2)]
    with pytest.raises(QuotaExceeded, match="4 requests wait, 4 of them yours, the bound is 8"):
        admission.admit("acme")
    waits["zeta"] = 1
    admission.admit("zeta")
    with pytest.raises(QuotaExceeded, match="6 requests wait, 2 of them yours"):
        admission.admit("zeta")
    admission.check_room("beta")
    admission.check_room()  # of whoever it may be
    waits["beta"] = 2
    with pytest.raises(Overloaded):
        admission.check_room("gamma")
    del waits["beta"]
    acme[0].prepared()
    acme[0].release()
    acme[1].prepared()
    assert dict(admission.preparing_of) == {"zeta": 1}
    admission.admit("acme").release()
    several = False
    for _ in range(4):
        admission.admit("acme")
    with pytest.raises(Overloaded, match="8 requests wait"):
        admission.admit("acme")


def test_who_runs_does_not_count() -> None:
    admission = ready(max_queue=2)
    for _ in range(10):
        admission.admit().prepared()
    assert (admission.inside, admission.preparing) == (10, 0)


def test_a_ticket_can_be_given_back_twice() -> None:
    admission = ready()
    one, other = admission.admit(), admission.admit()
    one.release()
    one.release()
    one.prepared()
    assert (admission.inside, admission.preparing) == (1, 1)
    other.prepared()
    other.release()
    assert (admission.inside, admission.preparing) == (0, 0)


def test_retry_after_follows_what_requests_take() -> None:
    admission = ready(max_queue=1)
    admission.admit()

    def told() -> float:
        with pytest.raises(Overloaded) as refusal:
            admission.admit()
        return refusal.value.retry_after

    assert told() == 1.0
    for _ in range(100):
        admission.inside += 1
        admission.left(20.0)
    assert 15 < told() < 21
    for _ in range(100):
        admission.inside += 1
        admission.left(1000.0)
    assert told() == MAX_RETRY_AFTER


def test_empty_waits_for_the_last_one() -> None:
    async def run() -> None:
        admission = ready()
        assert await admission.empty(0.01)
        ticket = admission.admit()
        admission.drain()
        assert not await admission.empty(0.01)
        asyncio.get_running_loop().call_later(0.02, ticket.release)
        assert await admission.empty(10)

    asyncio.run(run())


def test_what_is_held_meanwhile_ends_with_the_preparation() -> None:
    ended: list[str] = []

    @contextmanager
    def held(name: str) -> Iterator[None]:
        try:
            yield
        finally:
            ended.append(name)

    admission = ready()
    one, other = admission.admit(), admission.admit()
    one.meanwhile(held("one"))
    other.meanwhile(held("other"))
    one.prepared()
    assert ended == ["one"]
    other.release()  # refused before it was prepared
    other.prepared()
    assert ended == ["one", "other"]
