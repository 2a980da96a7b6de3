"""What this server is meant to reach, and whether this run reached it: rows of one table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.bench.peft_peer import MIXED
from service.bench.plan import (
    BARE,
    LLAMA,
    LLAMA_SERVER,
    NIBBLE,
    NIBBLE_SERVER,
    PEFT,
    Contestant,
)
from service.bench.scenario import BASE, DISTINCT, DORA, NONE, ONE, PREFILL, Round, Scenario

Found = Mapping[Contestant, Sequence[Round]]
Row = dict[str, Any]
GROWTH = 0.05  # that a token may cost more or less with a thousand registered
START_SECONDS = {"mini": 2.0, "": 3.0}  # of a second start; "": any other base


@dataclass(frozen=True, slots=True)
class Side:
    """Rounds of one row: the scenario, its peer, and its way where it has several."""

    scenario: Scenario
    peer: str
    way: str | None = None

    def rounds(self, found: Found) -> Sequence[Round]:
        for row, rounds in found.items():
            if (row.scenario, row.peer) == (self.scenario, self.peer) and (
                self.way in (None, row.way)
            ):
                return rounds
        return ()


@dataclass(frozen=True, slots=True)
class Target:
    """At least `least` times as fast as another."""

    what: str
    least: float
    pairs: tuple[tuple[Side, Side], ...]  # (ours, the other); the first that was measured counts
    decode: bool = False  # compare the times between tokens only


def targets_of(precision: str) -> tuple[Target, ...]:
    """Those of throughput, for the server in this precision."""
    name = f"{NIBBLE} {precision}"

    def engine(scenario: Scenario) -> Side:
        return Side(scenario, name)

    def target(what: str, least: float, scenario: Scenario, other: Side, **more: bool) -> Target:
        return Target(what, least, ((engine(scenario), other),), **more)

    def served(what: str, least: float, scenario: Scenario) -> Target:
        """Over HTTP where llama-server was given; else both without HTTP."""
        over_http = (Side(scenario, NIBBLE_SERVER), Side(scenario, LLAMA_SERVER))
        return Target(what, least, (over_http, (engine(scenario), Side(scenario, LLAMA))))

    return (
        target("1 request, no adapter, decode", 0.9, BASE, Side(BASE, LLAMA), decode=True),
        served("1 request with one LoRA, end to end", 1.2, ONE),
        served("8 distinct adapters", 3.0, DISTINCT),
        target("8 distinct adapters", 10.0, DISTINCT, Side(DISTINCT, PEFT, MIXED)),
        target("prefill", 0.9, PREFILL, Side(PREFILL, LLAMA)),
        target("8 distinct against 8 without", 0.85, DISTINCT, Side(NONE, f"{name}{BARE}")),
        target("DoRA against LoRA, 8 distinct", 0.97, DORA, engine(DISTINCT)),
        target("adapters registered but unused", 0.97, NONE, Side(NONE, f"{name}{BARE}")),
    )


def reached(
    found: Found,
    precision: str,
    registered: Mapping[str, Any] | None,
    starts: Sequence[Row],
    close: Found,
) -> list[Row]:
    """A row for each target: what, wanted, over whom, the ratio and its interval, yes or no.

    `close` has the rounds of this server's own rows that were measured side by side; they count
    where both sides are among them.
    """
    rows = [
        _throughput(target, close if _own(target) and close else found)
        for target in targets_of(precision)
    ]
    if registered is not None:
        rows += [_resident(registered["resident"]), _growth(registered["growth"])]
    for start in starts:
        rows += _start(start)
    return rows


def _own(target: Target) -> bool:
    return all(side.peer.startswith(NIBBLE) for pair in target.pairs for side in pair)


def _throughput(target: Target, found: Found) -> Row:
    row = {"what": target.what, "target": f"≥ {target.least:g}"}
    speed: Callable[[Round], float] = _decode if target.decode else _rate
    for mine, other in target.pairs:
        rounds = zip(mine.rounds(found), other.rounds(found), strict=False)
        if each := [speed(a) / speed(b) for a, b in rounds]:
            return row | _measured(_name(other), each, target.least)
    return row | {"over": _name(target.pairs[0][1]), "ratio": None, "reached": None}


def _name(other: Side) -> str:
    """Whom it is compared with: a row of this server is named by its scenario."""
    if other.peer.startswith(NIBBLE):
        return f"{other.scenario.name}, {other.peer}"
    way = f": {other.way}" if other.way else ""
    return f"{other.peer}{way}"


def _rate(round_: Round) -> float:
    return round_.tokens_per_second


def _decode(round_: Round) -> float:
    return 1 / statistics.median(round_.gaps)


def _measured(over: str, each: Sequence[float], least: float) -> Row:
    ratio = statistics.median(each)
    return {
        "over": over,
        "ratio": round(ratio, 3),
        "lowest": round(min(each), 3),
        "highest": round(max(each), 3),
        "reached": ratio >= least,
    }


def _resident(figures: Mapping[str, Any]) -> Row:
    spread = {key: figures[key] for key in ("ratio", "lowest", "highest")}
    return {
        "what": f"{figures['adapters']} resident distinct against 1",
        "target": "≥ 0.9",
        "over": f"requests to 1 of them, rank {figures['rank']}, 8 at a time",
        **spread,
        "reached": figures["ratio"] >= 0.9,
    }


def _growth(rows: Sequence[Mapping[str, Any]]) -> Row:
    """The count whose cost is farthest from that of the fewest, on the clock."""
    more = [row for row in rows if row["registered"] != rows[0]["registered"]]
    worst = max(more, key=lambda row: abs(row["ratio"] - 1))
    least, most = rows[0]["registered"], more[-1]["registered"]
    return {
        "what": f"cost of a token, {least:,} to {most:,} adapters registered",
        "target": f"1 ± {GROWTH:g}",
        "over": f"{worst['registered']:,} registered, the farthest from 1",
        **{key: worst[key] for key in ("ratio", "lowest", "highest")},
        "reached": abs(worst["ratio"] - 1) <= GROWTH,
    }


def _start(start: Row) -> list[Row]:
    """Seconds over seconds, bytes over bytes: at most 1."""
    model = start["model"]
    seconds = START_SECONDS.get(model, START_SECONDS[""])
    times = [each / seconds for each in start["second_seconds_all"]]
    rows = [_at_most(f"second start of {model}", f"{seconds:g} s until /ready", times)]
    if "budget_bytes" in start:
        most = start["budget_bytes"]
        rows.append(
            _at_most(f"resident memory, {model}", "its budget", [start["rss_bytes"] / most])
        )
        peak = start["first_peak_bytes"] / (most + start["shard_bytes"])
        rows.append(_at_most(f"peak while quantising, {model}", "its budget and a shard", [peak]))
    return rows


def _at_most(what: str, over: str, each: Sequence[float]) -> Row:
    row = _measured(over, each, 0.0)
    return {"what": what, "target": "≤ 1", **row, "reached": row["ratio"] <= 1}
