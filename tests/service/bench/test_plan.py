from __future__ import annotations

from dataclasses import replace

import pytest

from base.mini import MINI
from service.bench.nibble_peer import ENGINE, LOOKUP
from service.bench.options import Options
from service.bench.peer import PeerFailed
from service.bench.plan import BARE, Contestant, contestants, measure, order, own_rows
from service.bench.scenario import (
    COPYING,
    DISTINCT,
    DORA,
    FULL,
    MANY,
    NONE,
    ONE,
    QUICK,
    SAME,
    Job,
    Round,
)

PEERS = ("nibble", "peft")
FAST = "nibble fast"


class Recorder:
    """In a peer's place: keeps what it was asked."""

    def __init__(self, name: str, asked: list[tuple[str, str, Job]]) -> None:
        self.name = name
        self.asked = asked

    def run(self, job: Job, way: str) -> Round:
        self.asked.append((self.name, way, job))
        return Round(1.0, len(self.asked), (0.5,), (0.1,))


def test_every_peer_serves_every_scenario_and_peft_both_ways_where_adapters_differ() -> None:
    rows = contestants(QUICK, PEERS)
    assert {(row.scenario, row.peer) for row in rows} == {
        (scenario, peer) for scenario in QUICK for peer in PEERS
    }
    ways = [row.way for row in rows if row.scenario == DISTINCT and row.peer == "peft"]
    assert ways == ["set_adapter, one by one", "adapter_names, mixed batch"]


def test_who_takes_part_in_what() -> None:
    rows = contestants(FULL, [FAST, FAST + BARE, "peft", "llama.cpp"])
    taking = {scenario: {row.peer for row in rows if row.scenario == scenario} for scenario in FULL}
    assert taking[MANY] == taking[DORA] == {FAST}
    assert taking[NONE] == {FAST, FAST + BARE, "peft", "llama.cpp"}
    assert [row.scenario for row in rows if row.peer == FAST + BARE] == [NONE]
    assert {row.peer for row in rows if row.ours} == {FAST}


def test_peers_that_are_slow_and_further_precisions_have_fewer_rounds() -> None:
    asked = Options("mini", MINI, FULL, 3, 64, 32, 2, (), ("fast", "exact"), slow_rounds=1)
    once = ("nibble exact", "nibble exact" + BARE, "peft", "transformers")
    thrice = (FAST, FAST + BARE, "nibble serve", "llama.cpp", "llama-server")
    for row in contestants(FULL, [*once, *thrice]):
        slow = row.peer in once and row.way != "adapter_names, mixed batch"
        assert asked.rounds_of(row) == (1 if slow else 3), row
    exact = replace(asked, precisions=("exact",))
    assert exact.rounds_of(Contestant(ONE, "nibble exact", ENGINE)) == 3


def test_own_rows_are_those_of_one_precision_that_differ_by_little() -> None:
    peers = [FAST, FAST + BARE, "nibble exact", "nibble exact" + BARE, "nibble serve", "peft"]
    rows = own_rows(contestants(FULL, peers), "fast")
    assert [(row.scenario, row.peer) for row in rows] == [
        (DISTINCT, FAST),
        (NONE, FAST),
        (NONE, FAST + BARE),
        (DORA, FAST),
    ]


def test_nobody_takes_part_where_only_starts_are_asked_for() -> None:
    assert list(order([], {})) == []


def test_transformers_serves_no_adapters_and_servers_are_asked_over_http() -> None:
    rows = contestants(FULL, ["nibble fast", "transformers", "nibble serve", "llama-server"])
    adapters = {a for row in rows if row.peer == "transformers" for a in row.scenario.adapters}
    assert adapters == {None}
    over_http = {row.peer for row in rows if row.over_http}
    assert over_http == {"nibble serve", "llama-server"}
    scenarios = [{row.scenario for row in rows if row.peer == peer} for peer in over_http]
    assert scenarios[0] == scenarios[1] == {ONE, SAME, DISTINCT}


def test_only_ours_is_told_what_to_say_with_prompt_lookup_and_without() -> None:
    rows = contestants([COPYING], [FAST, FAST + BARE, "peft", "llama.cpp", "transformers"])
    assert [(row.peer, row.way) for row in rows] == [(FAST, ENGINE), (FAST, LOOKUP)]


def test_a_slow_peer_takes_fewer_rounds_and_is_warmed_up_once() -> None:
    rows = contestants(QUICK, PEERS)
    turns = list(order(rows, {row: 3 if row.peer == "nibble" else 1 for row in rows}))
    for row in rows:
        counted = [number for number, other in turns if other == row and number > 0]
        assert counted == ([1, 2, 3] if row.peer == "nibble" else [1])
    warm = [row for number, row in turns if number == 0]
    assert [row.peer for row in warm].count("peft") == 1
    assert [row.peer for row in warm].count("nibble") == len(QUICK)


def test_every_row_has_a_round_and_no_second_one_begins_when_the_time_is_up() -> None:
    asked: list[tuple[str, str, Job]] = []
    rows = contestants([ONE, DISTINCT], PEERS)
    found = measure(
        rows,
        {name: Recorder(name, asked) for name in PEERS},  # type: ignore[misc]
        rounds=dict.fromkeys(rows, 3),
        vocabulary=100,
        prompt_tokens=3,
        new_tokens=2,
        report=lambda row: None,
        failed={},
        until=0.0,
    )
    assert [len(found[row]) for row in rows] == [1] * len(rows)


def test_the_warm_up_is_short() -> None:
    asked: list[tuple[str, str, Job]] = []
    rows = contestants([ONE], ["nibble"])
    measure(
        rows,
        {"nibble": Recorder("nibble", asked)},  # type: ignore[dict-item]
        rounds=dict.fromkeys(rows, 1),
        vocabulary=100,
        prompt_tokens=3,
        new_tokens=30,
        report=lambda row: None,
        failed={},
    )
    assert [job.new_tokens for _, _, job in asked] == [4, 30]
    measure(
        rows,
        {"nibble": Recorder("nibble", asked)},  # type: ignore[dict-item]
        rounds=dict.fromkeys(rows, 1),
        vocabulary=100,
        prompt_tokens=3,
        new_tokens=30,
        report=lambda row: None,
        failed={},
        first=1000,
    )
    assert len({job.prompts for _, _, job in asked}) == 4  # none twice: the prefix cache has it


def test_peers_take_turns_on_the_same_prompts_and_the_first_round_is_not_counted() -> None:
    asked: list[tuple[str, str, Job]] = []
    rows = contestants([ONE], PEERS)
    heard: list[Contestant] = []
    found = measure(
        rows,
        {name: Recorder(name, asked) for name in PEERS},  # type: ignore[misc]
        rounds=dict.fromkeys(rows, 2),
        vocabulary=100,
        prompt_tokens=3,
        new_tokens=2,
        report=heard.append,
        failed={},
    )
    assert [name for name, _, _ in asked] == [*PEERS, *reversed(PEERS), *PEERS]
    assert [a[2] == b[2] for a, b in zip(asked[::2], asked[1::2], strict=True)] == [True] * 3
    assert [len(rounds) for rounds in found.values()] == [2, 2]
    assert [each.tokens for each in found[rows[0]]] == [4, 5]  # of its second and third try
    assert len(heard) == 6


def test_another_that_fails_is_left_out_and_nibble_may_not_fail() -> None:
    class Failing(Recorder):
        def run(self, job: Job, way: str) -> Round:
            done = super().run(job, way)
            if [name for name, _, _ in self.asked].count(self.name) > 2:
                raise PeerFailed(f"{self.name}:\nTraceback\nRuntimeError: out of pages")
            return done

    def run(failing: str, failed: dict[str, str]) -> dict[Contestant, list[Round]]:
        asked: list[tuple[str, str, Job]] = []
        rows = contestants([ONE], PEERS)
        return measure(
            rows,
            {
                name: (Failing if name == failing else Recorder)(name, asked)  # type: ignore[misc]
                for name in PEERS
            },
            rounds=dict.fromkeys(rows, 3),
            vocabulary=100,
            prompt_tokens=3,
            new_tokens=2,
            report=lambda row: None,
            failed=failed,
        )

    failed: dict[str, str] = {}
    assert {row.peer for row in run("peft", failed)} == {"nibble"}
    assert failed == {"peft": "RuntimeError: out of pages"}
    with pytest.raises(PeerFailed, match="out of pages"):
        run("nibble", {})
