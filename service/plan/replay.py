"""How far off the simulation is: the bench's own workloads, replayed, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.bench.scenario import DISTINCT, NONE, SAME
from service.plan.calibration import Calibration
from service.plan.simulation import Request, Server, replay

REPLAYED = (NONE, SAME, DISTINCT)


def rate_errors(figures: Mapping[str, Any], known: Calibration) -> dict[str, float]:
    """Workload -> the simulated rate over the measured one, less 1. Adapters are in their slots."""
    prompt, new = int(figures["prompt_tokens"]), int(figures["new_tokens"])
    server = Server(known.cost, known.kv_cache_bytes // known.token_bytes, 64, 0.0)
    measured = {
        row["scenario"]: row["tokens_per_second"]
        for row in figures["results"]
        if row["peer"] == known.peer
    }
    found = {}
    for scenario in REPLAYED:
        requests = [
            Request(0.0, -1 if adapter is None else adapter, prompt, new, prompt + new, True)
            for adapter in scenario.adapters
        ]
        done = replay(requests, server, 1, "least-busy")
        rate = done.tokens / done.end
        found[scenario.name] = rate / measured[scenario.name] - 1
    return found
