"""One whole comparison: every peer started, driven and closed; out come the figures."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from base.extras import install
from base.machine import inspect
from base.mini import MINI
from base.spec import BaseSpec
from service.bench import registered
from service.bench.apart import apart
from service.bench.gguf_files import ARCHITECTURES
from service.bench.limits import Limits, better, distance, measure_limits, multiply_adds
from service.bench.llama_peer import missing
from service.bench.nibble_peer import ENGINE, NibblePeer
from service.bench.options import Options, Report
from service.bench.peer import PeerProcess
from service.bench.plan import NIBBLE, PEFT, SLOW, Contestant, contestants, measure, order, own_rows
from service.bench.random_adapters import random_adapters
from service.bench.report import own_ratios, ratios_of, row_of
from service.bench.roster import Roster
from service.bench.scenario import BASE, DISTINCT, Round, job
from service.bench.start import START, budget, floor_seconds, measure_starts
from service.bench.targets import reached

RANK = 16
CLOSE_ROUNDS = 4  # more than the others: they are short, and what they differ by is small
SIDE_BY_SIDE = 1000  # numbers of rounds that no other row has
Figures = dict[str, Any]


def compare(options: Options, report: Report) -> Figures:
    """The figures, ready for JSON. `report` hears what runs, and which of how many tries it is."""
    until = time.monotonic() + 60 * options.minutes
    report("the limits of this machine", 0, 1)
    limits = measure_limits(options.threads)
    report("memory of a process that only serves the base", 0, 1)
    memory, spec = _memory(options)
    starts = _starts(options, memory, report)
    many = _registered(options, report)
    with tempfile.TemporaryDirectory(prefix="nibble-bench-") as scratch, ExitStack() as stack:
        count = max(options.adapters, len(DISTINCT.adapters))
        adapters = random_adapters(Path(scratch), spec, count, RANK)
        without = _without_llama(options, spec)
        roster = Roster(options, spec, adapters, stack, report)
        peers = roster.start(llama=options.gguf is not None and not without)
        found = _measured(options, peers, spec, report, roster.failed, until)
        close = _close(options, peers, spec, report)
        facts = {name: peer.facts() for name, peer in peers.items() if name not in roster.failed}
    limits = better(limits, measure_limits(options.threads))
    rows = [row_of(row, rounds, options.prompt_tokens) for row, rounds in found.items()]
    return {
        **_setting(options),
        "limits": asdict(limits),
        "results": [
            row
            | {"rounds": options.rounds_of(each)}
            | {"limit": _distance(options, each, row, facts, spec, limits)}
            for each, row in zip(found, rows, strict=True)
        ],
        "ratios": ratios_of(found),
        "own_ratios": own_ratios(found, close),
        "side_by_side": bool(close),
        "targets": reached(found, options.precisions[0], many, starts, close),
        "memory": memory,
        "registered": many,
        "starts": starts,
        "peers": facts,
        "peft_trials": {dtype: round(rate, 2) for dtype, rate in roster.trials.items()},
        "notes": [
            *_notes(options, facts, roster.trials, without),
            *(f"{name} failed and is left out: {why}" for name, why in roster.failed.items()),
        ],
    }


def _setting(options: Options) -> Figures:
    """What was asked for, when and on which machine."""
    machine = inspect()
    return {
        "model": options.model,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "threads": options.threads,
        "isa": options.isa,
        "lora_rank": RANK,
        "command": options.command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": asdict(machine) | {"versions": dict(machine.versions) | _versions()},
    }


def _starts(options: Options, memory: Figures, report: Report) -> list[Figures]:
    """Starts of the embedded base and of this one, which is held against its budget."""
    if START not in options.parts:
        return []
    own = {options.model: options.directory}
    found, precision = [], options.precisions[0]
    floor = floor_seconds()
    for model, directory in ({"mini": MINI} | own).items():
        report(f"starts of {model}", 0, 1)
        vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
        ask = job(BASE, 0, vocabulary, options.prompt_tokens, options.new_tokens)
        row = measure_starts(directory, precision, options.threads, ask)
        row |= {"model": model, "import_torch_seconds": floor}
        if model == options.model:
            tokens = options.prompt_tokens + options.new_tokens
            row["budget_bytes"] = budget(memory, tokens * memory["token_bytes"])
        found.append(row)
    return found


def _registered(options: Options, report: Report) -> Figures | None:
    if registered.REGISTERED not in options.parts:
        return None
    report("many registered adapters", 0, 1)
    setting = registered.Setting(
        options.directory, options.precisions[0], options.threads, options.rounds, RANK
    )
    return apart(registered.measure, setting)


def _memory(options: Options) -> tuple[Figures, BaseSpec]:
    """Of a fresh process after its first request; the base alone, in the first precision."""
    setup = options.setup([], precision=options.precisions[0])
    with closing(PeerProcess(NIBBLE, NibblePeer, setup)) as peer:
        spec = peer.spec()
        first = job(BASE, 0, spec.vocab_size, options.prompt_tokens, options.new_tokens)
        peer.run(first, ENGINE)
        return peer.facts(), spec


def _measured(
    options: Options,
    peers: Mapping[str, PeerProcess],
    spec: BaseSpec,
    report: Report,
    failed: dict[str, str],
    until: float,
) -> dict[Contestant, list[Round]]:
    rows = contestants(options.scenarios, list(peers))
    rounds = {row: options.rounds_of(row) for row in rows}
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
        failed=failed,
        until=until,
    )


def _close(
    options: Options, peers: Mapping[str, PeerProcess], spec: BaseSpec, report: Report
) -> dict[Contestant, list[Round]]:
    """What nibble's own ratios are of: its rows once more, with nobody else's in between."""
    rows = own_rows(contestants(options.scenarios, list(peers)), options.precisions[0])
    if len(rows) < 2:
        return {}
    return measure(
        rows,
        peers,
        rounds=dict.fromkeys(rows, options.rounds + CLOSE_ROUNDS),
        vocabulary=spec.vocab_size,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        report=lambda row: report(f"{row.scenario.name}, {row.peer}, side by side", 0, 1),
        failed={},
        first=SIDE_BY_SIDE,
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
        return f"{' and '.join(absent)} not installed: {install('bench')}"
    if spec.architecture not in ARCHITECTURES:
        return f"its weights are written for {' and '.join(ARCHITECTURES)} only"
    return ""


def _notes(
    options: Options, facts: Mapping[str, Figures], trials: Mapping[str, float], without: str
) -> list[str]:
    """What a reader must know to believe the figures; `without`: why there is no llama.cpp."""
    lines = []
    if without:
        lines.append(f"llama.cpp is not measured: {without}")
    elif options.gguf is not None and options.llama_server is None:
        lines.append(
            "llama.cpp's server is not measured: none is on the path, and --llama-server named none"
        )
    if len(trials) > 1:
        tried = ", ".join(f"{rate:.1f} tokens/s in {dtype}" for dtype, rate in trials.items())
        lines.append(f"PEFT's mixed batch in a short trial: {tried}; the faster is measured")
    if facts.get(PEFT, {}).get("repacked"):
        lines.append(
            "bitsandbytes repacked PEFT's weights for its fused kernel, which computes in bfloat16 "
            "whatever dtype the model has"
        )
    if options.isa and not facts.keys().isdisjoint(SLOW):
        lines.append(
            f"bitsandbytes has no switch for its loops over 4-bit weights: in the peers over it "
            f"what is more than {options.isa} is struck from what its library read of the "
            "processor, so that it runs what a CPU without runs, to the same bits"
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
