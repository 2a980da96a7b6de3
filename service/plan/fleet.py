"""The fewest replicas with which a load meets its targets, and what they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from service.plan.calibration import Calibration
from service.plan.simulation import Measured, Routing, Server, Traffic, arrivals, replay, simulate

MAX_REPLICAS = 4096
# Of one simulation: of each replica 300 where that is not more in all than the second, and never
# less than 40. A queue that is nearly full takes that long to show what it comes to.
LEAST_REQUESTS, MANY_REQUESTS = 2000, 30_000
REQUESTS_PER_REPLICA, LEAST_PER_REPLICA = 300, 40
AT_ONCE, PROMPT_TOKENS_AT_ONCE = 1280, 10**8  # of the one that asks what a replica can do


class NoFleet(ValueError):
    """No number of replicas meets the targets; the message says why."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Bounds of the 99th percentiles, in seconds."""

    first_token: float
    inter_token: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulation of so many replicas came to."""

    replicas: int
    refused: bool
    first_token_p50: float
    first_token_p99: float
    inter_token_p50: float
    inter_token_p99: float
    cold_rate: float  # requests whose adapter was in no slot of their replica
    load: float = 0.0  # the traffic, of what so many replicas do at most

    def meets(self, targets: Targets) -> bool:
        """From a load of 1 on a queue grows for ever, however short a simulation has seen it."""
        return (
            not self.refused
            and self.load < 1
            and self.first_token_p99 <= targets.first_token
            and self.inter_token_p99 <= targets.inter_token
        )


def outcome(traffic: Traffic, server: Server, replicas: int, routing: Routing) -> Outcome:
    requests = max(
        LEAST_REQUESTS,
        LEAST_PER_REPLICA * replicas,
        min(REQUESTS_PER_REPLICA * replicas, MANY_REQUESTS),
    )
    found = summary(replicas, simulate(traffic, server, replicas, routing, requests))
    return replace(found, load=traffic.rate / (replicas * most(traffic, server)))


def most(traffic: Traffic, server: Server) -> float:
    """Requests/s of a replica that is never short of them, all adapters in its slots."""
    count = min(AT_ONCE, max(server.max_sequences, PROMPT_TOKENS_AT_ONCE // traffic.prompt_tokens))
    due = [replace(each, arrived=0.0, counted=True) for each in arrivals(traffic, count, 0)]
    roomy = replace(server, slots=traffic.adapters + 1, load_seconds=0.0, max_waiting=count)
    return count / replay(due, roomy, 1, "least-busy").end


def summary(replicas: int, measured: Measured) -> Outcome:
    if measured.refused:
        infinite = float("inf")
        return Outcome(replicas, True, infinite, infinite, infinite, infinite, 0.0)
    first = [(each, 1) for each in measured.first]
    return Outcome(
        replicas,
        False,
        percentile(first, 0.5),
        percentile(first, 0.99),
        percentile(measured.gaps, 0.5),
        percentile(measured.gaps, 0.99),
        measured.cold / max(1, measured.finished),
    )


def percentile(values: Iterable[tuple[float, int]], part: float) -> float:
    """Of (value, how often): the smallest that `part` of all do not exceed; 0 where none is."""
    found = sorted(values)
    need = part * sum(count for _, count in found)
    for value, count in found:
        need -= count
        if need <= 1e-9:
            return value
    return 0.0


def fewest(
    traffic: Traffic,
    server: Server,
    targets: Targets,
    routing: Routing,
    told: Callable[[Outcome], None] = lambda found: None,
) -> Outcome:
    """Doubled from what the load takes at least until the targets are met, then halved in between.
    Raises NoFleet."""

    def tried(replicas: int) -> Outcome:
        found = outcome(traffic, server, replicas, routing)
        told(found)
        return found

    # One request alone on a warm replica: more replicas make nothing faster than that.
    alone = Traffic(1e-6, min(1, traffic.adapters), 0.0, traffic.prompt_tokens, traffic.new_tokens)
    bound = summary(1, simulate(alone, server, 1, routing, 20))
    if not bound.meets(targets):
        raise NoFleet(
            f"a request that is alone has its first token after {bound.first_token_p99:.3f} s and "
            f"each later one after {bound.inter_token_p99:.3f} s: no number of replicas reaches "
            f"{targets.first_token:g} s and {targets.inter_token:g} s"
        )
    each = most(traffic, server)
    below = math.floor(traffic.rate / each)
    if below >= MAX_REPLICAS:
        raise NoFleet(
            f"a replica does {each:.3g} requests/s at most: {MAX_REPLICAS} are too few for "
            f"{traffic.rate:g}"
        )
    above = tried(below + 1)
    while not above.meets(targets):
        below = above.replicas
        if below >= MAX_REPLICAS:
            raise NoFleet(f"{MAX_REPLICAS} replicas do not meet the targets")
        above = tried(min(2 * below, MAX_REPLICAS))
    while above.replicas - below > 1:
        middle = tried((above.replicas + below) // 2)
        if middle.meets(targets):
            above = middle
        else:
            below = middle.replicas
    return above


def memory_bytes(calibration: Calibration, slots: int) -> int:
    """Of one replica, all caches full."""
    caches = calibration.kv_cache_bytes + slots * calibration.adapter_bytes
    return calibration.base_bytes + caches
