"""`nibble bench`."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from base.fingerprint import default_cache_dir
from base.machine import inspect
from base.mini import MINI
from base.spec import BaseSpec
from service.bench.nibble_peer import ENGINE, NibblePeer
from service.bench.peer import PeerProcess, Setup
from service.bench.peft_peer import PeftPeer
from service.bench.plan import NIBBLE, Contestant, contestants, measure
from service.bench.random_adapters import random_adapters
from service.bench.random_model import SHAPES, random_model
from service.bench.report import memory_table, rates_table, ratios_of, row_of
from service.bench.scenario import BASE, DISTINCT, SCENARIOS, job

RANK = 16
PEFT_DTYPES = {"peft fp32": "float32", "peft bf16": "bfloat16"}

app = typer.Typer(help="Measure throughput and latency on this machine, beside PEFT's own loops.")
console = Console()


@app.command()
def bench(
    model: Annotated[
        str, typer.Option(help=f"{', '.join(SHAPES)} (random weights), mini, or a directory.")
    ] = "qwen2-0.4b",
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds of each row.")] = 3,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    threads: Annotated[int, typer.Option(min=1, help="Of every peer.")] = os.cpu_count() or 1,
    peft: Annotated[bool, typer.Option(help="Measure PEFT too.")] = True,
    bf16: Annotated[bool, typer.Option(help="PEFT in bfloat16 as well.")] = True,
    only: Annotated[list[str] | None, typer.Option(help="A scenario by its name.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Where random models are kept.")] = None,
) -> None:
    """One base request, one adapter, eight with the same and eight with distinct LoRAs at once.

    Every peer has its own process and the same NF4 weights, adapters, prompts and threads; they
    take turns, round by round. Adapters are LoRAs of rank 16 on every linear layer.
    """
    scenarios = [each for each in SCENARIOS if not only or each.name in only]
    if not scenarios:
        raise typer.BadParameter(f"one of {[each.name for each in SCENARIOS]} is needed", None)
    directory = _model(model, cache or default_cache_dir() / "bench")
    with console.status("a process that only serves the base"):
        memory, spec = _memory(directory, threads, prompt_tokens, new_tokens)
    with tempfile.TemporaryDirectory(prefix="nibble-bench-") as scratch:
        adapters = random_adapters(Path(scratch), spec, len(DISTINCT.adapters), RANK)
        with ExitStack() as stack:
            peers = {NIBBLE: PeerProcess(NIBBLE, NibblePeer, _setup(directory, adapters, threads))}
            for name, dtype in PEFT_DTYPES.items():
                if peft and (bf16 or dtype == "float32"):
                    setup = _setup(directory, adapters, threads, dtype=dtype)
                    peers[name] = PeerProcess(name, PeftPeer, setup)
            for peer in peers.values():
                stack.enter_context(closing(peer))
            rows = contestants(scenarios, list(peers))
            with _progress() as progress:
                bar = progress.add_task("warm up", total=len(rows) * (rounds + 1))

                def report(row: Contestant) -> None:
                    description = f"{row.scenario.name}, {row.peer}: {row.way}"
                    progress.update(bar, advance=1, description=description)

                found = measure(
                    rows,
                    peers,
                    rounds=rounds,
                    vocabulary=spec.vocab_size,
                    prompt_tokens=prompt_tokens,
                    new_tokens=new_tokens,
                    report=report,
                )
            facts = {name: peer.facts() for name, peer in peers.items()}
    results = [row_of(row, found[row]) for row in rows]
    ratios = ratios_of(found)
    console.print(rates_table(results, ratios))
    console.print(memory_table(memory))
    for name, fact in facts.items():
        if fact.get("repacked"):
            console.print(f"{name}: bitsandbytes repacked its weights for its fused bf16 kernel")
    if json_path:
        figures = {
            "model": model,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "threads": threads,
            "rounds": rounds,
            "lora_rank": RANK,
            "machine": asdict(inspect()),
            "results": results,
            "ratios": ratios,
            "memory": memory,
            "peers": facts,
        }
        json_path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _model(name: str, cache: Path) -> Path:
    if name == "mini":
        return MINI
    if name in SHAPES:
        with console.status(f"writing {name} to {cache}"):
            return random_model(name, cache)
    if not Path(name).is_dir():
        raise typer.BadParameter(f"{name!r} is no directory, nor mini or one of {list(SHAPES)}")
    return Path(name)


def _setup(directory: Path, adapters: list[Path], threads: int, **options: Any) -> Setup:
    return Setup(directory, tuple(adapters), threads, options)


def _memory(
    directory: Path, threads: int, prompt_tokens: int, new_tokens: int
) -> tuple[dict[str, Any], BaseSpec]:
    """Of a fresh process after its first request; the base alone."""
    with closing(PeerProcess(NIBBLE, NibblePeer, _setup(directory, [], threads))) as peer:
        spec = peer.spec()
        peer.run(job(BASE, 0, spec.vocab_size, prompt_tokens, new_tokens), ENGINE)
        return peer.facts(), spec


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console)
