from __future__ import annotations

import io

from rich.console import Console

from service.bench.nibble_peer import ENGINE, LOOKUP
from service.bench.plan import BARE, Contestant
from service.bench.report import (
    memory_table,
    own_ratios,
    own_table,
    percentile,
    rates_table,
    ratios_of,
    row_of,
)
from service.bench.scenario import COPYING, DISTINCT, DORA, NONE, PREFILL, Round, Scenario

OURS = Contestant(DISTINCT, "nibble", "engine")
THEIRS = Contestant(DISTINCT, "peft", "adapter_names, mixed batch")


def _rounds(*seconds: float) -> list[Round]:
    return [Round(each, 60, (each / 4,) * 2, (each / 100,) * 3) for each in seconds]


def _text(table: object) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(value) for value in range(1, 101)]
    assert percentile(values, 0.5) == 50.0
    assert percentile(values, 0.99) == 99.0
    assert percentile([7.0], 0.99) == 7.0


def test_a_row_holds_medians_and_every_round() -> None:
    row = row_of(OURS, _rounds(2.0, 1.0, 4.0), 64)
    assert row["tokens_per_second"] == 30.0
    assert row["tokens_per_second_rounds"] == [30.0, 60.0, 15.0]
    assert row["first_token_ms"] == {"p50": 500.0, "p99": 1000.0}
    assert row["inter_token_ms"] == {"p50": 20.0, "p99": 40.0}


def test_ratios_compare_round_with_round() -> None:
    found = {OURS: _rounds(1.0, 2.0, 1.0), THEIRS: _rounds(3.0, 4.0, 5.0)}
    (ratio,) = ratios_of(found)
    assert ratio["over"] == "peft: adapter_names, mixed batch"
    assert (ratio["lowest"], ratio["ratio"], ratio["highest"]) == (2.0, 3.0, 5.0)


def test_a_prompt_is_counted_until_its_first_token() -> None:
    row = Contestant(PREFILL, "nibble", "engine")
    figures = row_of(row, [Round(2.0, 1, (2.0,), ())], 64)
    assert figures["tokens_per_second"] == 256.0
    assert figures["inter_token_ms"] is None


def test_every_precision_is_compared_with_every_other_peer_and_not_with_itself() -> None:
    exact, bare = (Contestant(NONE, name, "engine") for name in ("nibble exact", "nibble" + BARE))
    ours, theirs = Contestant(NONE, "nibble", "engine"), Contestant(NONE, "peft", "one")
    found = dict.fromkeys([ours, exact, bare, theirs], _rounds(1.0))
    found[theirs] = _rounds(2.0)
    pairs = [(each["peer"], each["over"], each["ratio"]) for each in ratios_of(found)]
    assert pairs == [("nibble", "peft: one", 2.0), ("nibble exact", "peft: one", 2.0)]


def test_servers_are_compared_with_servers_and_engines_with_engines() -> None:
    rows = [
        Contestant(DISTINCT, "nibble fast", "engine"),
        Contestant(DISTINCT, "nibble serve", "over HTTP"),
        Contestant(DISTINCT, "llama.cpp", "one by one"),
        Contestant(DISTINCT, "llama-server", "over HTTP"),
    ]
    pairs = [(r["peer"], r["over"]) for r in ratios_of(dict.fromkeys(rows, _rounds(1.0)))]
    assert pairs == [
        ("nibble fast", "llama.cpp: one by one"),
        ("nibble serve", "llama-server: over HTTP"),
    ]


def test_fewer_rounds_of_a_slow_peer_are_compared_with_those_of_the_same_number() -> None:
    (ratio,) = ratios_of({OURS: _rounds(1.0, 9.0, 9.0), THEIRS: _rounds(3.0)})
    assert (ratio["lowest"], ratio["ratio"], ratio["highest"]) == (3.0, 3.0, 3.0)


def test_what_adapters_cost_is_told_by_the_peer_that_never_had_one() -> None:
    def row(scenario: Scenario, name: str = "nibble fast") -> Contestant:
        return Contestant(scenario, name, "engine")

    found = {
        row(DISTINCT): _rounds(4.0),
        row(DORA): _rounds(5.0),
        row(NONE): _rounds(2.5),
        row(NONE, "nibble fast" + BARE): _rounds(2.0),
    }
    ratios = {each["what"]: each["ratio"] for each in own_ratios(found, {})}
    assert ratios == {
        "8 distinct adapters / 8 without": 0.5,
        "DoRA / LoRA, 8 distinct": 0.8,
        "registered but unused / none": 0.8,
    }
    close = {row(DISTINCT): _rounds(4.0), row(NONE, "nibble fast" + BARE): _rounds(3.0)}
    beside = {each["what"]: each["ratio"] for each in own_ratios(found, close)}
    assert beside == ratios | {"8 distinct adapters / 8 without": 0.75}
    without = {key: rounds for key, rounds in found.items() if not key.peer.endswith(BARE)}
    ratios = {each["what"]: each["ratio"] for each in own_ratios(without, {})}
    assert ratios["8 distinct adapters / 8 without"] == 0.62
    assert "registered but unused / none" not in ratios
    assert "0.62" in _text(own_table(own_ratios(without, {})))


def test_prompt_lookup_is_compared_with_the_same_peer_without_it() -> None:
    rows = [Contestant(COPYING, "nibble fast", way) for way in (ENGINE, LOOKUP)]
    (found,) = own_ratios({rows[0]: _rounds(3.0), rows[1]: _rounds(1.5)}, {})
    assert (found["what"], found["ratio"]) == ("prompt lookup / without, copying", 2.0)


def test_the_tables_say_it() -> None:
    found = {OURS: _rounds(1.0), THEIRS: _rounds(3.0)}
    text = _text(
        rates_table([row_of(row, rounds, 64) for row, rounds in found.items()], ratios_of(found))
    )
    assert "60.0" in text
    assert "3.0×" in text
    memory = {
        "rss_bytes": 500 << 20,
        "anonymous_bytes": 400 << 20,
        "peak_rss_bytes": 600 << 20,
        "nf4_bytes": 200 << 20,
        "embedding_bytes": 50 << 20,
        "kv_cache_bytes": 10 << 20,
        "dtype": "float32",
    }
    text = _text(memory_table(memory))
    assert [word in text for word in ("500", "200", "100", "600")] == [True] * 4
