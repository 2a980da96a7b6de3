"""`nibble bench`."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from base.extras import install
from base.fingerprint import default_cache_dir
from base.kernels import Precision, bench_cuda
from base.kernels import bench as kernels
from base.machine import Machine, inspect
from base.mini import MINI
from base.random_model import SHAPES, random_model
from service.bench.apart import apart, heeding_sigterm
from service.bench.beside import Setting, beside_table
from service.bench.beside import measure as measure_beside
from service.bench.compare import Figures, compare
from service.bench.device import DEVICE, Asked
from service.bench.device import markdown as device_page
from service.bench.device import measure as measure_device
from service.bench.isa import BEYOND, VARIABLES, CannotHold, hold
from service.bench.llama_peer import missing
from service.bench.options import Options
from service.bench.performance import write_page
from service.bench.registered import REGISTERED
from service.bench.report import memory_table, own_table, rates_table, targets_table
from service.bench.residency_report import (
    check_markers,
    put_between_markers,
    residency_markdown,
)
from service.bench.scenario import FULL, SUITES, Scenario
from service.bench.start import START
from service.bench.zipf import Scene, scenes
from service.bench.zipf import measure as measure_zipf

DTYPES = ("float32", "bfloat16")
PARTS = (REGISTERED, START)  # of the full suite, beside its workloads
NAMES = tuple(f'"{name}"' for name in (*(scenario.name for scenario in FULL), *PARTS))
PRECISIONS: tuple[Precision, ...] = ("fast", "exact")


class Commands(TyperGroup):
    """Says what a word may be that is no option: a model without --model, as a rule."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            ctx.fail(
                f"got '{args[0]}', which is neither an option's value nor one of "
                f"{', '.join(self.commands)}. Models go to --model, workloads to --only, and "
                "llama.cpp's server to --llama-server."
            )
        return super().resolve_command(ctx, args)


PEERS, OUTPUT = "Who is measured", "What comes out"  # panels of --help

app = typer.Typer(
    help="Measure throughput and latency on this machine, beside PEFT's own loops.",
    add_completion=False,
    cls=Commands,
)
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
    peft: Annotated[bool, typer.Option(help="Measure PEFT too.", rich_help_panel=PEERS)] = True,
    peft_dtype: Annotated[
        str,
        typer.Option(
            help=f"{' or '.join(DTYPES)}; auto tries both and keeps the faster, or takes float32 "
            "where the CPU does not multiply bfloat16.",
            rich_help_panel=PEERS,
        ),
    ] = "auto",
    slow_rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of PEFT and transformers, which are slow (but not of PEFT's mixed batch, which a "
            "target rests on), and of every --precision but the first. Default: as --rounds.",
        ),
    ] = None,
    transformers: Annotated[
        bool,
        typer.Option(
            help="Measure transformers' continuous batching too, without adapters.",
            rich_help_panel=PEERS,
        ),
    ] = True,
    llama: Annotated[
        bool,
        typer.Option(
            help="Measure llama.cpp too, where llama-cpp-python is installed.",
            rich_help_panel=PEERS,
        ),
    ] = True,
    llama_server: Annotated[
        Path | None,
        typer.Option(
            help="llama.cpp's llama-server, measured over HTTP beside `nibble serve`. Default: the "
            "one on the path, if any.",
            rich_help_panel=PEERS,
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="Of nibble's products: exact or fast, once for each. Default: both.",
            rich_help_panel=PEERS,
        ),
    ] = None,
    isa: Annotated[
        str | None,
        typer.Option(
            help=f"Hold every peer to {' or '.join(VARIABLES)}, on a CPU that has more. llama.cpp "
            "has to be built for it. Default: the best that each can use.",
            rich_help_panel=PEERS,
        ),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help=f"The workloads: {', '.join(SUITES)}, or {DEVICE}: 16 bits, NF4, and NF4 with "
            "adapters, on --device."
        ),
    ] = "quick",
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Instead of a suite, once for each: {', '.join(NAMES)}."),
    ] = None,
    minutes: Annotated[
        float,
        typer.Option(min=0.1, help="After these no second round begins; default: no limit."),
    ] = math.inf,
    kernel: Annotated[
        bool, typer.Option("--kernel", help="The kernels alone, each beside the machine's limits.")
    ] = False,
    device: Annotated[
        str, typer.Option(help=f"cpu or cuda, of --kernel or --suite {DEVICE}.")
    ] = "cpu",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.", rich_help_panel=OUTPUT)
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(
            help="Write the page here, its chart beside it as .svg; with --kernel put their table "
            "into it.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Where random models are kept.")] = None,
) -> None:
    """Requests with and without adapters at once, one base, beside PEFT's loops and llama.cpp.

    Every peer has its own process and the same NF4 weights, adapters, prompts and threads; they
    take turns, round by round. llama.cpp has Q4_0 of the same weights. Adapters are of rank 16 on
    every linear layer unless the workload says otherwise.
    """
    if context.invoked_subcommand is not None:
        return
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"got {device}; cpu or cuda", param_hint="--device")
    for path, option in ((json_path, "--json"), (markdown, "--markdown")):
        check_place(path, option)
    if kernel:
        if unused := [name for name, given in (("--json", json_path), ("--isa", isa)) if given]:
            raise typer.BadParameter(
                f"not with {' or '.join(unused)}: it measures every instruction set of this CPU, "
                "and prints a table",
                param_hint="--kernel",
            )
        _products(device, threads, markdown)
        return
    command = shlex.join(["nibble", *sys.argv[1:]])
    if suite == DEVICE or device == "cuda":
        if isa is not None:
            raise typer.BadParameter(f"not with --suite {DEVICE}", param_hint="--isa")
        _on_device(
            Asked(
                model=model,
                directory=_on(device, model, cache),
                device=device,
                rounds=rounds,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                minutes=minutes,
                command=command,
            ),
            json_path,
            markdown,
        )
        return
    scenarios, parts = _asked(suite, only)
    server = _llama_server(llama_server) if llama else None
    machine = inspect()
    if isa is not None:
        machine = _held(isa, machine, llama=llama, server=server)
    options = Options(
        model=model,
        scenarios=scenarios,
        parts=parts,
        peft_dtypes=_dtypes(peft_dtype, machine) if peft else (),
        precisions=_precisions(precision),
        llama_server=server,
        directory=directory_of(model, cache),  # may take minutes, so last of what can be wrong
        rounds=rounds,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=threads,
        slow_rounds=slow_rounds,
        minutes=minutes,
        transformers=transformers,
        gguf=_gguf_of(model, cache) if llama else None,
        isa=isa or "",
        command=command,
    )
    figures = _compare(options)
    _show(figures)
    _write_json(figures, json_path)
    if markdown:
        write_page(figures, markdown)


def check_place(path: Path | None, option: str) -> None:
    """A file can be written there: better said now than after a quarter of an hour."""
    if path is None:
        return
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a directory; a file is needed", param_hint=option)
    where = path.absolute().parent
    if not (where.is_dir() and os.access(where, os.W_OK)):
        why = "cannot be written to" if where.exists() else "is not there"
        raise typer.BadParameter(f"{path}: the directory {where} {why}", param_hint=option)


def _on(device: str, model: str, cache: Path | None) -> Path:
    """The model's directory, for a device that is there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device here", param_hint="--device")
    return directory_of(model, cache)


def _on_device(asked: Asked, json_path: Path | None, page: Path | None) -> None:
    with console.status("starting") as status:
        figures = measure_device(asked, status.update)
    text = device_page(figures)
    console.print(Markdown(text))
    _write_json(figures, json_path)
    if page:
        page.write_text(text, encoding="utf-8")


def _products(device: str, threads: int, markdown: Path | None) -> None:
    """The kernels alone."""
    if device == "cuda":
        bench_cuda.main([])
    else:
        page = ["--markdown", str(markdown)] if markdown else []
        kernels.main(["--threads", str(threads), *page])


def _asked(suite: str, only: list[str] | None) -> tuple[tuple[Scenario, ...], tuple[str, ...]]:
    """(workloads, parts) of a suite, or those that were named."""
    if suite not in SUITES:
        raise typer.BadParameter(
            f"got {suite}; {', '.join(SUITES)} or {DEVICE}", param_hint="--suite"
        )
    if not only:
        return SUITES[suite], PARTS if suite == "full" else ()
    if unknown := [name for name in only if f'"{name}"' not in NAMES]:
        raise typer.BadParameter(
            f"got {', '.join(unknown)}; there are {', '.join(NAMES)}", param_hint="--only"
        )
    return tuple(each for each in FULL if each.name in only), tuple(p for p in PARTS if p in only)


def _llama_server(wanted: Path | None) -> Path | None:
    """The program, by default the one on the path."""
    if wanted is None:
        found = shutil.which("llama-server")
        return Path(found) if found else None
    if not (wanted.is_file() and os.access(wanted, os.X_OK)):
        why = "is no program that can be run" if wanted.exists() else "is not there"
        raise typer.BadParameter(f"{wanted} {why}", param_hint="--llama-server")
    if absent := missing():
        raise typer.BadParameter(
            f"its weights are written with {' and '.join(absent)}: {install('bench')}",
            param_hint="--llama-server",
        )
    return wanted.absolute()


def _held(isa: str, machine: Machine, *, llama: bool, server: Path | None) -> Machine:
    """The machine as those see it that are held to an instruction set."""
    try:
        hold(isa, machine, llama=llama, server=server)
    except CannotHold as error:
        raise typer.BadParameter(str(error), param_hint="--isa") from error
    return replace(machine, features=tuple(f for f in machine.features if not f.startswith(BEYOND)))


def _write_json(figures: Figures, path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _dtypes(wanted: str, machine: Machine) -> tuple[str, ...]:
    """What PEFT is tried in. Emulated bfloat16 takes minutes for a figure that nobody wants."""
    if wanted not in ("auto", *DTYPES):
        raise typer.BadParameter(
            f"got {wanted}; auto, {' or '.join(DTYPES)}", param_hint="--peft-dtype"
        )
    if wanted != "auto":
        return (wanted,)
    return DTYPES if any("bf16" in name for name in machine.features) else ("float32",)


def _precisions(wanted: list[str] | None) -> tuple[Precision, ...]:
    if unknown := set(wanted or ()) - set(PRECISIONS):
        raise typer.BadParameter(
            f"got {', '.join(sorted(unknown))}; {' or '.join(PRECISIONS)}", param_hint="--precision"
        )
    return tuple(each for each in PRECISIONS if not wanted or each in wanted)


def _gguf_of(model: str, cache: Path | None) -> Path:
    """Where llama.cpp's weights of this model are kept. A directory is known by its whole path."""
    name = model if model in (*SHAPES, "mini") else quote(str(Path(model).resolve()), safe="")
    return (cache or default_cache_dir() / "bench") / "gguf" / f"{name}.words.q4_0.gguf"


def directory_of(model: str, cache: Path | None) -> Path:
    """Where the model is; a random one is written first, where it is not there yet."""
    cache = cache or default_cache_dir() / "bench"
    if model == "mini":
        return MINI
    if model in SHAPES:
        with console.status(f"{model} in {cache}"):
            return random_model(model, cache)
    if not Path(model).is_dir():
        raise typer.BadParameter(
            f"got {model}; a directory with a model, mini, {' or '.join(SHAPES)}",
            param_hint="--model",
        )
    return Path(model)


@app.command(name="beside-training")
def beside_training(
    model: Annotated[str, typer.Option(help="As above.")] = "mini",
    rounds: Annotated[int, typer.Option(min=1, help="Of each sort, in turns.")] = 6,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of each round.")] = 10.0,
    clients: Annotated[int, typer.Option(min=1, help="That ask at once.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA that is trained.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Of its steps.")] = 8,
    job_nice: Annotated[int | None, typer.Option(help="As of `nibble serve`.")] = None,
    job_threads: Annotated[int | None, typer.Option(help="As of `nibble serve`.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Where random models are kept.")] = None,
) -> None:
    """What a training job costs those who generate beside it: p50 and p95, with and without."""
    given = {"--job-nice": job_nice, "--job-threads": job_threads}
    setting = Setting(
        model=directory_of(model, cache),
        rounds=rounds,
        seconds=seconds,
        clients=clients,
        new_tokens=new_tokens,
        rank=rank,
        batch_size=batch_size,
        flags=[text for k, v in given.items() if v is not None for text in (k, str(v))],
    )
    with console.status("starting the server and the job") as status:
        figures = measure_beside(
            setting, lambda sort, number: status.update(f"round {number + 1}: {sort}")
        )
    console.print(beside_table(figures))
    _write_json(figures, json_path)


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
            with heeding_sigterm(), console.status(f"{name}: {scene.registered} adapters"):
                rows.append({"model": name, **apart(measure_zipf, scene)})
    figures = {"machine": asdict(inspect()), "rows": rows}
    text = residency_markdown(figures)
    console.print(text, markup=False, soft_wrap=True)
    _write_json(figures, json_path)
    if markdown:
        put_between_markers(markdown, text)


def _compare(options: Options) -> Figures:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with heeding_sigterm(), Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=1)
        return compare(
            options,
            lambda what, done, tries: progress.update(
                bar, description=what, completed=done, total=tries
            ),
        )


def _show(figures: Figures) -> None:
    console.print(rates_table(figures["results"], figures["ratios"]))
    if figures["own_ratios"]:
        console.print(own_table(figures["own_ratios"]))
    console.print(memory_table(figures["memory"]))
    console.print(targets_table(figures["targets"]))
    for note in figures["notes"]:
        console.print(note)
