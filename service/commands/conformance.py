"""`nibble conformance`: does every kind of adapter give what PEFT gives, in any batch?"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from service.commands.output import fail

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    base: Annotated[
        list[str] | None, typer.Option(help="mini, or a tiny random architecture; all by default.")
    ] = None,
    kind: Annotated[list[str] | None, typer.Option(help="A kind by its name; all if none.")] = None,
    timed: Annotated[bool, typer.Option(help="Measure the CPU time of a step too.")] = True,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    update: Annotated[
        Path | None, typer.Option(help="Write the table between the marks of this Markdown file.")
    ] = None,
) -> None:
    """Check every kind of adapter on the embedded base and on two tiny random architectures.

    For each: a mixed batch against the same row alone, PEFT alone, a reload, merged weights, the
    start of training, and the road from PEFT's files over HTTP. Ends with status 1 when one fails.
    """
    from transformers.utils import logging  # imports torch: seconds

    from service.conformance.report import as_json, legend, table
    from service.conformance.report import update as write_table
    from service.conformance.suite import BASES, Options, served_kinds
    from service.conformance.suite import run as run_suite
    from service.conformance.tiny import ARCHITECTURES

    _one_of("--base", base, ("mini", *ARCHITECTURES))
    _one_of("--kind", kind, served_kinds())
    logging.disable_progress_bar()
    options = Options(tuple(base or BASES), tuple(kind or ()), timed)
    with tempfile.TemporaryDirectory(prefix="nibble-conformance-") as home:
        rows = run_suite(options, Path(home), lambda line: typer.echo(line, err=True))
    typer.echo(f"{table(rows)}\n{legend(options.bases)}")
    if json_path:
        json_path.write_text(json.dumps(as_json(rows), indent=2) + "\n", encoding="utf-8")
    if update:
        try:
            write_table(update, rows)
        except (OSError, ValueError) as error:
            fail(str(error), "Put both marks where the table belongs, and run it again.")
    failed = [row for row in rows if row.failed]
    for row in failed:
        for name in row.failed:
            cell = row.cells[name]
            typer.echo(f"{row.kind} on {row.base}, {name}: {cell.error} {cell.note}", err=True)
    if failed:
        raise typer.Exit(1)


def _one_of(flag: str, given: list[str] | None, known: tuple[str, ...]) -> None:
    unknown = sorted(set(given or ()) - set(known))
    if unknown:
        raise typer.BadParameter(f"{flag} {unknown[0]}: expected one of {', '.join(known)}")
