"""What a run shows on a terminal: its progress, and a refusal in one line."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, NoReturn

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
from training.errors import RunError, TrainingError

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.recipe import Step

_OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.I)
LINE_SECONDS = 10.0  # between two lines of a run that no terminal shows
_REMEMBERED = 0.9  # of the speed so far, at each step

console = Console()

DoubleQuant = Annotated[
    bool | None,
    typer.Option(
        "--double-quant/--no-double-quant",
        help="The base's NF4 scales quantised too, as the adapter was trained; default: as the "
        "base says, which is yes for most.",
        show_default=False,
    ),
]


def progress(shown: bool = True) -> Progress:
    """A bar with what is done of what, the time it took and the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not shown
    )


def bar(shown: Progress, name: str, config: TrainConfig) -> Callable[[Step], None]:
    """Hears of each step: loss, and tokens in a second of late; each held-out loss has a line.

    Where no terminal shows the bar, a line now and then takes its place: a log is read as it grows.
    """
    task = shown.add_task(name, total=config.optim.steps)
    last: Step | None = None
    speed, told = 0.0, time.monotonic()

    def report(step: Step) -> None:
        nonlocal last, speed, told
        if last is not None and step.seconds > last.seconds:
            now = (step.tokens - last.tokens) / (step.seconds - last.seconds)
            speed = _REMEMBERED * speed + (1 - _REMEMBERED) * now if speed else now
        last = step
        said = f"{name}  loss {step.loss:.4f}" + (f"  {speed:,.0f} tokens/s" if speed else "")
        shown.update(task, completed=step.number, description=said)
        late = not console.is_terminal and time.monotonic() - told >= LINE_SECONDS
        if late or step.eval_loss is not None:
            told = time.monotonic()
            held = "" if step.eval_loss is None else f"  held out {step.eval_loss:.4f}"
            where = f"step {step.number:,} of {config.optim.steps:,}"
            console.print(f"{said}{held}  {where}", highlight=False, soft_wrap=True)

    return report


@contextmanager
def refusals(as_json: bool = False) -> Iterator[None]:
    """What the user can put right ends in one line, not in a traceback."""
    try:
        yield
    except RunError as error:
        fail(str(error), as_json)
    except (TrainingError, UnservableBase) as error:
        if as_json:
            field = getattr(error, "field", None)
            print_json({"error": {"message": str(error), "next": "", "field": field}})
            raise typer.Exit(2) from None
        refuse(str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), as_json)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        why = str(error).partition("\n")[0]
        fail(f"{why}: out of memory. nibble train plan says what would fit", as_json)


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
    _say("refused", message)
    raise typer.Exit(2)


def fail(message: str, as_json: bool = False) -> NoReturn:
    """Say why what was begun did not end well, and end with 1."""
    if as_json:
        print_json({"error": {"message": message, "next": "", "field": None}})
        sys.stdout.flush()
    _say("failed", message)
    raise typer.Exit(1)


def _say(what: str, message: str) -> None:
    """On one line, however long: a log is searched by line."""
    stderr = Console(stderr=True)
    stderr.print(f"[bold red]{what}:[/] {escape(message)}", highlight=False, soft_wrap=True)
