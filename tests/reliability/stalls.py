"""Clients that stall, by the hundred, beside some that do not.

    python -m tests.reliability.stalls --clients 1000 --rounds 2

The others' latency is compared with that of the same seconds without any stalled ones, in turn, and
twice. First at half of what the server can do: requests come by chance (the same moments in both),
and each one's latency counts from when it was due. Then saturated: four clients that ask again as
soon as they are answered, so that the machine has no idle time, and whatever the stalled ones cost
is taken from somebody.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import uvloop

from tests.reliability.clients import (
    Address,
    Client,
    Load,
    closed_loop,
    generate,
    open_loop,
    poisson,
    quantile,
)
from tests.reliability.crowd import Stalled, one_large_reply, stalling
from tests.reliability.host import Host
from tests.reliability.served import Served, scratch, serving

CUT_SECONDS = 10.0  # the deadlines leave a machine that is not too busy a second to notice
CONTENT = generate("a question", 16)
SATURATING = 4  # clients
SHARE = 0.5  # of the capacity, in an open loop

Loading = Callable[[], Coroutine[Any, Any, Load]]


@dataclass(slots=True)
class Pair:
    """Latencies of one kind of load, alone and beside stalled clients, of all rounds."""

    name: str
    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)  # of the p99s, by round

    def add(self, alone: list[float], beside: list[float]) -> None:
        self.alone += alone
        self.beside += beside
        self.ratios.append(quantile(beside, 0.99) / quantile(alone, 0.99))

    def __str__(self) -> str:
        p50, p99 = (
            [1e3 * quantile(times, share) for times in (self.alone, self.beside)]
            for share in (0.5, 0.99)
        )
        spread = f"{min(self.ratios):.2f} to {max(self.ratios):.2f}"
        return (
            f"{self.name}: p99 with over without {p99[1] / p99[0]:.2f} ({spread}), "
            f"{p99[0]:.1f} and {p99[1]:.1f} ms; p50 {p50[0]:.1f} and {p50[1]:.1f} ms; "
            f"{len(self.alone)} and {len(self.beside)} requests"
        )


async def _beside(crowd: Callable[[], Any], load: Loading) -> tuple[Load, Any]:
    """What honest clients see, with what `crowd` does in the meantime."""
    await asyncio.sleep(1)
    coming = crowd()
    found = await load()
    return found, await coming if coming else None


class Measure:
    def __init__(
        self, served: Served, clients: int, seconds: float, elsewhere: Executor, host: Host
    ) -> None:
        self.served = served
        self.host = host
        self.address = ("127.0.0.1", served.port)
        self.clients = clients
        self.seconds = seconds
        self.half = Pair("at half of capacity")
        self.full = Pair("saturated")
        self.longest = 0.0
        self._elsewhere = elsewhere

    def round(self, number: int) -> None:
        """Saturated first: that says what half is."""
        full = self._twice(self._saturated, number)
        self.full.add(*(load.times(200) for load in full))
        moments = poisson(SHARE * len(full[0].times(200)) / self.seconds, self.seconds, number)
        half = self._twice(lambda: open_loop(self.address, CONTENT, moments, self.seconds), number)
        self.half.add(*(load.since_due(200) for load in half))

    def _saturated(self) -> Coroutine[Any, Any, Load]:
        return closed_loop(self.address, CONTENT, SATURATING, self.seconds)

    def _twice(self, load: Loading, number: int) -> tuple[Load, Load]:
        """Without stalled clients, and with them; in every second round the other way round."""
        order = (0, self.clients) if number % 2 == 0 else (self.clients, 0)
        found = {one: self.host.quiet(lambda one=one: self._once(load, one)) for one in order}
        return found[0], found[self.clients]

    def _once(self, load: Loading, clients: int) -> Load:
        def crowd() -> Any:
            if not clients:
                return None
            loop = asyncio.get_running_loop()
            return loop.run_in_executor(self._elsewhere, stalling, self.address, clients)

        before = self.served.cpu_seconds(), self.served.loop_seconds()
        found, stalled = uvloop.run(_beside(crowd, load))
        spent = self.served.cpu_seconds() - before[0], self.served.loop_seconds() - before[1]
        told = dict(found.lost + found.statuses)
        p99 = 1e3 * quantile(found.since_due(200), 0.99)
        print(f"{told}, p99 {p99:.1f} ms; CPU {spent[0]:.2f} s, event loop {spent[1]:.2f} s")
        if stalled is not None:
            self._heed(stalled)
        return found

    def _heed(self, stalled: Stalled) -> None:
        self.longest = max(self.longest, stalled.longest)
        print(f"  beside stalled clients: {stalled}; their own CPU {stalled.cpu_seconds:.2f} s")


async def _acquaint(address: Address) -> None:
    """What the server makes at its first requests is made before anything is measured."""
    client = Client(address)
    for content in (CONTENT, one_large_reply()):
        assert (await client.ask(content)).status == 200
    await client.close()


def measure(served: Served, clients: int, seconds: float, rounds: int, repeats: int = 0) -> float:
    """The longest that one was borne, inf for ever; prints what was seen."""
    with ProcessPoolExecutor(1, get_context("spawn")) as elsewhere:
        elsewhere.submit(stalling, ("127.0.0.1", served.port), 0).result()  # it has begun
        uvloop.run(_acquaint(("127.0.0.1", served.port)))
        found = Measure(served, clients, seconds, elsewhere, Host(repeats))
        for number in range(rounds):
            found.round(number)
    for pair in (found.half, found.full):
        print(pair)
    print(f"cut after {found.longest:.1f} s at most; {found.host}; {served.look()}")
    return found.longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=8, help="where the host disturbed")
    parser.add_argument("--base", help="directory of a model; default: a tiny random one")
    asked = parser.parse_args()
    with scratch(asked.base) as (work, base), serving(work / "run", "--base", base) as served:
        longest = measure(served, asked.clients, asked.seconds, asked.rounds, asked.repeats)
    sys.exit(0 if longest < CUT_SECONDS else 1)


if __name__ == "__main__":
    main()
