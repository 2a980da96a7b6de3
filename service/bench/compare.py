"""One whole comparison: every peer started, driven and closed; out come the figures."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from base.kernels import Precision
from base.machine import inspect
from base.spec import BaseSpec
from service.bench.anchor import anchor
from service.bench.gguf_files import ARCHITECTURES
from service.bench.limits import Limits, better, distance, measure_limits, multiply_adds
from service.bench.llama_peer import LlamaPeer, missing
from service.bench.nibble_peer import ENGINE, NibblePeer
from service.bench.peer import PeerProcess, Setup
from service.bench.peft_peer import PeftPeer
from service.bench.plan import (
    BARE,
    LLAMA,
    NIBBLE,
    PEFT,
    Contestant,
    contestants,
    measure,
    order,
    ways_of,
)
from service.bench.random_adapters import random_adapters
from service.bench.report import own_ratios, ratios_of, row_of
from service.bench.scenario import BASE, DISTINCT, NONE, Round, Scenario, job

RANK = 16
Figures = dict[str, Any]
Report = Callable[[str, int, int], None]


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
    precisions: tuple[Precision, ...] = ("exact",)  # of our own products over NF4, a peer for each
    peft_rounds: int | None = None  # None: as many as all
    gguf: Path | None = None  # where llama.cpp's weights are kept; None: no llama.cpp
    minutes: float = math.inf  # after these no row begins
    command: str = ""

    def setup(self, adapters: Sequence[Path], **more: Any) -> Setup:
        return Setup(self.directory, tuple(adapters), self.threads, more)

    def rounds_of(self, peer: str) -> int:
        return min(self.rounds, self.peft_rounds or self.rounds) if peer == PEFT else self.rounds

    @property
    def adapters(self) -> int:
        """How many of the assortment the scenarios use."""
        used = [a for s in self.scenarios for a in s.adapters if a is not None]
        return max(used, default=0) + 1


def compare(options: Options, report: Report) -> Figures:
    """The figures, ready for JSON. `report` hears what runs, and which of how many tries it is."""
    until = time.monotonic() + 60 * options.minutes
    report("the limits of this machine", 0, 1)
    limits = measure_limits(options.threads)
    report("memory of a process that only serves the base", 0, 1)
    memory, spec = _memory(options)
    with tempfile.TemporaryDirectory(prefix="nibble-bench-") as scratch, ExitStack() as stack:
        count = max(options.adapters, len(DISTINCT.adapters))
        adapters = random_adapters(Path(scratch), spec, count, RANK)
        peers, trials = _started(options, spec, adapters, stack, report)
        found = _measured(options, peers, spec, report, until)
        facts = {name: peer.facts() for name, peer in peers.items()}
    limits = better(limits, measure_limits(options.threads))
    rows = [row_of(row, rounds, options.prompt_tokens) for row, rounds in found.items()]
    machine = inspect()
    return {
        "model": options.model,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "threads": options.threads,
        "rounds": {peer: options.rounds_of(peer) for peer in peers},
        "lora_rank": RANK,
        "command": options.command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": asdict(machine) | {"versions": dict(machine.versions) | _versions()},
        "limits": asdict(limits),
        "results": [
            row | {"limit": _distance(options, each, row, facts, spec, limits)}
            for each, row in zip(found, rows, strict=True)
        ],
        "ratios": ratios_of(found),
        "own_ratios": own_ratios(found),
        "memory": memory,
        "peers": facts,
        "peft_trials": {dtype: round(rate, 2) for dtype, rate in trials.items()},
        "notes": _notes(options, facts, trials, spec),
    }


def _memory(options: Options) -> tuple[Figures, BaseSpec]:
    """Of a fresh process after its first request; the base alone, in the first precision."""
    setup = options.setup([], precision=options.precisions[0])
    with closing(PeerProcess(NIBBLE, NibblePeer, setup)) as peer:
        spec = peer.spec()
        first = job(BASE, 0, spec.vocab_size, options.prompt_tokens, options.new_tokens)
        peer.run(first, ENGINE)
        return peer.facts(), spec


def _started(
    options: Options, spec: BaseSpec, adapters: Sequence[Path], stack: ExitStack, report: Report
) -> tuple[dict[str, PeerProcess], dict[str, float]]:
    """Every peer, to be closed with the stack; and PEFT's rates in a trial of its dtypes."""
    peers: dict[str, PeerProcess] = {}
    trials: dict[str, float] = {}
    plain = adapters[: len(DISTINCT.adapters)]  # LoRAs: all that the others serve here

    def start(name: str, make: Callable[[], PeerProcess]) -> None:
        if any(ways_of(name, scenario) for scenario in options.scenarios):
            report(f"{name} starts", 0, 1)
            peers[name] = stack.enter_context(closing(make()))

    def nibble(name: str, given: Sequence[Path], precision: Precision) -> None:
        setup = options.setup(given, precision=precision)
        start(name, lambda: PeerProcess(name, NibblePeer, setup))

    def peft() -> PeerProcess:
        chosen, rates = anchor(
            lambda dtype: PeerProcess(PEFT, PeftPeer, options.setup(plain, dtype=dtype)),
            options.peft_dtypes,
            spec.vocab_size,
            options.prompt_tokens,
        )
        trials.update(rates)
        return chosen

    for precision in options.precisions:
        nibble(f"{NIBBLE} {precision}", adapters, precision)
    if NONE in options.scenarios:
        for precision in options.precisions:
            nibble(f"{NIBBLE} {precision}{BARE}", [], precision)
    if options.gguf is not None and not _without_llama(options, spec):
        more = {"gguf": str(options.gguf), "architecture": spec.architecture}
        setup = options.setup(plain, vocabulary=spec.vocab_size, **more)
        start(LLAMA, lambda: PeerProcess(LLAMA, LlamaPeer, setup))
    if options.peft_dtypes:
        start(PEFT, peft)
    for peer in peers.values():
        peer.facts()  # waits until it is ready, so that nobody loads while another is measured
    return peers, trials


def _measured(
    options: Options,
    peers: Mapping[str, PeerProcess],
    spec: BaseSpec,
    report: Report,
    until: float,
) -> dict[Contestant, list[Round]]:
    rows = contestants(options.scenarios, list(peers))
    rounds = {peer: options.rounds_of(peer) for peer in peers}
    tries = sum(1 for _ in order(rows, rounds))
    done = 0

    def count(row: Contestant) -> None:
        nonlocal done
        done += 1
        report(f"{row.scenario.name}, {row.peer}: {row.way}", done, tries)

    return measure(
        rows,
        peers,
        rounds=rounds,
        vocabulary=spec.vocab_size,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        report=count,
        until=until,
    )


def _distance(
    options: Options,
    row: Contestant,
    figures: Figures,
    facts: Mapping[str, Figures],
    spec: BaseSpec,
    limits: Limits,
) -> Figures | None:
    return distance(
        row.scenario,
        figures,
        facts[row.peer],
        multiply_adds(spec),
        limits,
        options.prompt_tokens,
        options.new_tokens,
    )


def _without_llama(options: Options, spec: BaseSpec) -> str:
    """Why llama.cpp is not measured though it was asked for; "" where it is."""
    if options.gguf is None:
        return ""
    if absent := missing():
        return f"{' and '.join(absent)} not installed: pip install '.[bench]'"
    if spec.architecture not in ARCHITECTURES:
        return f"its weights are written for {' and '.join(ARCHITECTURES)} only"
    return ""


def _notes(
    options: Options, facts: Mapping[str, Figures], trials: Mapping[str, float], spec: BaseSpec
) -> list[str]:
    """What a reader must know to believe the figures."""
    lines = []
    if reason := _without_llama(options, spec):
        lines.append(f"llama.cpp is not measured: {reason}")
    if len(trials) > 1:
        tried = ", ".join(f"{rate:.1f} tokens/s in {dtype}" for dtype, rate in trials.items())
        lines.append(f"PEFT's mixed batch in a short trial: {tried}; the faster is measured")
    if facts.get(PEFT, {}).get("repacked"):
        lines.append(
            "bitsandbytes repacked PEFT's weights for its fused kernel, which computes in bfloat16 "
            "whatever dtype the model has"
        )
    return lines


def _versions() -> dict[str, str]:
    """Of what only the bench uses, where it is installed."""
    found = {}
    for name in ("llama-cpp-python", "gguf"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
