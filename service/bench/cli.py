"""`nibble bench`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from base.fingerprint import default_cache_dir
from base.mini import MINI
from service.bench.compare import Figures, Options, compare
from service.bench.random_model import SHAPES, random_model
from service.bench.report import memory_table, rates_table
from service.bench.scenario import SCENARIOS

DTYPES = ("float32", "bfloat16")

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
    peft_dtype: Annotated[
        str, typer.Option(help=f"{' or '.join(DTYPES)}; auto tries both and keeps the faster.")
    ] = "auto",
    precision: Annotated[
        Literal["exact", "fast"], typer.Option(help="Of nibble's products: float32, or 8 bits.")
    ] = "fast",
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
    names = [scenario.name for scenario in SCENARIOS]
    if unknown := set(only or ()) - set(names):
        raise typer.BadParameter(f"--only {sorted(unknown)}: any of {names} is needed")
    if peft_dtype not in ("auto", *DTYPES):
        raise typer.BadParameter(f"--peft-dtype {peft_dtype}: auto, {' or '.join(DTYPES)}")
    dtypes = DTYPES if peft_dtype == "auto" else (peft_dtype,)
    options = Options(
        model=model,
        directory=_directory(model, cache or default_cache_dir() / "bench"),
        scenarios=tuple(each for each in SCENARIOS if not only or each.name in only),
        rounds=rounds,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=threads,
        peft_dtypes=dtypes if peft else (),
        precision=precision,
    )
    figures = _compare(options)
    _show(figures)
    if json_path:
        json_path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _directory(model: str, cache: Path) -> Path:
    if model == "mini":
        return MINI
    if model in SHAPES:
        with console.status(f"{model} in {cache}"):
            return random_model(model, cache)
    if not Path(model).is_dir():
        raise typer.BadParameter(f"--model {model}: a directory, mini or {', '.join(SHAPES)}")
    return Path(model)


def _compare(options: Options) -> Figures:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=1)
        return compare(
            options,
            lambda what, done, tries: progress.update(
                bar, description=what, completed=done, total=tries
            ),
        )


def _show(figures: Figures) -> None:
    console.print(rates_table(figures["results"], figures["ratios"]))
    console.print(memory_table(figures["memory"]))
    for note in figures["notes"]:
        console.print(note)
