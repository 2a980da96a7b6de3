"""What the phases come to: figures by workload, a table, and plots."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.load.measure import Phase
from deploy.load.plots import Line, bars, lines
from deploy.load.workloads import BASE

PARTS = (0.5, 0.9, 0.99)
Figures = dict[str, Any]


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least `part` of all values do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def bucket_quantile(buckets: Sequence[tuple[float, float]], part: float) -> float | None:
    """As PromQL's histogram_quantile; None where nothing was observed."""
    total = buckets[-1][1] if buckets else 0.0
    low, below = 0.0, 0.0
    for high, count in buckets:
        if total and count >= part * total:
            if math.isinf(high):
                return low
            return low + (high - low) * (part * total - below) / max(count - below, 1e-12)
        low, below = high, count
    return None


def figures(phases: Sequence[Phase], first: float, per_token: float) -> list[Figures]:
    """A row for each workload, in the order of their first round. Goodput: requests/s that had
    their first token within `first` seconds and each further one within `per_token` on average."""
    rows = []
    for workload in dict.fromkeys(phase.workload for phase in phases):
        mine = [phase for phase in phases if phase.workload is workload]
        rows.append(_row(mine, phases, first, per_token))
    return rows


def _row(mine: Sequence[Phase], all_: Sequence[Phase], first: float, per_token: float) -> Figures:
    workload = mine[0].workload
    replies = [reply for phase in mine for reply in phase.replies]
    done = [reply for reply in replies if not reply.fault]
    seconds = sum(phase.seconds for phase in mine)
    good = sum(reply.good(first, per_token) for reply in replies)
    sought = {tier: sum(phase.found[tier] for phase in mine) for tier in mine[0].found}
    loads = _summed([phase.loads for phase in mine])
    ends = [reply.last for reply in done]
    return {
        "workload": workload.name,
        "arrival": workload.arrival,
        "requests": len(replies),
        "failed": _faults(reply.fault for reply in replies),
        "adapters": max(phase.distinct for phase in mine),
        "tokens_per_second": round(statistics.median(phase.rate for phase in mine), 2),
        "slowdown": _slowdown(mine, all_),
        "ttft_ms": _percentiles([reply.first for reply in done]),
        "itl_ms": _percentiles([gap for reply in done for gap in reply.gaps]),
        "e2e_ms": _percentiles(ends),
        "goodput": round(good / seconds, 3),
        "attained": round(good / len(replies), 4),
        "hit_rate": _hit_rate(sought),
        "found": sought,
        "cold_loads": loads[-1][1] if loads else 0,
        "cold_load_ms": {
            f"p{part * 100:g}": None if value is None else round(1000 * value, 1)
            for part in PARTS
            for value in [bucket_quantile(loads, part)]
        },
    }


def _slowdown(mine: Sequence[Phase], phases: Sequence[Phase]) -> float | None:
    """How many times as fast the base alone was: the median over rounds, each against its own."""
    if mine[0].workload.arrival != "closed":
        return None  # they arrive at the same rate, so their rates say nothing
    base = {phase.round: phase.rate for phase in phases if phase.workload is BASE}
    ratios = [base[phase.round] / phase.rate for phase in mine if phase.rate]
    return round(statistics.median(ratios), 3) if ratios else None


def _hit_rate(sought: Mapping[str, float]) -> float | None:
    """The share of requests whose adapter was in memory."""
    total = sum(sought.values())
    return round(1 - sought["store"] / total, 4) if total else None


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {f"p{part * 100:g}": round(1000 * percentile(values, part), 1) for part in PARTS}


def _faults(found: Any) -> dict[str, int]:
    faults: dict[str, int] = {}
    for fault in found:
        if fault:
            faults[fault] = faults.get(fault, 0) + 1
    return faults


def _summed(histograms: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    edges = sorted({edge for histogram in histograms for edge, _ in histogram})
    return [(edge, sum(dict(one).get(edge, 0.0) for one in histograms)) for edge in edges]


def write(
    out: Path, phases: Sequence[Phase], rows: Sequence[Figures], about: Mapping[str, Any]
) -> Path:
    """report.md, report.json and the plots; the path of the first."""
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in _plots(phases, rows).items():
        (out / name).write_text(picture, encoding="utf-8")
    body = {"about": about, "workloads": rows}
    (out / "report.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text(_page(rows, about), encoding="utf-8")
    return out / "report.md"


def _plots(phases: Sequence[Phase], rows: Sequence[Figures]) -> dict[str, str]:
    closed = [row for row in rows if row["slowdown"] is not None]
    made = {
        "slowdown.svg": bars(
            [(f"{row['workload']} ({row['adapters']})", row["slowdown"]) for row in closed],
            "Slowdown against the base only (adapters asked for); 1 is as fast",
        )
    }
    for name, title, of in (
        ("ttft.svg", "Time to first token", lambda reply: [reply.first]),
        ("itl.svg", "Time between tokens", lambda reply: reply.gaps),
        ("e2e.svg", "Whole request", lambda reply: [reply.last]),
    ):
        found = [
            Line(
                workload.name,
                [
                    1000 * value
                    for phase in phases
                    if phase.workload is workload
                    for reply in phase.replies
                    if not reply.fault
                    for value in of(reply)
                ],
            )
            for workload in dict.fromkeys(phase.workload for phase in phases)
        ]
        made[name] = lines([line for line in found if line.values], f"{title}, ms")
    return made


def _page(rows: Sequence[Figures], about: Mapping[str, Any]) -> str:
    parts = ["# A load test", ""]
    parts += [f"- {name}: {value}" for name, value in about.items()]
    parts += [
        "",
        "| workload | adapters | tokens/s | slowdown | TTFT p50 / p90 / p99 ms | ITL ms | e2e ms | "
        "goodput req/s | SLO kept | in memory | cold loads | p50 / p99 ms | failed |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        slow = "" if row["slowdown"] is None else f"{row['slowdown']:.2f}×"
        hits = "" if row["hit_rate"] is None else f"{row['hit_rate']:.0%}"
        cold = row["cold_load_ms"]
        cells = (
            row["workload"],
            row["adapters"],
            row["tokens_per_second"],
            slow,
            *(_three(row[name]) for name in ("ttft_ms", "itl_ms", "e2e_ms")),
            row["goodput"],
            f"{row['attained']:.0%}",
            hits,
            f"{row['cold_loads']:g}",
            f"{cold['p50']} / {cold['p99']}" if cold["p50"] is not None else "",
            ", ".join(f"{n} {fault}" for fault, n in row["failed"].items()) or 0,
        )
        parts.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    parts += [
        "",
        "Slowdown: tokens/s of the base only, divided by this workload's, each round against its "
        "own base; the median. Requests that arrive by the clock have none: see their times beside "
        "those of the base at the same rate. In memory: requests whose adapter did not have to "
        "be loaded.",
        "",
        *(f"![]({name})" for name in ("slowdown.svg", "ttft.svg", "itl.svg", "e2e.svg")),
        "",
    ]
    return "\n".join(parts)


def _three(found: Mapping[str, float] | None) -> str:
    return " / ".join(f"{value:g}" for value in found.values()) if found else ""
