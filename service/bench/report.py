"""What was measured, as JSON and as a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from service.bench.plan import NIBBLE, Contestant
from service.bench.scenario import Round

MIB = 1 << 20


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least `part` of all values do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def row_of(row: Contestant, rounds: Sequence[Round]) -> dict[str, Any]:
    """One contestant's figures: rates in tokens/s, times in milliseconds."""
    rates = [each.tokens_per_second for each in rounds]
    first = [value for each in rounds for value in each.first_token]
    gaps = [value for each in rounds for value in each.gaps]
    return {
        "scenario": row.scenario.name,
        "peer": row.peer,
        "way": row.way,
        "tokens_per_second": round(statistics.median(rates), 2),
        "tokens_per_second_rounds": [round(rate, 2) for rate in rates],
        "first_token_ms": _percentiles(first),
        "inter_token_ms": _percentiles(gaps) if gaps else None,
    }


def ratios_of(found: Mapping[Contestant, Sequence[Round]]) -> list[dict[str, Any]]:
    """Nibble's rate over each other row's of the same scenario: median of the rounds' ratios."""
    ratios = []
    for row, rounds in found.items():
        ours = next((r for r in found if r.peer == NIBBLE and r.scenario == row.scenario), None)
        if ours is None or row.peer == NIBBLE:
            continue
        pairs = zip(found[ours], rounds, strict=True)
        each = [a.tokens_per_second / b.tokens_per_second for a, b in pairs]
        ratios.append(
            {
                "scenario": row.scenario.name,
                "over": f"{row.peer}: {row.way}",
                "ratio": round(statistics.median(each), 2),
                "lowest": round(min(each), 2),
                "highest": round(max(each), 2),
            }
        )
    return ratios


def rates_table(rows: Sequence[Mapping[str, Any]], ratios: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each contestant."""
    times = {(each["scenario"], each["over"]): each["ratio"] for each in ratios}
    table = Table(title="output tokens/s of all requests together; times in ms, p50 / p99")
    for name in ("scenario", "who", "tokens/s", "nibble is", "first token", "between tokens"):
        table.add_column(name, justify="left" if name in ("scenario", "who") else "right")
    last = None
    for row in rows:
        who = f"{row['peer']}: {row['way']}"
        ratio = times.get((row["scenario"], who))
        table.add_row(
            row["scenario"] if row["scenario"] != last else "",
            who,
            f"{row['tokens_per_second']:.1f}",
            f"{ratio:.1f}×" if ratio else "",
            _pair(row["first_token_ms"]),
            _pair(row["inter_token_ms"]),
        )
        last = row["scenario"]
    return table


def memory_table(memory: Mapping[str, Any]) -> Table:
    """A fresh process that loaded the base and served one request, without adapters."""
    table = Table("a process that only serves the base", "MiB")
    rss = memory["rss_bytes"]
    rows = {
        "resident (RSS)": rss,
        "  NF4 weights": memory["nf4_bytes"],
        f"  embeddings, {memory['dtype']}": memory["embedding_bytes"],
        "  KV cache, when it is full": memory["kv_cache_bytes"],
        "  mapped files (libraries)": rss - memory["anonymous_bytes"],
        "peak while loading": memory["peak_rss_bytes"],
    }
    for name, nbytes in rows.items():
        table.add_row(name, f"{nbytes / MIB:,.0f}")
    return table


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "p50": round(1000 * percentile(seconds, 0.5), 2),
        "p99": round(1000 * percentile(seconds, 0.99), 2),
    }


def _pair(times: Mapping[str, float] | None) -> str:
    return f"{times['p50']:,.0f} / {times['p99']:,.0f}" if times else ""
