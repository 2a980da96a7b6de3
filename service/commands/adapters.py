"""`nibble adapters`: push, list, show, remove and alias the adapters of a running server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from service.commands.output import print_json, print_table
from service.commands.server import Json, Url, connect

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Push, list, show and remove the adapters of a running server.",
)
COLUMNS = ("name", "version", "kind", "rank", "placement", "memory_bytes", "tier", "digest")
USE_COLUMNS = ("name", "version", "kind", "tier", "bytes", "running", "hits", "last used", "pinned")
Name = Annotated[str, typer.Argument(help="name, name@version, name@alias or sha256:…")]


@app.command()
def push(
    directory: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="What save_pretrained wrote.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Name to serve it under; the directory's own when unset.")
    ] = None,
    placement: Annotated[
        Literal["unmerged", "merged"] | None,
        typer.Option(help="merged: private weights for this adapter."),
    ] = None,
    merged_dtype: Annotated[
        Literal["bfloat16", "float32", "nf4"] | None,
        typer.Option(help="Of these private weights; nf4 rounds once more."),
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Upload an adapter; a name that exists gets a new version, old ones stay addressable."""
    name = name or directory.resolve().name
    with connect(url, as_json) as client:
        found = client.push(directory, name, placement=placement, merged_dtype=merged_dtype)
    _print_one(found, as_json)


@app.command("list")
def list_(
    resident: Annotated[
        bool, typer.Option("--resident", help="Only those in memory, with their use.")
    ] = False,
    tier: Annotated[
        Literal["slot", "host", "loading", "store"] | None,
        typer.Option(help="Only those in this tier, with their use."),
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """List the adapters by name, and where they are."""
    with connect(url, as_json) as client:
        found = client.adapters(tier or ("true" if resident else None))
    if as_json:
        print_json(found)
        return
    rows = found["adapters"] if isinstance(found, dict) else found
    if resident or tier:
        print_table(USE_COLUMNS, [_use(row) for row in rows])
    else:
        print_table(COLUMNS, [[_cell(row.get(c)) for c in COLUMNS] for row in rows])


@app.command()
def show(name: Name, url: Url = None, as_json: Json = False) -> None:
    """Show one adapter: its versions, aliases, targets and costs."""
    with connect(url, as_json) as client:
        found = client.adapter(name)
    _print_one(found, as_json)


@app.command()
def remove(name: Name, url: Url = None, as_json: Json = False) -> None:
    """Remove an adapter, or one version of it; requests that run on it finish first."""
    with connect(url, as_json) as client:
        found = client.remove(name)
    if as_json:
        print_json(found)
    else:
        typer.echo(f"removed {name}")


@app.command()
def alias(
    name: Annotated[str, typer.Argument(help="Name of the adapter.")],
    alias: Annotated[str, typer.Argument(help="The alias, for example prod.")],
    version: Annotated[
        int | None, typer.Argument(min=1, help="Version that it points to from now on.")
    ] = None,
    drop: Annotated[bool, typer.Option("--drop", help="Take the alias away.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Point NAME@ALIAS to a version, or drop it."""
    if (version is None) != drop:
        raise typer.BadParameter("give either a VERSION to point to, or --drop")
    with connect(url, as_json) as client:
        if version is None:
            found = client.drop_alias(name, alias)
        else:
            found = client.set_alias(name, alias, version)
    if as_json:
        print_json(found)
    else:
        typer.echo(f"{name}@{alias} " + ("dropped" if drop else f"-> {name}@{version}"))


def _print_one(adapter: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(adapter)
    else:
        print_table(("field", "value"), [(key, _cell(value)) for key, value in adapter.items()])


def _use(adapter: Mapping[str, Any]) -> list[str]:
    """A row of USE_COLUMNS: an adapter may be resident in more than one placement."""
    places = adapter["residency"]
    last = adapter["last_used"]
    return [
        adapter["name"],
        str(adapter["version"]),
        adapter["kind"],
        adapter["tier"],
        str(sum(place["bytes"] for place in places)),
        str(sum(place["running"] for place in places)),
        str(adapter["hits"]),
        datetime.fromtimestamp(last).isoformat(" ", "seconds") if last else "-",
        "yes" if any(place["pinned"] for place in places) else "-",
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return "\n".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
