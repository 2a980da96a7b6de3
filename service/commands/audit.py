"""`nibble audit`: what was done on this home's servers, by whom, to which digest."""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path
from typing import Annotated, Any

import typer

from service.access import audit
from service.commands.output import fail, print_json, print_table
from service.commands.server import Json
from service.config import ConfigError, configure

app = typer.Typer(
    help="What was done on this home's servers: verify, list and find.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Home = Annotated[Path | None, typer.Option(help="Home of the server, if not the configured one.")]


@app.command()
def verify(
    kept: Annotated[
        str | None,
        typer.Option(
            "--last",
            metavar="HASH",
            help="A last hash from before, of this command or of a server's own log: it must be "
            "there still, so nothing up to it was cut off.",
        ),
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Check that every line is as it was written and none is missing."""
    if kept is not None and not re.fullmatch("[0-9a-f]{64}", kept):
        fail(f"--last {kept[:80]!r}: a hash has 64 of 0-9, a-f", status=2, as_json=as_json)
    found = audit.verify(_directory(home, as_json), kept)
    if found.broken is not None:
        fail(
            f"{found.lines} lines hold together, then: {found.broken}",
            f"The last hash that holds is {found.last}.",
            as_json=as_json,
        )
    if as_json:
        print_json({"lines": found.lines, "last": found.last})
        return
    typer.echo(f"{found.lines} lines hold together; the last hash is {found.last}")


@app.command(name="list")
def list_lines(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="The newest so many.")] = 20,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List what was done, the newest last."""
    _print(list(deque(audit.lines(_directory(home, as_json)), limit)), as_json)


@app.command()
def find(
    request: Annotated[str, typer.Argument(help="A request's id: `x-request-id` of its reply.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Find what a request did, and which digests served it."""
    found = audit.find(_directory(home, as_json), request)
    if not found:
        fail(f"no line is of request {request[:80]!r}", as_json=as_json)
    _print(found, as_json)


def _directory(home: Path | None, as_json: bool) -> Path:
    try:
        return configure({"home": home}).settings.home / "audit"
    except ConfigError as error:
        fail(str(error), status=2, as_json=as_json)


def _print(found: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    shown = ("n", "time", "action", "request", "tenant", "key", "status")
    rest = {"previous", "hash", *shown}
    print_table(
        (*shown, "of"),
        (
            (
                *(one.get(key, "-") for key in shown),
                " ".join(f"{key}={_text(value)}" for key, value in one.items() if key not in rest),
            )
            for one in found
        ),
    )


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}:{one}" for key, one in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
