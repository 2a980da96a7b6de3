"""Who is measured at what, in which order: A B A B, so that a busy moment hits all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from service.bench import llama_peer, peft_peer, server_peers, transformers_peer
from service.bench.nibble_peer import ENGINE, LOOKUP
from service.bench.peer import PeerFailed, PeerProcess
from service.bench.scenario import (
    BASE,
    CHAT,
    DISTINCT,
    DORA,
    NONE,
    ONE,
    PREFILL,
    SAME,
    Round,
    Scenario,
    job,
)

NIBBLE, PEFT, LLAMA = "nibble", "peft", "llama.cpp"
TRANSFORMERS = "transformers"
NIBBLE_SERVER, LLAMA_SERVER = "nibble serve", "llama-server"
SLOW = (PEFT, TRANSFORMERS)  # peers that dequantise every weight for every step
BARE = ", nothing registered"  # ends the name of a nibble that was never given an adapter
WARM_UP_TOKENS = 4

# What a peer cannot do, or does not finish in minutes, has no row: PEFT mixes no kinds over NF4,
# and recomputes DoRA's norms of dequantised weights for each token; llama.cpp serves LoRA only.
PEFT_WAYS: Mapping[Scenario, tuple[str, ...]] = {
    BASE: (peft_peer.ONE_BY_ONE,),
    ONE: (peft_peer.ONE_BY_ONE,),
    SAME: (peft_peer.ONE_BATCH,),
    DISTINCT: (peft_peer.ONE_BY_ONE, peft_peer.MIXED),
    NONE: (peft_peer.ONE_BATCH,),
    PREFILL: (peft_peer.ONE_BY_ONE,),
}
LLAMA_WAYS: Mapping[Scenario, tuple[str, ...]] = {
    BASE: (llama_peer.ONE_BATCH,),
    ONE: (llama_peer.ONE_BATCH,),
    SAME: (llama_peer.ONE_BATCH,),
    DISTINCT: (llama_peer.ONE_BY_ONE,),
    NONE: (llama_peer.ONE_BATCH,),
    PREFILL: (llama_peer.ONE_BATCH,),
    CHAT: (llama_peer.ONE_BATCH,),
}
TRANSFORMERS_WAYS: Mapping[Scenario, tuple[str, ...]] = {
    BASE: (transformers_peer.CONTINUOUS,),
    NONE: (transformers_peer.CONTINUOUS,),
    PREFILL: (transformers_peer.CONTINUOUS,),
}
SERVER_WAYS: Mapping[Scenario, tuple[str, ...]] = {
    ONE: (server_peers.OVER_HTTP,),
    SAME: (server_peers.OVER_HTTP,),
    DISTINCT: (server_peers.OVER_HTTP,),
}
WAYS = {
    PEFT: PEFT_WAYS,
    LLAMA: LLAMA_WAYS,
    TRANSFORMERS: TRANSFORMERS_WAYS,
    NIBBLE_SERVER: SERVER_WAYS,
    LLAMA_SERVER: SERVER_WAYS,
}


@dataclass(frozen=True, slots=True)
class Contestant:
    """One row of the table: a peer serving a scenario in one of its ways."""

    scenario: Scenario
    peer: str
    way: str

    @property
    def ours(self) -> bool:
        """Is it this server as people run it, with its adapters?"""
        return self.peer.startswith(NIBBLE) and not self.peer.endswith(BARE)

    @property
    def over_http(self) -> bool:
        """Is it a server, asked over HTTP? Such rows are compared with each other only."""
        return self.way == server_peers.OVER_HTTP


# A target rests on this row, and it is one batch: of a slow peer, but not slow.
DECISIVE = Contestant(DISTINCT, PEFT, peft_peer.MIXED)


def ways_of(peer: str, scenario: Scenario) -> tuple[str, ...]:
    """The ways in which this peer serves the scenario; none: it takes no part."""
    if peer in WAYS:
        return WAYS[peer].get(scenario, ())
    if peer.endswith(BARE) and scenario != NONE:
        return ()
    return (ENGINE, LOOKUP) if scenario.quoted else (ENGINE,)


def contestants(scenarios: Sequence[Scenario], peers: Sequence[str]) -> list[Contestant]:
    """Every peer in each of its ways, scenario by scenario."""
    return [
        Contestant(scenario, peer, way)
        for scenario in scenarios
        for peer in peers
        for way in ways_of(peer, scenario)
    ]


def own_rows(rows: Sequence[Contestant], precision: str) -> list[Contestant]:
    """Those that are compared with each other, of one nibble with adapters and without: short
    ones, measured once more next to each other, since they differ by little."""
    peer = f"{NIBBLE} {precision}"
    mine = (peer, f"{peer}{BARE}")
    return [row for row in rows if row.peer in mine and row.scenario in (DISTINCT, NONE, DORA)]


def measure(
    rows: Sequence[Contestant],
    peers: Mapping[str, PeerProcess],
    *,
    rounds: Mapping[Contestant, int],
    vocabulary: int,
    prompt_tokens: int,
    new_tokens: int,
    report: Callable[[Contestant], None],
    failed: dict[str, str],
    until: float = math.inf,
    first: int = 0,
) -> dict[Contestant, list[Round]]:
    """`rounds[row]` of each row, after a short one that is not counted; `report` hears of each.

    Every row has its first round; no other begins after `until` (of time.monotonic). One of the
    others that fails is left out of all, and `failed` says why; nibble may not fail. Numbers of
    rounds begin with `first`, where these peers have had others: no prompt may come twice.
    """
    found: dict[Contestant, list[Round]] = {row: [] for row in rows}
    for number, row in order(rows, rounds):
        if number > 1 and time.monotonic() > until:
            break
        if row.peer in failed:
            continue
        asked = job(row.scenario, first + number, vocabulary, prompt_tokens, new_tokens)
        if number == 0:
            asked = asked.shortened(WARM_UP_TOKENS)
        try:
            result = peers[row.peer].run(asked, row.way)
        except PeerFailed as error:
            if row.peer.startswith(NIBBLE):
                raise
            failed[row.peer] = error.reason
            continue
        if number > 0:
            found[row].append(result)
        report(row)
    return {row: each for row, each in found.items() if each and row.peer not in failed}


def order(
    rows: Sequence[Contestant], rounds: Mapping[Contestant, int]
) -> Iterator[tuple[int, Contestant]]:
    """Round 0 warms up. All rows of a round follow each other; every other round runs backwards,
    so that none is always the one after another's heat.

    A slow peer has one row warmed up for all: it takes many seconds for each and gains nothing.
    """
    warmed = set()
    for number in range(max(rounds.values(), default=0) + 1):
        for row in rows if number % 2 == 0 else reversed(rows):
            if number > rounds[row]:
                continue
            if number == 0 and row.peer in SLOW and row.peer in warmed:
                continue
            warmed.add(row.peer)
            yield number, row
