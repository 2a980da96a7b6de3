"""The fewest replicas with which a load meets its targets, and what they need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from service.plan.calibration import Calibration
from service.plan.simulation import Measured, Routing, Server, Traffic, simulate

MAX_REPLICAS = 4096
LEAST_REQUESTS, REQUESTS_PER_REPLICA = 2000, 40  # of one simulation


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

    def meets(self, targets: Targets) -> bool:
        return (
            not self.refused
            and self.first_token_p99 <= targets.first_token
            and self.inter_token_p99 <= targets.inter_token
        )


def outcome(traffic: Traffic, server: Server, replicas: int, routing: Routing) -> Outcome:
    requests = max(LEAST_REQUESTS, REQUESTS_PER_REPLICA * replicas)
    return summary(replicas, simulate(traffic, server, replicas, routing, requests))


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
    """Doubled until the targets are met, then halved in between. Raises NoFleet."""

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
    below, above = 0, tried(1)
    while not above.meets(targets):
        below = above.replicas
        if below >= MAX_REPLICAS:
            raise NoFleet(f"{MAX_REPLICAS} replicas do not meet the targets")
        above = tried(2 * below)
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
