"""Turns at what is costly, and bodies on their way to it: fair among tenants."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.requests import Request

from service.api.places import Places
from service.api.spool import Spool
from service.errors import Overloaded
from tests.waiting import PATIENCE


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def arrival(*pieces: bytes, length: int | None = None) -> Request:
    left = [*pieces]

    async def receive() -> dict[str, Any]:
        body = left.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(left)}

    announced = sum(map(len, pieces)) if length is None else length
    headers = [(b"content-length", b"%d" % announced)]
    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


def test_tenants_take_turns_whoever_asked_first() -> None:
    async def run() -> list[str]:
        places, served = Places(1, 32), list[str]()

        async def one(tenant: str) -> None:
            place = await places.take(tenant)
            served.append(tenant)
            await settle()
            places.give_back(place)

        await asyncio.gather(*(one(tenant) for tenant in "aaaaabbc"))
        return served

    assert "".join(asyncio.run(run())) == "aabcabaa"


def test_one_tenant_fills_half_of_the_line_and_no_more() -> None:
    async def run() -> None:
        places = Places(1, 8)
        held = await places.take("busy")
        waiting = [asyncio.ensure_future(places.take("busy")) for _ in range(4)]
        await settle()
        with pytest.raises(Overloaded, match="4 wait, 4 of them yours"):
            await places.take("busy")
        with pytest.raises(Overloaded):
            places.check("busy")  # before a body is read
        places.check("other")
        others = [asyncio.ensure_future(places.take("other")) for _ in range(2)]
        await settle()
        with pytest.raises(Overloaded) as caught:
            places.check("other")
        assert caught.value.retry_after >= 1
        places.give_back(held)
        for turn in (*waiting, *others):
            turn.cancel()
        await asyncio.gather(*waiting, *others, return_exceptions=True)

    asyncio.run(run())


@pytest.mark.parametrize("given", [False, True])
def test_who_leaves_the_line_takes_no_place_along(given: bool) -> None:
    """`given`: its turn came in the same moment."""

    async def run() -> None:
        places = Places(1, 8)
        held = await places.take("a")
        leaving = asyncio.ensure_future(places.take("a"))
        await settle()
        if given:
            places.give_back(held)
        leaving.cancel()
        await settle()
        assert leaving.cancelled()
        if not given:
            places.give_back(held)
        await asyncio.wait_for(places.take("b"), PATIENCE)

    asyncio.run(run())


def test_bytes_count_as_they_come_and_no_longer_than_they_stay() -> None:
    async def run() -> None:
        spool = Spool(100, 8)
        with ExitStack() as stack:
            slow = stack.enter_context(spool.arriving(arrival(b"x" * 10, length=40), "slow"))
            assert (await slow.receive())["body"] == b"x" * 10
            with spool.arriving(arrival(b"y" * 45), "fast") as fast:  # 40 are not there
                assert await fast.body() == b"y" * 45
        with spool.arriving(arrival(b"z" * 50), "fast") as whole:
            assert await whole.body() == b"z" * 50
        with pytest.raises(Overloaded, match="no room"), spool.arriving(arrival(b"z" * 51), "fast"):
            raise AssertionError("it was announced to be too much")

    asyncio.run(run())


def test_a_body_that_announces_nothing_is_stopped_on_its_way() -> None:
    async def run() -> None:
        spool = Spool(100, 8)
        with (
            pytest.raises(Overloaded, match="60 of them yours"),
            spool.arriving(arrival(b"x" * 30, b"x" * 30, b"x" * 30, length=0), "a") as request,
        ):
            await request.body()
        with spool.arriving(arrival(b"x" * 50), "a") as request:
            await request.body()  # nothing of the other is counted any more

    asyncio.run(run())


def test_however_many_bodies_a_tenant_sends_another_finds_room() -> None:
    spool = Spool(10**6, 8)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(spool.arriving(arrival(b""), "many"))
        with pytest.raises(Overloaded, match="4 of them yours"):
            stack.enter_context(spool.arriving(arrival(b""), "many"))
        for _ in range(2):
            stack.enter_context(spool.arriving(arrival(b""), "other"))
        stack.enter_context(spool.arriving(arrival(b""), "third"))
    with spool.arriving(arrival(b""), "many"):
        pass
