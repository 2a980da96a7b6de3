"""Phases of load: each workload in turn, round after round, and what the server says of each."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from deploy.load.client import Reply, ask
from deploy.load.workloads import BASE, CLOSED, OPEN, Workload, prompt

LOAD = 0.7  # of what the base alone came to: how fast requests arrive where they do not wait
PATIENCE = httpx.Timeout(120.0, connect=10.0)
TIERS = ("slot", "host", "store")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of it."""

    model: str  # what the base is called
    adapters: Sequence[str]
    requests: int
    clients: int
    prompt_words: int
    tokens: int
    rounds: int
    rate: float | None = None  # requests/s; None: LOAD of the base's


@dataclass(frozen=True, slots=True)
class Phase:
    """One workload in one round."""

    workload: Workload
    round: int
    seconds: float
    replies: Sequence[Reply]
    found: Mapping[str, float]  # requests by the tier in which their adapter was
    loads: Sequence[tuple[float, float]]  # (at most so many seconds, loads): cumulative buckets
    distinct: int  # adapters that were asked for

    @property
    def rate(self) -> float:
        """Output tokens each second."""
        return sum(reply.tokens for reply in self.replies if not reply.fault) / self.seconds


async def measure(
    url: str, plan: Plan, headers: Mapping[str, str], told: Callable[[Phase], None]
) -> list[Phase]:
    """All phases. Workloads alternate (A B C, C B A), so that a busy moment hits all alike."""
    phases: list[Phase] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=plan.clients)
    async with httpx.AsyncClient(
        base_url=url, headers=headers, timeout=PATIENCE, limits=limits
    ) as http:
        await ask(http, plan.model, None, "warm", plan.tokens, time.perf_counter())
        for number, workload in _order(plan.rounds):
            rate = plan.rate or _base_rate(phases, plan) * LOAD
            phases.append(await _phase(http, plan, workload, number, rate))
            told(phases[-1])
    return phases


def _order(rounds: int) -> Iterator[tuple[int, Workload]]:
    for number in range(rounds):
        closed = CLOSED if number % 2 == 0 else CLOSED[::-1]
        opened = OPEN if number % 2 == 0 else OPEN[::-1]
        yield from ((number, workload) for workload in (*closed, *opened))


def _base_rate(phases: Sequence[Phase], plan: Plan) -> float:
    """Requests/s of the base alone, whose clients ask one after another."""
    found = [phase for phase in phases if phase.workload is BASE]
    return found[-1].rate / plan.tokens if found else 1.0


async def _phase(
    http: httpx.AsyncClient, plan: Plan, workload: Workload, number: int, rate: float
) -> Phase:
    adapters = workload.adapters(plan.adapters, plan.requests, number)
    arrivals = workload.arrivals(plan.requests, max(rate, 0.01), 2 * plan.clients, number)
    seed = zlib.crc32(f"{workload.name} {number}".encode())
    before = await scrape(http)
    begun = time.perf_counter()

    async def one(index: int, due: float) -> Reply:
        text = prompt(index, plan.prompt_words, seed)
        return await ask(http, plan.model, adapters[index], text, plan.tokens, due)

    if arrivals is None:
        replies = await _closed(one, plan.requests, plan.clients)
    else:
        replies = await _opened(one, [begun + arrival for arrival in arrivals])
    seconds = time.perf_counter() - begun
    after = await scrape(http)
    found, loads = _difference(before, after)
    return Phase(workload, number, seconds, replies, found, loads, len(set(adapters) - {None}))


async def _closed(
    one: Callable[[int, float], Awaitable[Reply]], requests: int, clients: int
) -> list[Reply]:
    replies: list[Reply] = []
    left = iter(range(requests))

    async def client() -> None:
        for index in left:
            replies.append(await one(index, time.perf_counter()))

    await asyncio.gather(*(client() for _ in range(clients)))
    return replies


async def _opened(
    one: Callable[[int, float], Awaitable[Reply]], due: Sequence[float]
) -> list[Reply]:
    """Late is late: a request that could not be sent in time has waited already."""

    async def at(index: int, when: float) -> Reply:
        await asyncio.sleep(max(when - time.perf_counter(), 0))
        return await one(index, when)

    return list(await asyncio.gather(*(at(index, when) for index, when in enumerate(due))))


Series = Mapping[tuple[str, str], float]


async def scrape(http: httpx.AsyncClient) -> Series:
    """What /metrics says of adapters: by name, and by tier or bucket. Nothing where it is shut."""
    response = await http.get("/metrics")
    if response.is_error:
        return {}
    found: defaultdict[tuple[str, str], float] = defaultdict(float)
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            label = sample.labels.get("tier") or sample.labels.get("le") or ""
            found[sample.name, label] += sample.value
    return found


def _difference(
    before: Series, after: Series
) -> tuple[dict[str, float], list[tuple[float, float]]]:
    change = {key: value - before.get(key, 0.0) for key, value in after.items()}
    found = {tier: change.get(("nibble:adapter_lookups_total", tier), 0.0) for tier in TIERS}
    buckets = [
        (float(label), value)
        for (name, label), value in change.items()
        if name == "nibble:adapter_load_seconds_bucket"
    ]
    return found, sorted(buckets)
