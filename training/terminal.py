"""What a run shows on a terminal: its progress, and a refusal in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from base.errors import UnservableBase
from training.errors import TrainingError

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.recipe import Step

_REMEMBERED = 0.9  # of the speed so far, at each step

console = Console()


def progress(shown: bool = True) -> Progress:
    """A bar with what is done of what, the time it took and the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not shown
    )


def bar(shown: Progress, name: str, config: TrainConfig) -> Callable[[Step], None]:
    """Hears of each step: loss, and tokens in a second of late."""
    task = shown.add_task(name, total=config.optim.steps)
    last: Step | None = None
    speed = 0.0

    def report(step: Step) -> None:
        nonlocal last, speed
        if last is not None and step.seconds > last.seconds:
            now = (step.tokens - last.tokens) / (step.seconds - last.seconds)
            speed = _REMEMBERED * speed + (1 - _REMEMBERED) * now if speed else now
        last = step
        said = f"{name}  loss {step.loss:.4f}" + (f"  {speed:,.0f} tokens/s" if speed else "")
        shown.update(task, completed=step.number, description=said)

    return report


@contextmanager
def refusals(as_json: bool = False) -> Iterator[None]:
    """What the user can put right ends in one line, not in a traceback."""
    try:
        yield
    except (TrainingError, UnservableBase) as error:
        if as_json:
            field = getattr(error, "field", None)
            print_json({"error": {"message": str(error), "next": "", "field": field}})
            raise typer.Exit(2) from None
        refuse(str(error))


@contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Within it, nothing for people is said: one line of JSON will be."""
    before, console.quiet = console.quiet, on or console.quiet
    try:
        yield
    finally:
        console.quiet = before


def print_json(value: object) -> None:
    """One line for programs."""
    typer.echo(json.dumps(value, ensure_ascii=False, default=str))


def refuse(message: str) -> NoReturn:
    """Say why, and end with 2."""
    Console(stderr=True).print(f"[bold red]refused:[/] {escape(message)}", highlight=False)
    raise typer.Exit(2)
