"""The table of targets: whom each compares, and when it says yes."""

from __future__ import annotations

from typing import Any

import pytest

from service.bench.plan import BARE, Contestant
from service.bench.scenario import BASE, DISTINCT, NONE, ONE, Round, Scenario
from service.bench.targets import reached, targets_of

FAST = "nibble fast"
Found = dict[Contestant, list[Round]]


def _rounds(*seconds: float, gap: float = 0.1) -> list[Round]:
    return [Round(each, 60, (0.1,), (gap,) * 3) for each in seconds]


def _row(found: Found, what: str, number: int = 0) -> dict[str, Any]:
    return [row for row in reached(found, "fast", None, [], {}) if row["what"] == what][number]


def _found(*rows: tuple[Scenario, str, str, list[Round]]) -> Found:
    return {Contestant(scenario, peer, way): rounds for scenario, peer, way, rounds in rows}


def test_every_target_has_a_row_and_nothing_measured_is_not_reached() -> None:
    rows = reached({}, "fast", None, [], {})
    assert len(rows) == len(targets_of("fast")) == 8
    assert {row["reached"] for row in rows} == {None}


def test_decoding_compares_the_times_between_tokens() -> None:
    found = _found(
        (BASE, FAST, "engine", _rounds(1.0, 1.0, gap=0.04)),
        (BASE, "llama.cpp", "one batch", _rounds(9.0, 9.0, gap=0.03)),
    )
    row = _row(found, "1 request, no adapter, decode")
    assert (row["ratio"], row["reached"]) == (0.75, False)


def test_the_servers_are_compared_where_they_were_measured_else_the_engines() -> None:
    engines = [
        (ONE, FAST, "engine", _rounds(1.0)),
        (ONE, "llama.cpp", "one batch", _rounds(2.0)),
    ]
    servers = [
        (ONE, "nibble serve", "over HTTP", _rounds(1.0, 1.0)),
        (ONE, "llama-server", "over HTTP", _rounds(1.1, 1.4)),
    ]
    what = "1 request with one LoRA, end to end"
    row = _row(_found(*engines), what)
    assert (row["over"], row["ratio"], row["reached"]) == ("llama.cpp", 2.0, True)
    row = _row(_found(*engines, *servers), what)
    assert (row["over"], row["lowest"], row["highest"]) == ("llama-server", 1.1, 1.4)
    assert (row["ratio"], row["reached"]) == (1.25, True)


def test_peft_is_compared_in_its_mixed_batch() -> None:
    found = _found(
        (DISTINCT, FAST, "engine", _rounds(1.0)),
        (DISTINCT, "peft", "set_adapter, one by one", _rounds(50.0)),
        (DISTINCT, "peft", "adapter_names, mixed batch", _rounds(8.0)),
    )
    row = _row(found, "8 distinct adapters", 1)
    assert (row["over"], row["ratio"]) == ("peft: adapter_names, mixed batch", 8.0)
    assert row["reached"] is False


def test_own_rows_are_compared_where_they_were_side_by_side() -> None:
    apart = _found(
        (DISTINCT, FAST, "engine", _rounds(1.0)),
        (NONE, f"{FAST}{BARE}", "engine", _rounds(4.0)),
        (DISTINCT, "llama-server", "over HTTP", _rounds(3.0)),
        (DISTINCT, "nibble serve", "over HTTP", _rounds(1.0)),
    )
    close = _found(
        (DISTINCT, FAST, "engine", _rounds(1.0, 2.0, 1.0)),
        (NONE, f"{FAST}{BARE}", "engine", _rounds(1.0, 1.0, 1.0)),
    )
    rows = {row["over"]: row for row in reached(apart, "fast", None, [], close) if row["ratio"]}
    assert rows["llama-server"]["ratio"] == 3.0
    own = rows[f"8, no adapter, {FAST}{BARE}"]
    assert (own["what"], own["ratio"], own["lowest"]) == ("8 distinct against 8 without", 1.0, 0.5)


@pytest.mark.parametrize(("ratio", "answer"), [(1.04, True), (0.96, True), (1.06, False)])
def test_growth_is_told_by_the_count_that_is_farthest(ratio: float, answer: bool) -> None:
    spread = {"lowest": 0.9, "highest": 1.1}
    registered = {
        "resident": {"adapters": 32, "rank": 16, "ratio": 0.91, **spread},
        "growth": [
            {"registered": 1, "ratio": 1.0, **spread},
            {"registered": 10, "ratio": ratio, **spread},
            {"registered": 1000, "ratio": 1.01, **spread},
            {"registered": 1, "ratio": 1.2, **spread},  # what chance does
        ],
    }
    resident, growth = reached({}, "fast", registered, [], {})[-2:]
    assert resident["reached"] is True
    assert growth["over"].startswith("10 registered")
    assert growth["what"] == "cost of a token, 1 to 1,000 adapters registered"
    assert growth["reached"] is answer


def test_starts_are_held_against_seconds_and_the_budget() -> None:
    common = {"shard_bytes": 100, "first_peak_bytes": 1150, "rss_bytes": 900}
    starts = [
        {"model": "mini", "second_seconds_all": [2.2, 1.9, 2.1], **common},
        {"model": "big", "second_seconds_all": [2.0, 3.1, 2.9], "budget_bytes": 1000, **common},
    ]
    rows = {row["what"]: row for row in reached({}, "fast", None, starts, {})[8:]}
    assert rows["second start of mini"]["ratio"] == pytest.approx(1.05)
    assert [row["reached"] for row in rows.values()] == [False, True, True, False]
