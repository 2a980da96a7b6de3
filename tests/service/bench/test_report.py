from __future__ import annotations

import io

from rich.console import Console

from service.bench.plan import Contestant
from service.bench.report import memory_table, percentile, rates_table, ratios_of, row_of
from service.bench.scenario import DISTINCT, Round

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
    row = row_of(OURS, _rounds(2.0, 1.0, 4.0))
    assert row["tokens_per_second"] == 30.0
    assert row["tokens_per_second_rounds"] == [30.0, 60.0, 15.0]
    assert row["first_token_ms"] == {"p50": 500.0, "p99": 1000.0}
    assert row["inter_token_ms"] == {"p50": 20.0, "p99": 40.0}


def test_ratios_compare_round_with_round() -> None:
    found = {OURS: _rounds(1.0, 2.0, 1.0), THEIRS: _rounds(3.0, 4.0, 5.0)}
    (ratio,) = ratios_of(found)
    assert ratio["over"] == "peft: adapter_names, mixed batch"
    assert (ratio["lowest"], ratio["ratio"], ratio["highest"]) == (2.0, 3.0, 5.0)


def test_the_tables_say_it() -> None:
    found = {OURS: _rounds(1.0), THEIRS: _rounds(3.0)}
    text = _text(
        rates_table([row_of(row, rounds) for row, rounds in found.items()], ratios_of(found))
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
