"""`nibble base build full` and `nibble base build dapt`, which base/cli.py finds by entry point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from training.config import BuildConfig, assignments, read_schema
from training.terminal import console, print_json, quiet, refusals

full = typer.Typer(add_completion=False)
dapt = typer.Typer(add_completion=False)

FULL = {"method.kind": "full", "optim.learning_rate": 1e-4, "out": "new-base"}
DAPT = {
    **FULL,
    "data.raw": True,
    "data.packing": True,
    "data.deduplicate": True,
    "data.split": 0.05,
}

Config = Annotated[Path | None, typer.Argument(help="YAML; flags win over it.")]
Base = Annotated[
    str | None, typer.Option("--base", help="mini, a directory, or a hub id.", show_default="mini")
]
Data = Annotated[
    Path | None,
    typer.Option(help="As for nibble train run; for dapt .txt, .md, .jsonl, or a folder of them."),
]
Held = Annotated[Path | None, typer.Option("--eval", help="The same, held out.")]
Rate = Annotated[float | None, typer.Option("--lr", show_default="0.0001")]
Out = Annotated[Path | None, typer.Option(help="Where the base goes.", show_default="new-base")]
General = Annotated[
    Path | None, typer.Option(help="Text that the base knew: the loss on it shows forgetting.")
]
Tasks = Annotated[
    list[str] | None, typer.Option("--task", help="name=file of questions and right answers.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any field of the schema: --set data.max_length=256."),
]
Resume = Annotated[bool, typer.Option(help="Go on from the last checkpoint.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Begin anew where --out holds an earlier base.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]


def _command(defaults: Mapping[str, Any]) -> Callable[..., None]:
    """The options that both builds have, over the defaults of one."""

    def build(
        config: Config = None,
        base: Base = None,
        data: Data = None,
        eval_data: Held = None,
        learning_rate: Rate = None,
        steps: int | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        out: Out = None,
        general: General = None,
        task: Tasks = None,
        settings: Settings = None,
        resume: Resume = False,
        overwrite: Overwrite = False,
        as_json: Json = False,
    ) -> None:
        _build(locals(), defaults)

    return build


full.command(
    help="""Train every weight of a base in floating point: a new base, and a table before and
    after.

    Ctrl-C ends after the running step and leaves a base that is served, and a checkpoint.
    """
)(_command(FULL))
dapt.command(
    help="""Go on with the pretraining of a base on raw text of a domain; every token bears loss.

    Documents share rows and do not see each other; 5 % of the text is held out unless --eval or
    data.split says otherwise. Ctrl-C leaves a base that is served, and a checkpoint.
    """
)(_command(DAPT))


_FLAGS = {
    "base": "base",
    "data": "data.train",
    "eval_data": "data.eval",
    "learning_rate": "optim.learning_rate",
    "steps": "optim.steps",
    "batch_size": "optim.batch_size",
    "seed": "seed",
    "out": "out",
    "general": "measure.general",
}


def _build(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    as_json = bool(given["as_json"])
    with refusals(as_json), quiet(as_json):
        wanted = {field: given[flag] for flag, field in _FLAGS.items()}
        files = assignments(given["task"] or [])
        wanted |= {f"measure.tasks.{name}": file for name, file in files.items()}
        wanted |= assignments(given["settings"] or [])
        found = read_schema(BuildConfig, given["config"], wanted, defaults)
        from training.base_build import build, lines

        done, table = build(found, given["resume"], given["overwrite"])
    if as_json:
        print_json({"out": found.out, **done.figures(), "table": [asdict(row) for row in table]})
    elif table:
        shown = Table(found.out.name, "before", "after", "after, over NF4")
        for line in lines(table):
            shown.add_row(*line)
        console.print(shown)
        console.print(f"serve it: nibble serve --base {found.out}")
    if done.ended == "asked":
        raise typer.Exit(130)
