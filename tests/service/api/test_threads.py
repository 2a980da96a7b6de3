"""Threads that tenants share: who gets one, who waits, and that all come back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from service.api.threads import TENANT, Threads
from tests.waiting import PATIENCE


class Work:
    """What runs until it is let go; by tenant and number."""

    def __init__(self, at_once: int, shared: bool = True) -> None:
        self.threads = Threads(at_once, "test", lambda: shared)
        self.began: list[str] = []
        self.ends: dict[str, threading.Event] = {}

    def ask(self, tenant: str, number: int) -> asyncio.Task[str]:
        name = f"{tenant}{number}"
        self.ends[name] = threading.Event()

        def work() -> str:
            self.began.append(name)
            assert self.ends[name].wait(PATIENCE)
            return name

        async def run() -> str:
            TENANT.set(tenant)
            return await self.threads.run(work)

        return asyncio.ensure_future(run())

    async def running(self, *names: str) -> None:
        """Exactly these have begun, so far."""
        for _ in range(24_000):
            if set(self.began) == set(names):
                break
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.03)
        assert sorted(self.began) == sorted(names)


def within(use: Callable[[Work], Awaitable[None]], at_once: int, shared: bool = True) -> None:
    async def run() -> None:
        work = Work(at_once, shared)
        try:
            await use(work)
        finally:
            for end in work.ends.values():
                end.set()
            work.threads.close()

    asyncio.run(run())


def test_one_tenant_leaves_threads_for_others() -> None:
    async def use(work: Work) -> None:
        asked = [work.ask("a", number) for number in range(4)]
        await work.running("a0", "a1")
        other = [work.ask("b", number) for number in range(2)]
        await work.running("a0", "a1", "b0")
        work.ends["b0"].set()
        assert await other[0] == "b0"
        await work.running("a0", "a1", "b0", "b1")
        for name in ("a0", "b1"):
            work.ends[name].set()
        await work.running("a0", "a1", "b0", "b1", "a2")
        for name in ("a1", "a2", "a3"):
            work.ends[name].set()
        assert await asyncio.gather(*asked) == ["a0", "a1", "a2", "a3"]
        assert work.threads._held == {}
        assert work.threads._lines == {}

    within(use, 4)


def test_who_is_alone_has_all_of_them() -> None:
    async def use(work: Work) -> None:
        for number in range(4):
            work.ask("a", number)
        await work.running("a0", "a1", "a2")

    within(use, 3, shared=False)


def test_who_waits_takes_turns() -> None:
    async def use(work: Work) -> None:
        for tenant, number in (("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)):
            work.ask(tenant, number)
        for name in ("a0", "a1", "b0", "a2", "b1"):
            await work.running(*work.began, *([] if name in work.began else [name]))
            assert work.began[-1] == name
            work.ends[name].set()

    within(use, 1)


def test_a_client_that_goes_leaves_no_thread_behind() -> None:
    """One that waits gives its turn up; what has begun holds its thread until it ends."""

    async def use(work: Work) -> None:
        first, second, third = (work.ask("a", number) for number in range(3))
        await work.running("a0")
        for gone in (first, second):
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
        await work.running("a0")
        work.ends["a0"].set()
        await work.running("a0", "a2")
        work.ends["a2"].set()
        assert await third == "a2"
        assert work.threads._held == {}

    within(use, 1)
