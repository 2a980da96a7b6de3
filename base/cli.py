"""`nibble base`: build, evaluate and describe the embedded base."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from enum import StrEnum
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from base.mini import MINI

if TYPE_CHECKING:
    from base.mini.precision import Movement

GROUP = "nibble.base_builds"  # what an installed package brings: a Typer app of one command each
app = typer.Typer(help="Make bases, and measure the embedded one.", no_args_is_help=True)
builds = typer.Typer(help="Make a base: the embedded one, or another from one.")
app.add_typer(builds, name="build", no_args_is_help=True)


class Name(StrEnum):
    mini = "mini"


class KVDtype(StrEnum):
    bfloat16 = "bfloat16"
    int8 = "int8"


class Precision(StrEnum):
    exact = "exact"
    fast = "fast"


BUILD = "build mini --out DIR"
KNOWN = {
    "full": "A new base from one in floating point, by training every weight.",
    "dapt": "The same from raw text of a domain: .txt, .md, .jsonl, or a folder of them.",
}
Which = Annotated[Name, typer.Argument(help="The embedded base.")]
Where = Annotated[Path, typer.Option(help="The directory of the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]


@builds.command(name="mini")
def build_mini(
    out: Annotated[Path, typer.Option(help="Where the model goes.")] = Path("mini"),
    seed: int = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Length of the schedule.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="End the schedule by then, however slow.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """The embedded base: train it from a seed, on a GPU where there is one."""
    # Before torch loads: a thread that spins at a barrier starves the other one on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from base.mini.build import STEPS, Budget
    from base.mini.build import build as train

    aside = redirect_stdout(sys.stderr) if as_json else nullcontext()  # its progress
    with _refusals(as_json), aside:
        train(out, seed=seed, budget=Budget(steps or STEPS, minutes), resume=resume)
    if as_json:
        _print_json({"out": str(out)})
    else:
        Console().print(f"mini is in {out}")


def _print_json(value: object) -> None:
    """One line for programs."""
    typer.echo(json.dumps(value, ensure_ascii=False))


@contextmanager
def _refusals(as_json: bool) -> Iterator[None]:
    """What the user can put right ends in one line and with 2."""
    try:
        yield
    except ValueError as error:
        if as_json:
            _print_json({"error": {"message": str(error), "next": "", "field": None}})
        else:
            Console(stderr=True).print(f"[bold red]refused:[/] {escape(str(error))}")
        raise typer.Exit(2) from None


def _needs(directory: Path, **files: str) -> None:
    """Raises ValueError where `directory` lacks one of `files`, {stem: what makes it}."""
    for stem, maker in files.items():
        if not (directory / f"{stem}.json").is_file():
            raise ValueError(f"{directory} has no {stem}.json: `nibble base {maker}` makes it")


def _register(point: EntryPoint) -> None:
    """A build that the training wing brings; nothing of it is imported until it is asked for."""

    def run(ctx: typer.Context) -> None:
        point.load()(args=ctx.args, prog_name=f"nibble base build {point.name}")

    builds.command(
        point.name,
        help=KNOWN.get(point.name, f"A build of {point.value}."),
        add_help_option=False,
        context_settings={
            "allow_extra_args": True,
            "ignore_unknown_options": True,
            "allow_interspersed_args": False,
        },
    )(run)


for _point in entry_points(group=GROUP):
    _register(_point)


@app.command()
def evaluate(
    name: Which,
    directory: Where = MINI,
    card: Annotated[bool, typer.Option(help="Write the model card too.")] = True,
    precision: Annotated[
        Precision, typer.Option(help="fast: measure instead what products in 8 bits change.")
    ] = Precision.exact,
    kv_dtype: Annotated[
        KVDtype | None, typer.Option(help="Measure instead what a KV cache of this dtype changes.")
    ] = None,
    items: Annotated[
        int, typer.Option(min=1, help="With fast or a KV dtype: held-out items of each sort.")
    ] = 25,
    as_json: Json = False,
) -> None:
    """Measure the base on held-out data, fp32 and NF4 side by side."""
    with _refusals(as_json):
        _needs(directory, config=BUILD, tokenizer=BUILD)
    if precision is Precision.fast or kv_dtype:
        _compare(directory, items, kv_dtype, as_json)
        return
    from base.mini import card as model_card
    from base.mini.evaluate import evaluate as measure

    result = measure(directory)
    if as_json:
        _print_json(result)
    else:
        table = Table("held out", "fp32", "NF4", title=name.value)
        for group in ("context", "tasks", "loss"):
            for row, value in result["fp32"][group].items():
                table.add_row(f"{group}: {row}", f"{value:.3f}", f"{result['nf4'][group][row]:.3f}")
        Console().print(table)
    if card:
        model_card.write(directory)


def _compare(directory: Path, items: int, kv_dtype: KVDtype | None, as_json: bool) -> None:
    """Print what `fast`, or a KV cache of another dtype, moves; the status is 1 where that is too
    much for a default."""
    from base.mini.evaluate import Size
    from base.mini.precision import BOUND, compare, compare_kv

    size = Size(items, 2 * items, items)
    if kv_dtype is None:
        moved = compare(directory, size)
    else:
        import torch

        moved = compare_kv(directory, getattr(torch, kv_dtype.value), size)
    if as_json:
        _print_json({**asdict(moved), "summary": moved.summary, "within": moved.within_bound})
    else:
        _show(moved, kv_dtype, BOUND)
    if not moved.within_bound:
        raise typer.Exit(1)


def _show(moved: Movement, kv_dtype: KVDtype | None, bound: float) -> None:
    other = kv_dtype.value if kv_dtype else "fast"
    title = "keys and values" if kv_dtype else "precision"
    table = Table("held out", "exact", other, "movement", title=title)
    for group, rows in moved.exact.items():
        for row, value in rows.items():
            change = f"{100 * moved.of(group, row):+.2f} %"
            table.add_row(
                f"{group}: {row}", f"{value:.4f}", f"{moved.fast[group][row]:.4f}", change
            )
    console = Console()
    console.print(table)
    errors = ", ".join(f"{name} {100 * error:.2f} %" for name, error in moved.layers.items())
    console.print(f"error, of the norm: {errors}")
    figures = ", ".join(f"{name} {100 * value:+.2f} %" for name, value in moved.summary.items())
    verdict = "within" if moved.within_bound else "beyond"
    console.print(f"moved: {figures}: {verdict} the {100 * bound} % that a default may cost")


@app.command()
def card(name: Which, directory: Where = MINI, as_json: Json = False) -> None:
    """Write the model card from what was measured."""
    from base.mini import card as model_card

    with _refusals(as_json):
        _needs(directory, config=BUILD, training=BUILD, evaluation="evaluate mini --directory DIR")
        written = model_card.write(directory)
    if as_json:
        _print_json({"card": str(written)})
    else:
        Console().print(written)
