from __future__ import annotations

from service.bench.plan import Contestant, contestants, measure
from service.bench.scenario import DISTINCT, ONE, SCENARIOS, Job, Round

PEERS = ("nibble", "peft")


class Recorder:
    """In a peer's place: keeps what it was asked."""

    def __init__(self, name: str, asked: list[tuple[str, str, Job]]) -> None:
        self.name = name
        self.asked = asked

    def run(self, job: Job, way: str) -> Round:
        self.asked.append((self.name, way, job))
        return Round(1.0, len(self.asked), (0.5,), (0.1,))


def test_every_peer_serves_every_scenario_and_peft_both_ways_where_adapters_differ() -> None:
    rows = contestants(SCENARIOS, PEERS)
    assert {(row.scenario, row.peer) for row in rows} == {
        (scenario, peer) for scenario in SCENARIOS for peer in PEERS
    }
    ways = [row.way for row in rows if row.scenario == DISTINCT and row.peer == "peft"]
    assert ways == ["set_adapter, one by one", "adapter_names, mixed batch"]


def test_peers_take_turns_on_the_same_prompts_and_the_first_round_is_not_counted() -> None:
    asked: list[tuple[str, str, Job]] = []
    rows = contestants([ONE], PEERS)
    heard: list[Contestant] = []
    found = measure(
        rows,
        {name: Recorder(name, asked) for name in PEERS},  # type: ignore[misc]
        rounds=2,
        vocabulary=100,
        prompt_tokens=3,
        new_tokens=2,
        report=heard.append,
    )
    assert [name for name, _, _ in asked] == [*PEERS, *reversed(PEERS), *PEERS]
    assert [a[2] == b[2] for a, b in zip(asked[::2], asked[1::2], strict=True)] == [True] * 3
    assert [len(rounds) for rounds in found.values()] == [2, 2]
    assert [each.tokens for each in found[rows[0]]] == [4, 5]  # of its second and third try
    assert len(heard) == 6
