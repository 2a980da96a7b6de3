"""`nibble bench --suite device`: what 4 bits and adapters cost on one device.

The same base in 16 bits and in NF4, and NF4 with a LoRA of its own for each request, for 1, 8, 32
and 64 requests at once; in one process, in turns, round by round. Each row beside what the device
could do at most: the bytes of a decode step over its bandwidth, or its products over its rate,
whichever is longer.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from base.kernels import bench as cpu_limits
from base.kernels import bench_cuda
from base.machine import inspect
from base.spec import BaseSpec
from service.bench.nibble_peer import ENGINE, NibblePeer
from service.bench.peer import Setup
from service.bench.random_adapters import random_adapter
from service.bench.scenario import Round, Scenario, job

DEVICE = "device"  # the name of this suite
COUNTS = (1, 8, 32, 64)  # requests at once
RANK = 16
PACKAGES = ("torch", "transformers", "bitsandbytes", "triton")  # whose versions a reader wants
GIB = 1 << 30
AIM = 0.75  # of the rate in 16 bits, with NF4 and an adapter for each request

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """What to measure, and where."""

    model: str  # as the user named it
    directory: Path
    device: str
    rounds: int
    prompt_tokens: int
    new_tokens: int
    minutes: float  # after these no round begins but the first
    command: str
    counts: tuple[int, ...] = COUNTS


@dataclass(frozen=True, slots=True)
class Row:
    """`adapters` is 0, or as many as `requests`: all of them distinct."""

    weights: str  # "dense" or "nf4"
    requests: int
    adapters: int

    @property
    def scenario(self) -> Scenario:
        ids: tuple[int | None, ...] = tuple(range(self.adapters)) or (None,) * self.requests
        return Scenario(f"{self.weights}, {self.requests} requests", ids)


@dataclass(slots=True)
class _Taken:
    rounds: list[Round] = field(default_factory=list)
    steps: Counter[str] = field(default_factory=Counter)


def rows_of(counts: Sequence[int]) -> list[Row]:
    kinds = (("dense", False), ("nf4", False), ("nf4", True))
    return [Row(weights, n, n * adapted) for n in counts for weights, adapted in kinds]


def measure(asked: Asked, report: Callable[[str], None] = lambda text: None) -> Figures:
    """All rows' figures, with the device's limits."""
    report("the device's limits")
    limits = _limits(asked.device)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="nibble-device-")))
        peers: dict[str, NibblePeer] = {}
        report("the base in NF4, and its adapters")
        dense = peers["dense"] = NibblePeer(_setup(asked, (), dense=True))
        stack.callback(dense.close)
        adapters = _adapters(folder, dense.spec(), max(asked.counts))
        nf4 = peers["nf4"] = NibblePeer(_setup(asked, adapters, dense=False))
        stack.callback(nf4.close)
        taken = _rounds(asked, peers, report)
        facts = {name: peer.facts() for name, peer in peers.items()}
        spec = nf4.spec()
    results = [_figures(row, it, asked, facts, limits, spec) for row, it in taken.items()]
    for one in results:
        one["ratio"] = _ratio(one, results)
    return {
        "command": asked.command,
        "model": asked.model,
        "device": _name(asked.device),
        "machine": asdict(inspect()),
        "dtype": facts["dense"]["dtype"],
        "prompt_tokens": asked.prompt_tokens,
        "new_tokens": asked.new_tokens,
        "rank": RANK,
        "limits": limits,
        "results": results,
    }


def _setup(asked: Asked, adapters: tuple[Path, ...], *, dense: bool) -> Setup:
    engine = {
        "max_sequences": max(asked.counts),
        "max_model_len": asked.prompt_tokens + asked.new_tokens + 1,
        "kv_cache_bytes": 4 * GIB,
        "host_cache_bytes": 16 * GIB,
        "slot_bytes": 16 * GIB,
    }
    options = {"device": asked.device, "dense": dense, "engine": engine}
    return Setup(asked.directory, adapters, torch.get_num_threads(), options)


def _adapters(folder: Path, spec: BaseSpec, count: int) -> tuple[Path, ...]:
    return tuple(
        random_adapter(folder / f"lora-{n}", spec, RANK, torch.Generator().manual_seed(n))
        for n in range(count)
    )


def _rounds(
    asked: Asked, peers: Mapping[str, NibblePeer], report: Callable[[str], None]
) -> dict[Row, _Taken]:
    rows = rows_of(asked.counts)
    taken = {row: _Taken() for row in rows}
    began = time.monotonic()
    for number in range(-1, asked.rounds):  # the first does not count
        if number > 0 and time.monotonic() - began > 60 * asked.minutes:
            break
        for row in rows:
            report(f"round {number + 1} of {asked.rounds}: {row.scenario.name}")
            peer = peers[row.weights]
            size = peer.spec().vocab_size
            asks = job(row.scenario, number, size, asked.prompt_tokens, asked.new_tokens)
            found = peer.run(asks if number >= 0 else asks.shortened(4), ENGINE)
            steps = peer.steps()
            if number >= 0:
                taken[row].rounds.append(found)
                taken[row].steps.update(steps)
    return taken


def _figures(
    row: Row,
    taken: _Taken,
    asked: Asked,
    facts: Mapping[str, Figures],
    limits: Mapping[str, float],
    spec: BaseSpec,
) -> Figures:
    step = statistics.median(gap for each in taken.rounds for gap in each.gaps)
    kept = _step_bytes(row, asked, facts, spec)
    weights = sum(s.out_features * s.in_features for s in spec.linears.values())
    work = 2 * weights * row.requests + 2 * _adapter_weights(row, facts)
    least = max(1e-9 * kept / limits["gbytes"], 1e-9 * work / limits["gflops"])
    rates = [each.tokens_per_second for each in taken.rounds]
    return {
        "weights": row.weights,
        "requests": row.requests,
        "adapters": row.adapters,
        "tokens_per_second": round(statistics.median(rates), 2),
        "tokens_per_second_rounds": [round(rate, 2) for rate in rates],
        "step_ms": round(1e3 * step, 4),
        "least_step_ms": round(1e3 * least, 4),
        "of_limit": round(least / step, 4),
        "steps_replayed": taken.steps["replayed"],
        "steps_eager": taken.steps["eager"],
    }


def _step_bytes(row: Row, asked: Asked, facts: Mapping[str, Figures], spec: BaseSpec) -> float:
    """What a decode step reads at least: weights, keys and values, adapters."""
    nf4 = facts["nf4"]
    weights: float = nf4["step_bytes"]
    if row.weights == "dense":
        shapes = [shape for shape in spec.linears.values() if shape.quantized]
        each = 4 if facts["dense"]["dtype"] == "float32" else 2
        weights += each * sum(s.out_features * s.in_features for s in shapes) - nf4["nf4_bytes"]
    context = asked.prompt_tokens + asked.new_tokens / 2
    own = sum(nf4["each_adapter_bytes"][: row.adapters])
    return float(weights + row.requests * context * nf4["token_bytes"] + own)


def _adapter_weights(row: Row, facts: Mapping[str, Figures]) -> float:
    each = 4 if facts["nf4"]["dtype"] == "float32" else 2
    return float(sum(facts["nf4"]["each_adapter_bytes"][: row.adapters]) / each)


def _ratio(one: Figures, results: Sequence[Figures]) -> float:
    """Its rate over that in 16 bits with as many requests."""
    beside = next(
        r for r in results if r["weights"] == "dense" and r["requests"] == one["requests"]
    )
    return round(float(one["tokens_per_second"] / beside["tokens_per_second"]), 4)


def _limits(device: str) -> dict[str, float]:
    if device == "cuda":
        return bench_cuda.limits(torch.device("cuda", torch.cuda.current_device()))
    return {"gbytes": cpu_limits.memory_limit(), "gflops": cpu_limits.arithmetic_limit()}


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def markdown(figures: Figures) -> str:
    """The same as a page."""
    limits, wide, known = figures["limits"], figures["dtype"], figures["machine"]["versions"]
    lines = [
        f"# {figures['model']} on {figures['device']}",
        "",
        f"`{figures['command']}`: prompts of {figures['prompt_tokens']} tokens, "
        f"{figures['new_tokens']} new ones, LoRAs of rank {figures['rank']} on all linear layers, "
        "all distinct. "
        f"Measured there: {limits['gbytes']:.0f} GB/s, {limits['gflops'] / 1e3:.2f} TFLOP/s. "
        + ", ".join(f"{name} {known[name]}" for name in PACKAGES if name in known)
        + ".",
        "",
        f"| requests | weights | adapters | tokens/s | over {wide} | step, ms | of the limit "
        "| steps replayed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in figures["results"]:
        steps = row["steps_replayed"] + row["steps_eager"]
        lines.append(
            f"| {row['requests']} | {wide if row['weights'] == 'dense' else 'NF4'} "
            f"| {row['adapters']} | {row['tokens_per_second']:.1f} | {row['ratio']:.2f} "
            f"| {row['step_ms']:.2f} | {100 * row['of_limit']:.0f} % "
            f"| {row['steps_replayed']} of {steps} |"
        )
    adapted = [row for row in figures["results"] if row["adapters"]]
    reached = sum(row["ratio"] >= AIM for row in adapted)
    lines += [
        "",
        f"NF4 with an adapter for each request reaches {AIM} of {wide} in {reached} of "
        f"{len(adapted)} rows.",
        "",
    ]
    return "\n".join(lines)
