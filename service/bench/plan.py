"""Who is measured at what, in which order: A B A B, so that a busy moment hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from service.bench.nibble_peer import ENGINE
from service.bench.peer import PeerProcess
from service.bench.peft_peer import MIXED, ONE_BATCH, ONE_BY_ONE
from service.bench.scenario import BASE, DISTINCT, ONE, SAME, Round, Scenario, job

NIBBLE = "nibble"
PEFT_WAYS = {
    BASE: (ONE_BY_ONE,),
    ONE: (ONE_BY_ONE,),
    SAME: (ONE_BATCH,),
    DISTINCT: (ONE_BY_ONE, MIXED),
}


@dataclass(frozen=True, slots=True)
class Contestant:
    """One row of the table: a peer serving a scenario in one of its ways."""

    scenario: Scenario
    peer: str
    way: str


def contestants(scenarios: Sequence[Scenario], peers: Sequence[str]) -> list[Contestant]:
    """Every peer in each of its ways, scenario by scenario."""
    return [
        Contestant(scenario, peer, way)
        for scenario in scenarios
        for peer in peers
        for way in ((ENGINE,) if peer == NIBBLE else PEFT_WAYS[scenario])
    ]


def measure(
    rows: Sequence[Contestant],
    peers: Mapping[str, PeerProcess],
    *,
    rounds: int,
    vocabulary: int,
    prompt_tokens: int,
    new_tokens: int,
    report: Callable[[Contestant], None],
) -> dict[Contestant, list[Round]]:
    """`rounds` of each row after one that is not counted; `report` hears of each try."""
    found: dict[Contestant, list[Round]] = {row: [] for row in rows}
    for number, row in _order(rows, rounds):
        asked = job(row.scenario, number, vocabulary, prompt_tokens, new_tokens)
        result = peers[row.peer].run(asked, row.way)
        if number > 0:
            found[row].append(result)
        report(row)
    return found


def _order(rows: Sequence[Contestant], rounds: int) -> Iterator[tuple[int, Contestant]]:
    """Round 0 warms up. All rows of a round follow each other; every other round runs backwards,
    so that none is always the one after another's heat."""
    for number in range(rounds + 1):
        yield from ((number, row) for row in (rows if number % 2 == 0 else reversed(rows)))
