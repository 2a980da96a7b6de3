"""`nibble bench`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from base.fingerprint import default_cache_dir
from base.machine import inspect
from base.mini import MINI
from service.bench.compare import Figures, Options, compare
from service.bench.random_model import SHAPES, random_model
from service.bench.report import memory_table, rates_table
from service.bench.residency_report import (
    check_markers,
    put_between_markers,
    residency_markdown,
)
from service.bench.scenario import SCENARIOS
from service.bench.zipf import Scene, measure_apart, scenes

DTYPES = ("float32", "bfloat16")

app = typer.Typer(help="Measure throughput and latency on this machine, beside PEFT's own loops.")
console = Console()


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
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
    if context.invoked_subcommand is not None:
        return
    names = [scenario.name for scenario in SCENARIOS]
    if unknown := set(only or ()) - set(names):
        raise typer.BadParameter(f"--only {sorted(unknown)}: any of {names} is needed")
    if peft_dtype not in ("auto", *DTYPES):
        raise typer.BadParameter(f"--peft-dtype {peft_dtype}: auto, {' or '.join(DTYPES)}")
    dtypes = DTYPES if peft_dtype == "auto" else (peft_dtype,)
    options = Options(
        model=model,
        directory=directory_of(model, cache),
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


def directory_of(model: str, cache: Path | None) -> Path:
    """Where the model is; a random one is written first, where it is not there yet."""
    cache = cache or default_cache_dir() / "bench"
    if model == "mini":
        return MINI
    if model in SHAPES:
        with console.status(f"{model} in {cache}"):
            return random_model(model, cache)
    if not Path(model).is_dir():
        raise typer.BadParameter(f"--model {model}: a directory, mini or {', '.join(SHAPES)}")
    return Path(model)


@app.command()
def zipf(
    model: Annotated[
        list[str] | None, typer.Option(help="As above; once for each base. Default: both.")
    ] = None,
    registered: Annotated[
        list[int] | None, typer.Option(min=1, help="Adapters in the store; once for each number.")
    ] = None,
    resident: Annotated[int, typer.Option(min=1, help="Adapters that memory has room for.")] = 32,
    requests: Annotated[int, typer.Option(min=1, help="Of each row.")] = 400,
    clients: Annotated[int, typer.Option(min=1, help="That ask at once.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 16,
    new_tokens: Annotated[int, typer.Option(min=1)] = 8,
    rank: Annotated[int, typer.Option(min=1, help="Of every LoRA.")] = 8,
    modules: Annotated[str, typer.Option(help="Layers that the LoRAs are on.")] = "q_proj,v_proj",
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Put the tables into this file, between its markers.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Where random models are kept.")] = None,
) -> None:
    """Many registered adapters, few of them in memory, requests by Zipf's law; and what one more
    costs. Each row has a process of its own."""
    if markdown:
        try:
            check_markers(markdown)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"--markdown {markdown}: {error}") from error
    rows = []
    for name in model or ["mini", "qwen2-0.4b"]:
        common = Scene(
            model=directory_of(name, cache),
            registered=1,
            resident=resident,
            requests=requests,
            clients=clients,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rank=rank,
            modules=tuple(modules.split(",")),
            threads=threads,
        )
        for scene in scenes(common, registered or [1, 8, 64, 1000]):
            with console.status(f"{name}: {scene.registered} adapters"):
                rows.append({"model": name, **measure_apart(scene)})
    figures = {"machine": asdict(inspect()), "rows": rows}
    text = residency_markdown(figures)
    console.print(text, markup=False, soft_wrap=True)
    if json_path:
        json_path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if markdown:
        put_between_markers(markdown, text)


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
