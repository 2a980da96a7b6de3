"""Clients that stall, by the hundred, beside some that do not.

    python -m tests.reliability.stalls --clients 1000 --rounds 4

They come in the first seconds. Of sixty-four, twenty-five never end the head of a request; twenty
never end its body, and eighteen stop after a first piece that would pay for minutes; one reads
nothing of the replies that it asked for, more than the system keeps (few: to make those replies is
work, and no stall). The others' latency is compared with that of the same seconds without any
stalled ones, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import select
import socket
import sys
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from statistics import median

import uvloop

from service.api.console import BUILT
from tests.reliability.clients import Address, Load, closed_loop, generate, quantile, request
from tests.reliability.served import Served, scratch, serving

DRIP_SECONDS = 1.0  # between two bytes of who sends slowly
FAST = 100_000  # bytes at once, of a body that then stops
REPLIES_BYTES = 5 << 20  # asked for by who reads nothing; the system keeps some three megabytes
COME_SECONDS = 4.0
CUT_SECONDS = 10.0  # the deadlines leave a machine that is not too busy a second to notice
KINDS = ("head", "body", "fast body", "reader")
OF_64 = (0,) * 25 + (1,) * 20 + (2,) * 18 + (3,)


@dataclass(slots=True)
class Stalled:
    """How long each was borne, by what it did; inf: until it was no longer watched."""

    borne: dict[str, list[float]] = field(default_factory=dict)

    @property
    def longest(self) -> float:
        return max(max(times) for times in self.borne.values())

    def __str__(self) -> str:
        kinds = (f"{kind} {len(t)}, {max(t):.1f} s" for kind, t in self.borne.items())
        return "; ".join(kinds)


def large_replies() -> bytes:
    """Requests for as much as the system does not keep for a client."""
    asset = max(BUILT.glob("console/*"), key=lambda path: path.stat().st_size)
    return request(f"/console/{asset.name}") * -(-REPLIES_BYTES // asset.stat().st_size)


async def stall(address: Address, clients: int, patience: float, large: bytes) -> Stalled:
    """Returns when each was cut off. Readers ask for what is `large`."""
    found = Stalled()
    order = [KINDS[OF_64[number * 5 % 64]] for number in range(clients)]
    pause = COME_SECONDS / max(clients, 1)
    times = await asyncio.gather(
        *(
            _stalled(address, kind, patience, number * pause, large)
            for number, kind in enumerate(order)
        )
    )
    for kind, seconds in zip(order, times, strict=True):
        found.borne.setdefault(kind, []).append(seconds)
    return found


async def _stalled(
    address: Address, kind: str, patience: float, after: float, large: bytes
) -> float:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(after)
    with socket.socket() as own:
        own.setblocking(False)
        if kind == "reader":
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await loop.sock_connect(own, address)
        began = time.monotonic()
        gone = asyncio.ensure_future(_reset(own) if kind == "reader" else _answered(own))
        doing = asyncio.ensure_future(_DOES[kind](own, large))
        try:
            await asyncio.wait_for(gone, patience)
        except TimeoutError:
            return float("inf")
        finally:
            doing.cancel()
            await asyncio.gather(doing, return_exceptions=True)
        return time.monotonic() - began


async def _answered(own: socket.socket) -> None:
    """Until the server has said no, or has gone."""
    with contextlib.suppress(OSError):
        while await asyncio.get_running_loop().sock_recv(own, 4096):
            pass


async def _reset(own: socket.socket) -> None:
    """Until it is cut, without reading a byte of what has come."""
    look = select.poll()
    look.register(own, select.POLLHUP | select.POLLERR)
    while not look.poll(0):  # noqa: ASYNC110
        await asyncio.sleep(0.2)


async def _head(own: socket.socket, large: bytes) -> None:
    await _drip(own, b"POST /generate HTTP/1.1\r\nhost: 127.0.0.1\r\nx-a: ")


async def _body(own: socket.socket, large: bytes) -> None:
    await _drip(
        own, b"POST /generate HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 100000\r\n\r\n"
    )


async def _fast_body(own: socket.socket, large: bytes) -> None:
    head = f"POST /generate HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {2 * FAST}\r\n\r\n"
    with contextlib.suppress(OSError):
        await asyncio.get_running_loop().sock_sendall(own, head.encode() + b"a" * FAST)


async def _reader(own: socket.socket, large: bytes) -> None:
    with contextlib.suppress(OSError):
        await asyncio.get_running_loop().sock_sendall(own, large)


async def _drip(own: socket.socket, start: bytes) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        await loop.sock_sendall(own, start)
        while True:
            await asyncio.sleep(DRIP_SECONDS)
            await loop.sock_sendall(own, b"a")


_DOES = {"head": _head, "body": _body, "fast body": _fast_body, "reader": _reader}


def stalling(address: Address, clients: int) -> Stalled:
    """In a process of its own: what they cost here is no part of what others wait for."""
    return uvloop.run(stall(address, clients, 60, large_replies()))


async def beside(
    address: Address, clients: int, seconds: float, elsewhere: Executor
) -> tuple[Load, Stalled | None]:
    """What honest clients see for so many seconds, with `clients` stalled ones or with none."""
    await asyncio.sleep(1)
    loop = asyncio.get_running_loop()
    crowd = loop.run_in_executor(elsewhere, stalling, address, clients) if clients else None
    load = await closed_loop(address, generate("a question", 16), 4, seconds)
    return load, await crowd if crowd else None


def measure(served: Served, clients: int, seconds: float, rounds: int) -> float:
    """The longest that one was borne, inf for ever; prints what was seen."""
    with ProcessPoolExecutor(1, get_context("spawn")) as elsewhere:
        elsewhere.submit(stalling, ("127.0.0.1", served.port), 0).result()  # it has begun
        return _measure(served, clients, seconds, rounds, elsewhere)


def _measure(
    served: Served, clients: int, seconds: float, rounds: int, elsewhere: Executor
) -> float:
    address = ("127.0.0.1", served.port)
    ratios, longest = [], 0.0
    for _ in range(rounds):
        began = served.cpu_seconds()
        alone, _ = uvloop.run(beside(address, 0, seconds, elsewhere))
        between = served.cpu_seconds()
        crowded, stalled = uvloop.run(beside(address, clients, seconds, elsewhere))
        spent = [between - began, served.cpu_seconds() - between]
        assert stalled is not None
        both = [quantile(load.times(200), 0.99) for load in (alone, crowded)]
        ratios.append(both[1] / both[0])
        longest = max(longest, stalled.longest)
        counts = [len(load.times(200)) for load in (alone, crowded)]
        wrong = [load.statuses + load.lost for load in (alone, crowded)]  # type: ignore[operator]
        print(f"alone {counts[0]} requests, p99 {1e3 * both[0]:.0f} ms; with {clients} stalled")
        print(f"  {counts[1]}, {1e3 * both[1]:.0f} ms, x{ratios[-1]:.2f}; {stalled}; {wrong}")
        print(f"  CPU of the server {spent[0]:.1f} s alone, {spent[1]:.1f} s with them")
    print(f"p99 with over without: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"cut after {longest:.1f} s at most; {served.look()}")
    return longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--base", help="directory of a model; default: a tiny random one")
    asked = parser.parse_args()
    with scratch(asked.base) as (work, base), serving(work / "run", "--base", base) as served:
        longest = measure(served, asked.clients, asked.seconds, asked.rounds)
    sys.exit(0 if longest < CUT_SECONDS else 1)


if __name__ == "__main__":
    main()
