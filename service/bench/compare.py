"""One whole comparison: every peer started, driven and closed; out come the figures."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from base.kernels import Precision
from base.machine import inspect
from base.spec import BaseSpec
from service.bench.anchor import anchor
from service.bench.nibble_peer import ENGINE, NibblePeer
from service.bench.peer import PeerProcess, Setup
from service.bench.peft_peer import PeftPeer
from service.bench.plan import NIBBLE, Contestant, contestants, measure
from service.bench.random_adapters import random_adapters
from service.bench.report import ratios_of, row_of
from service.bench.scenario import BASE, DISTINCT, Scenario, job

PEFT = "peft"
RANK = 16
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Options:
    """What to compare, and on which base."""

    model: str  # as the user named it
    directory: Path
    scenarios: tuple[Scenario, ...]
    rounds: int
    prompt_tokens: int
    new_tokens: int
    threads: int
    peft_dtypes: tuple[str, ...]  # the fastest of these is measured; empty: no PEFT
    precision: Precision = "exact"  # of our own products over NF4

    def setup(self, adapters: list[Path], **more: Any) -> Setup:
        return Setup(self.directory, tuple(adapters), self.threads, more)

    def own_setup(self, adapters: list[Path]) -> Setup:
        return self.setup(adapters, precision=self.precision)


def compare(options: Options, report: Callable[[str, int, int], None]) -> Figures:
    """The figures, ready for JSON. `report` hears what runs, and which of how many tries it is."""
    report("memory of a process that only serves the base", 0, 1)
    memory, spec = _memory(options)
    with tempfile.TemporaryDirectory(prefix="nibble-bench-") as scratch, ExitStack() as stack:
        adapters = random_adapters(Path(scratch), spec, len(DISTINCT.adapters), RANK)
        peers = {NIBBLE: PeerProcess(NIBBLE, NibblePeer, options.own_setup(adapters))}
        stack.enter_context(closing(peers[NIBBLE]))
        trials: dict[str, float] = {}
        if options.peft_dtypes:
            report("PEFT's faster dtype", 0, 1)
            peers[PEFT], trials = anchor(
                lambda dtype: PeerProcess(PEFT, PeftPeer, options.setup(adapters, dtype=dtype)),
                options.peft_dtypes,
                spec.vocab_size,
                options.prompt_tokens,
            )
            stack.enter_context(closing(peers[PEFT]))
        figures = _measured(options, peers, spec, report)
        facts = {name: peer.facts() for name, peer in peers.items()}
    return {
        "model": options.model,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "threads": options.threads,
        "rounds": options.rounds,
        "lora_rank": RANK,
        "machine": asdict(inspect()),
        **figures,
        "memory": memory,
        "peers": facts,
        "peft_trials": {dtype: round(rate, 2) for dtype, rate in trials.items()},
        "notes": _notes(facts, trials),
    }


def _memory(options: Options) -> tuple[Figures, BaseSpec]:
    """Of a fresh process after its first request; the base alone."""
    with closing(PeerProcess(NIBBLE, NibblePeer, options.own_setup([]))) as peer:
        spec = peer.spec()
        first = job(BASE, 0, spec.vocab_size, options.prompt_tokens, options.new_tokens)
        peer.run(first, ENGINE)
        return peer.facts(), spec


def _measured(
    options: Options,
    peers: dict[str, PeerProcess],
    spec: BaseSpec,
    report: Callable[[str, int, int], None],
) -> Figures:
    rows = contestants(options.scenarios, list(peers))
    tries = len(rows) * (options.rounds + 1)
    done = 0

    def count(row: Contestant) -> None:
        nonlocal done
        done += 1
        report(f"{row.scenario.name}, {row.peer}: {row.way}", done, tries)

    found = measure(
        rows,
        peers,
        rounds=options.rounds,
        vocabulary=spec.vocab_size,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        report=count,
    )
    return {
        "results": [row_of(row, rounds) for row, rounds in found.items()],
        "ratios": ratios_of(found),
    }


def _notes(facts: dict[str, Figures], trials: dict[str, float]) -> list[str]:
    """What a reader must know to believe the figures."""
    lines = []
    if len(trials) > 1:
        tried = ", ".join(f"{rate:.1f} tokens/s in {dtype}" for dtype, rate in trials.items())
        lines.append(f"PEFT's mixed batch in a short trial: {tried}; the faster is measured")
    if facts.get(PEFT, {}).get("repacked"):
        lines.append(
            "bitsandbytes repacked PEFT's weights for its fused kernel, which computes in bfloat16 "
            "whatever dtype the model has"
        )
    return lines
