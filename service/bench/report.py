"""What was measured, as JSON and as a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from service.bench.nibble_peer import LOOKUP
from service.bench.plan import BARE, NIBBLE, Contestant
from service.bench.scenario import (
    COPIES,
    COPYING,
    DISTINCT,
    DORA,
    MANY,
    NONE,
    SAME,
    Round,
    Scenario,
)

MIB = 1 << 20
Rates = Mapping[tuple[Scenario, str], Sequence[Round]]


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least `part` of all values do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def row_of(row: Contestant, rounds: Sequence[Round], prompt_tokens: int) -> dict[str, Any]:
    """One contestant's figures: rates in tokens/s, times in milliseconds.

    The rate is of output tokens, or of prompt tokens where the scenario counts those.
    """
    rates = [_rate(row, each, prompt_tokens) for each in rounds]
    first = [value for each in rounds for value in each.first_token]
    gaps = [value for each in rounds for value in each.gaps]
    return {
        "scenario": row.scenario.name,
        "peer": row.peer,
        "way": row.way,
        "counts": row.scenario.counts,
        "tokens_per_second": round(statistics.median(rates), 2),
        "tokens_per_second_rounds": [round(rate, 2) for rate in rates],
        "first_token_ms": _percentiles(first),
        "inter_token_ms": _percentiles(gaps) if gaps else None,
    }


def _rate(row: Contestant, result: Round, prompt_tokens: int) -> float:
    if row.scenario.counts == "output":
        return result.tokens_per_second
    tokens = row.scenario.prompt_of(prompt_tokens) * len(row.scenario.adapters)
    return tokens / max(result.first_token)


def ratios_of(found: Mapping[Contestant, Sequence[Round]]) -> list[dict[str, Any]]:
    """Nibble's rate, in each of its precisions, over each other peer's of the same scenario.

    Servers over HTTP are compared with servers, engines with engines.
    """
    return [
        {
            "scenario": other.scenario.name,
            "peer": ours.peer,
            "over": f"{other.peer}: {other.way}",
            **_ratio(found[ours], found[other]),
        }
        for other in found
        for ours in found
        if ours.ours
        and not other.peer.startswith(NIBBLE)
        and ours.scenario == other.scenario
        and ours.over_http == other.over_http
    ]


def own_ratios(
    found: Mapping[Contestant, Sequence[Round]], close: Mapping[Contestant, Sequence[Round]]
) -> list[dict[str, Any]]:
    """What adapters cost, and prompt lookup brings: Nibble's rate in one row over another's.

    "No adapter" is the peer that was never given one, where that was measured. What was measured
    side by side, in `close`, is compared there.
    """
    rates = {(r.scenario, r.peer): rounds for r, rounds in found.items() if r.way != LOOKUP}
    beside = {(r.scenario, r.peer): rounds for r, rounds in close.items()}
    guessed = {(r.scenario, r.peer): rounds for r, rounds in found.items() if r.way == LOOKUP}
    ratios = []
    for peer in dict.fromkeys(row.peer for row in found if row.ours):
        bare = f"{peer}{BARE}" if (NONE, f"{peer}{BARE}") in rates else peer
        pairs = {
            "8 distinct adapters / 8 without": ((DISTINCT, peer), (NONE, bare)),
            "DoRA / LoRA, 8 distinct": ((DORA, peer), (DISTINCT, peer)),
            "registered but unused / none": ((NONE, peer), (NONE, bare)),
            "8 distinct / 8 the same": ((DISTINCT, peer), (SAME, peer)),
            "32 distinct of mixed kinds / 8 distinct": ((MANY, peer), (DISTINCT, peer)),
        }
        ratios += [
            {"what": what, "peer": peer, **_ratio(*_both(over, under, beside, rates))}
            for what, (over, under) in pairs.items()
            if over != under and over in rates and under in rates
        ]
        ratios += [
            {"what": f"prompt lookup / without, {it.name}", "peer": peer, **_ratio(own, plain)}
            for it in (COPYING, COPIES)
            if (own := guessed.get((it, peer))) and (plain := rates.get((it, peer)))
        ]
    return ratios


def _both(
    over: tuple[Scenario, str], under: tuple[Scenario, str], *sources: Rates
) -> tuple[Sequence[Round], Sequence[Round]]:
    """The rounds of two rows, of the first source that has both."""
    return next((s[over], s[under]) for s in sources if over in s and under in s)


def _ratio(ours: Sequence[Round], theirs: Sequence[Round]) -> dict[str, float]:
    """Of the rates in output tokens, round with round, as far as both have them."""
    pairs = zip(ours, theirs, strict=False)
    each = [a.tokens_per_second / b.tokens_per_second for a, b in pairs]
    return {
        "ratio": round(statistics.median(each), 2),
        "lowest": round(min(each), 2),
        "highest": round(max(each), 2),
    }


def rates_table(rows: Sequence[Mapping[str, Any]], ratios: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each contestant."""
    times: dict[tuple[str, str], list[str]] = {}
    for each in ratios:
        times.setdefault((each["scenario"], each["over"]), []).append(f"{each['ratio']:.1f}×")
    table = Table(title="tokens/s of all requests together; times in ms, p50 / p99")
    for name in ("scenario", "who", "tokens/s", "nibble is", "first token", "between tokens"):
        table.add_column(name, justify="left" if name in ("scenario", "who") else "right")
    last = None
    for row in rows:
        who = f"{row['peer']}: {row['way']}"
        table.add_row(
            row["scenario"] if row["scenario"] != last else "",
            who,
            f"{row['tokens_per_second']:.1f}",
            " ".join(times.get((row["scenario"], who), [])),
            _pair(row["first_token_ms"]),
            _pair(row["inter_token_ms"]),
        )
        last = row["scenario"]
    return table


def own_table(ratios: Sequence[Mapping[str, Any]]) -> Table:
    """What adapters cost, a line for each ratio."""
    table = Table("rate over rate", "who", "ratio", "lowest", "highest")
    for each in ratios:
        figures = [f"{each[key]:.2f}" for key in ("ratio", "lowest", "highest")]
        table.add_row(each["what"], each["peer"], *figures)
    return table


def targets_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What was measured of the targets."""
    table = Table("target", "wanted", "over", "ratio", "lowest", "highest", "reached")
    for row in rows:
        if row["ratio"] is not None:
            figures = [f"{row[key]:.3f}" for key in ("ratio", "lowest", "highest")]
            answer = "yes" if row["reached"] else "no"
            table.add_row(row["what"], row["target"], row["over"], *figures, answer)
    return table


def memory_table(memory: Mapping[str, Any]) -> Table:
    """A fresh process that loaded the base and served one request, without adapters."""
    table = Table("a process that only serves the base", "MiB")
    rss = memory["rss_bytes"]
    rows = {
        "resident (RSS)": rss,
        "  NF4 weights": memory["nf4_bytes"],
        "  embeddings": memory["embedding_bytes"],
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
