"""A fleet, event by event: requests arrive, a router picks a replica, replicas take steps.

A replica does what the engine does: running sequences first, then chunks of prompts while tokens
last; a sequence begins when its blocks are free and its adapter is in a slot; cold adapters load
beside the steps, one after another, and leave in order of last use. Steps in which nothing changes
are taken as one event, so that thousands of replicas take seconds.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from service.plan.calibration import MAX_STEP_TOKENS, StepCost, Work
from service.plan.rendezvous import rendezvous

# adapter: to the least busy one of those that have it; least-busy: whoever has it; rendezvous: to
# the one that its hash says, as deploy/ray does.
Routing = Literal["adapter", "least-busy", "rendezvous"]
SLACK = 1.25  # how much busier than the least busy one a replica with the adapter may be


@dataclass(frozen=True, slots=True)
class Traffic:
    """Poisson arrivals; adapter k of N is chosen with probability proportional to 1/k^zipf."""

    rate: float  # requests/s
    adapters: int  # 0: the base alone
    zipf: float
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Server:
    """One replica."""

    cost: StepCost
    kv_tokens: int  # that its cache has room for
    slots: int  # adapters
    load_seconds: float  # of a cold adapter
    max_sequences: int = 64
    max_step_tokens: int = MAX_STEP_TOKENS
    max_waiting: int = 1024


@dataclass(slots=True)
class Request:
    """What a replica has to do for one."""

    arrived: float
    adapter: int  # -1: the base
    prompt: int  # tokens left to read
    left: int  # tokens left to generate
    tokens: int  # that its blocks must hold
    counted: bool  # beyond the time in which the fleet warms up


@dataclass(slots=True)
class Measured:
    """What came of the requests that count. Times are in seconds."""

    first: list[float] = field(default_factory=list)
    gaps: list[tuple[float, int]] = field(default_factory=list)  # and how often
    whole: list[float] = field(default_factory=list)  # from a request's arrival to its end
    finished: int = 0
    tokens: int = 0
    cold: int = 0  # requests whose adapter was not in a slot when they came
    end: float = 0.0  # when the last one finished
    busy: float = 0.0  # of all steps and replicas, also of requests that do not count
    refused: bool = False  # a queue was full, and the rest was not looked at


class Replica:
    """Its steps; `wake` is when the one that runs, or the run of equal ones, ends."""

    def __init__(self, server: Server, measured: Measured) -> None:
        self._server, self._measured = server, measured
        self._waiting: deque[Request] = deque()
        self._reading: list[Request] = []
        self._running: list[Request] = []
        self._free = server.kv_tokens
        # adapter -> ready from; the one that was used longest ago is the first
        self.resident: OrderedDict[int, float] = OrderedDict()
        self._loads_end = 0.0
        self._begun, self._step, self._steps = 0.0, 0.0, 0  # steps 0: idle
        self._chunks: list[tuple[Request, int]] = []

    def arrive(self, now: float, request: Request) -> float | None:
        """When it wants to be woken, where that has changed."""
        self._measured.cold += request.counted and not self._ready(request.adapter, now)
        self._waiting.append(request)
        self._fetch(now)
        if self._steps == 0:
            return self._next(now)
        if self._steps > 1:  # the newcomer is looked at when the step that runs has ended
            self._steps = max(1, math.ceil((now - self._begun) / self._step))
            return self._begun + self._steps * self._step
        return None

    def wake(self, now: float) -> tuple[float | None, int]:
        """End what ran; when the next one ends, and how many requests finished."""
        done = self._end(now) if self._steps else 0
        return self._next(now), done

    def _end(self, now: float) -> int:
        measured = self._measured
        measured.busy += self._steps * self._step
        counted = sum(1 for each in self._running if each.counted)
        if counted:
            measured.gaps.append((self._step, counted * self._steps))
            measured.tokens += counted * self._steps
        for each in self._running:
            each.left -= self._steps
        for each, tokens in self._chunks:
            each.prompt -= tokens
            if each.prompt == 0:
                self._reading.remove(each)
                self._running.append(each)
                each.left -= 1
                if each.counted:
                    measured.first.append(now - each.arrived)
                    measured.tokens += 1
        over = [each for each in self._running if each.left == 0]
        if over:
            measured.end = max(measured.end, now)
            self._running = [each for each in self._running if each.left]
            self._free += sum(each.tokens for each in over)
            whole = [now - each.arrived for each in over if each.counted]
            measured.whole += whole
            measured.finished += len(whole)
        self._steps = 0
        return len(over)

    def _next(self, now: float) -> float | None:
        """Begin a step; when it ends, or when an adapter that is waited for is there."""
        self._fetch(now)
        self._admit(now)
        room = self._server.max_step_tokens - len(self._running)
        self._chunks = []
        for each in self._reading:
            if room <= 0:
                break
            self._chunks.append((each, min(each.prompt, room)))
            room -= self._chunks[-1][1]
        if not self._running and not self._chunks:
            ready = [self.resident.get(each.adapter, math.inf) for each in self._waiting]
            return min((at for at in ready if at > now), default=None)
        used = [each.adapter for each in self._running if each.adapter >= 0]
        read = {each.adapter for each, _ in self._chunks if each.adapter >= 0}
        prompt = sum(tokens for _, tokens in self._chunks)
        of_adapters = sum(tokens for each, tokens in self._chunks if each.adapter >= 0)
        work = Work(len(self._running), len(used), len(read.union(used)), prompt, of_adapters)
        self._begun = now
        self._step = self._server.cost.seconds(work)
        self._steps = 1
        if not self._chunks and not self._waiting:
            self._steps = min(each.left for each in self._running)
        return now + self._steps * self._step

    def _admit(self, now: float) -> None:
        held: deque[Request] = deque()
        while self._waiting:
            each = self._waiting.popleft()
            full = len(self._running) + len(self._reading) >= self._server.max_sequences
            if full or each.tokens > self._free:
                held.append(each)
                break  # nobody overtakes one that waits for blocks
            if not self._ready(each.adapter, now):
                held.append(each)
                continue
            self._free -= each.tokens
            self._reading.append(each)
            if each.adapter >= 0:
                self.resident.move_to_end(each.adapter)
        self._waiting.extendleft(reversed(held))

    def _fetch(self, now: float) -> None:
        """Order what the waiting ones need, while slots last that nobody uses."""
        for each in self._waiting:
            if each.adapter < 0 or each.adapter in self.resident:
                continue
            if len(self.resident) >= self._server.slots and not self._evict():
                return
            self._loads_end = max(now, self._loads_end) + self._server.load_seconds
            self.resident[each.adapter] = self._loads_end

    def _evict(self) -> bool:
        queues = (self._waiting, self._reading, self._running)
        needed = {each.adapter for queue in queues for each in queue}
        gone = next((each for each in self.resident if each not in needed), None)
        if gone is None:
            return False
        del self.resident[gone]
        return True

    def _ready(self, adapter: int, now: float) -> bool:
        return adapter < 0 or self.resident.get(adapter, math.inf) <= now


def simulate(
    traffic: Traffic, server: Server, replicas: int, routing: Routing, requests: int, seed: int = 0
) -> Measured:
    """So many requests, to their ends; the first tenth warms up and is not counted."""
    return replay(arrivals(traffic, requests, seed), server, replicas, routing)


def replay(
    requests: Sequence[Request], server: Server, replicas: int, routing: Routing
) -> Measured:
    """These requests, in the order of their arrival."""
    measured = Measured()
    fleet = [Replica(server, measured) for _ in range(replicas)]
    busy = np.zeros(replicas, dtype=np.int64)  # requests that are there
    homes: dict[int, list[int]] = {}  # adapter -> replicas that were sent one, newest last
    expected: list[float | None] = [None] * replicas
    wakes: list[tuple[float, int]] = []

    def note(number: int, at: float | None) -> None:
        expected[number] = at
        if at is not None:
            heapq.heappush(wakes, (at, number))

    def run_until(time: float) -> None:
        while wakes and wakes[0][0] <= time:
            at, number = heapq.heappop(wakes)
            if expected[number] != at:
                continue  # it was told otherwise since
            following, done = fleet[number].wake(at)
            busy[number] -= done
            note(number, following)

    for each in requests:
        run_until(each.arrived)
        number = _route(each.adapter, fleet, busy, homes, routing, server.max_sequences)
        busy[number] += 1
        if busy[number] > server.max_sequences + server.max_waiting:
            measured.refused = True
            return measured
        changed = fleet[number].arrive(each.arrived, each)
        if changed is not None:
            note(number, changed)
    run_until(math.inf)
    assert not busy.any(), "requests were left over"
    return measured


def _route(
    adapter: int,
    fleet: Sequence[Replica],
    busy: np.ndarray[tuple[int], np.dtype[np.int64]],
    homes: dict[int, list[int]],
    routing: Routing,
    full: int,
) -> int:
    least = int(busy.argmin())
    if routing == "least-busy" or adapter < 0:
        return least
    if routing == "rendezvous":
        if adapter not in homes:
            homes[adapter] = rendezvous(adapter, range(len(fleet)))
        return next((number for number in homes[adapter] if busy[number] < full), least)
    known = [number for number in homes.get(adapter, ()) if adapter in fleet[number].resident]
    best = min(known, key=lambda number: int(busy[number]), default=None)
    if best is not None and busy[best] <= SLACK * busy[least]:
        homes[adapter] = known
        return best
    homes[adapter] = [*known, least]
    return least


def arrivals(traffic: Traffic, requests: int, seed: int) -> list[Request]:
    """So many; the first tenth does not count."""
    chance = random.Random(seed)
    weights = [1 / (place + 1) ** traffic.zipf for place in range(traffic.adapters)]
    picked = (
        chance.choices(range(traffic.adapters), weights, k=requests)
        if traffic.adapters
        else [-1] * requests
    )
    time, found = 0.0, []
    for number, adapter in enumerate(picked):
        time += chance.expovariate(traffic.rate)
        total = traffic.prompt_tokens + traffic.new_tokens
        counted = number >= requests // 10
        found.append(
            Request(time, adapter, traffic.prompt_tokens, traffic.new_tokens, total, counted)
        )
    return found
