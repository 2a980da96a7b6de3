"""What a command prints: a result, as text or as JSON, and a failure with its next step."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table that never cuts a value: what is printed can be copied."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", header_style="bold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # Names come from users: no markup. Where nobody looks at it, no wrapping either.
    width = None if sys.stdout.isatty() else 1000
    Console(markup=False, highlight=False, width=width).print(table)


def fail(
    message: str,
    next_step: str = "",
    *,
    as_json: bool = False,
    status: int = 1,
    field: str | None = None,
) -> NoReturn:
    """Print what went wrong and what to do about it, then end with `status`."""
    if as_json:
        error: Mapping[str, str | None]
        error = {"message": message, "next": next_step, "field": field}
        print_json({"error": error})
    else:
        typer.echo(f"nibble: {message}", err=True)
        if next_step:
            typer.echo(next_step, err=True)
    raise typer.Exit(status)
