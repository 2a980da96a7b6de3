"""`nibble adapters`: push, list, show, remove, alias, compose and compare adapters of a server."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from adapters import evaluation
from adapters.compose import parse_terms
from adapters.errors import InvalidAdapter
from service.commands.output import print_json, print_table
from service.commands.server import Json, Url, adapter_names, connect

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Push, list, show and remove the adapters of a running server.",
)
COLUMNS = ("name", "version", "kind", "rank", "placement", "memory_bytes", "tier", "digest")
USE_COLUMNS = ("name", "version", "kind", "tier", "bytes", "running", "hits", "last used", "pinned")
Name = Annotated[
    str,
    typer.Argument(help="name, name@version, name@alias or sha256:…", autocompletion=adapter_names),
]
Own = Annotated[str, typer.Argument(help="Name of the adapter.", autocompletion=adapter_names)]


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
    """Show one adapter: its versions, aliases, targets and costs, and what was measured of it."""
    with connect(url, as_json) as client:
        found = client.adapter(name)
    if as_json:
        _print_one(found, as_json)
        return
    provenance = dict(found.get("provenance") or {})
    measured = provenance.pop(evaluation.KEY, {})
    _print_one({**found, "provenance": provenance}, as_json)
    listed = measured.get(evaluation.LIST) if isinstance(measured, dict) else None
    entries = listed if isinstance(listed, list) else []
    rows = [row for one in entries if isinstance(one, dict) for row in _measured(one)]
    if rows:
        typer.echo("")
        print_table(("measured on", "figure", "value", "95 % interval", "against", "p"), rows)


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
    name: Own,
    alias: Annotated[str, typer.Argument(help="The alias, for example prod.")],
    version: Annotated[
        int | None, typer.Argument(min=1, help="Version that it points to from now on.")
    ] = None,
    drop: Annotated[bool, typer.Option("--drop", help="Take the alias away.")] = False,
    split: Annotated[
        list[str] | None,
        typer.Option(help="VERSION:WEIGHT, several times: the versions share its requests."),
    ] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Point NAME@ALIAS to a version, let several share its requests, or drop it."""
    if sum((version is not None, drop, bool(split))) != 1:
        raise typer.BadParameter("give either a VERSION to point to, --split, or --drop")
    shares = dict(_share(text) for text in split or ())
    with connect(url, as_json) as client:
        if shares:
            found = client.split_alias(name, alias, shares)
        elif version is None:
            found = client.drop_alias(name, alias)
        else:
            found = client.set_alias(name, alias, version)
    if as_json:
        print_json(found)
        return
    where = ", ".join(f"{name}@{v} ({weight:g})" for v, weight in shares.items())
    where = where or f"{name}@{version}"
    typer.echo(f"{name}@{alias} " + ("dropped" if drop else f"-> {where}"))


def _share(text: str) -> tuple[int, float]:
    version, _, weight = text.partition(":")
    try:
        return int(version), float(weight)
    except ValueError:
        raise typer.BadParameter(f"{text!r}; expected VERSION:WEIGHT, such as 2:10") from None


@app.command()
def compose(
    name: Annotated[str, typer.Argument(help="Name of the new adapter.")],
    parts: Annotated[
        list[str], typer.Argument(help="Adapters with their weights: support:0.7 formal@2:0.3")
    ],
    method: Annotated[
        str, typer.Option(help="concatenate, svd, linear, ties, dare_linear, dare_ties, …")
    ] = "concatenate",
    density: Annotated[
        float | None, typer.Option(help="Share of the numbers that pruning leaves.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the svd methods.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the dare methods.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Make a new adapter of stored LoRAs, and keep it as the next version of NAME."""
    try:
        terms = parse_terms(",".join(parts))
    except InvalidAdapter as error:
        raise typer.BadParameter(error.reason) from None
    body: dict[str, Any] = {
        "parts": [{"adapter": term.reference, "weight": term.weight} for term in terms],
        "method": method,
        "density": density,
        "rank": rank,
        "seed": seed,
    }
    with connect(url, as_json) as client:
        found = client.compose(name, body)
    _print_one(found, as_json)


@app.command()
def experiment(
    name: Own,
    alias: Annotated[str, typer.Argument(help="The alias that shares its requests.")],
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Compare the versions behind NAME@ALIAS: counts, latencies, feedback, 95 % intervals."""
    with connect(url, as_json) as client:
        found = client.experiment(name, alias)
    if as_json:
        print_json(found)
        return
    columns = ("version", "weight", "requests", "failed", "scored")
    measures = ("feedback", "first_token_seconds", "total_seconds")
    print_table(
        (*columns, *measures),
        [
            [*(_cell(arm[c]) for c in columns), *(_interval(arm[m]) for m in measures)]
            for arm in found["arms"]
        ],
    )
    for one in found["differences"]:
        typer.echo("")
        typer.echo(f"{name}@{one['version']} less {name}@{one['control']}:")
        for measure in measures:
            typer.echo(f"  {measure} {_interval(one[measure])}")


@app.command()
def feedback(
    request_id: Annotated[str, typer.Argument(help="The reply's x-request-id.")],
    score: Annotated[float, typer.Argument(min=0, max=1, help="From 0, useless, to 1.")],
    comment: Annotated[str | None, typer.Option(help="Why.")] = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Say how good a reply was that came through an alias."""
    with connect(url, as_json) as client:
        found = client.feedback(request_id, score, comment)
    if as_json:
        print_json(found)
    else:
        typer.echo(f"{found['name']}@{found['version']} through @{found['alias']}: {score:g}")


def _interval(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    shown = f"{found['estimate']:.3g}"
    return shown if found["low"] is None else f"{shown} [{found['low']:.3g}, {found['high']:.3g}]"


def _print_one(adapter: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(adapter)
        return
    shown = dict(adapter)
    if "targets" in shown:
        shown["targets"] = _by_last_name(shown["targets"])
    print_table(("field", "value"), [(key, _cell(value)) for key, value in shown.items()])


def _by_last_name(modules: list[str]) -> str:
    """How many of each: a base has hundreds of linear layers. `--json` names each."""
    count = Counter(module.rpartition(".")[2] for module in modules)
    return ", ".join(f"{name} ×{n}" if n > 1 else name for name, n in count.items())


def _measured(one: Mapping[str, Any]) -> list[list[str]]:
    """A row for each figure of one evaluation, as `nibble eval` wrote it. An upload may hold
    anything, so what is not as expected is left out."""
    figures = one.get("figures")
    if not isinstance(figures, dict):
        return []
    where = f"{_cell(one.get('data'))}, {_cell(one.get('questions'))} questions"
    prompt = one.get("system")
    where += f", prompt {_cell(prompt)[:40]!r}" if prompt else ""
    against = one.get("against")
    others = against.items() if isinstance(against, dict) else ()
    rows = []
    for name, figure in figures.items():
        if not isinstance(figure, dict) or {"value", "low", "high"} - figure.keys():
            continue
        tests = [
            (other, found[name])
            for other, found in others
            if isinstance(found, dict) and isinstance(found.get(name), dict)
        ]
        interval = f"{_cell(figure['low'])} to {_cell(figure['high'])}"
        other, p = (tests[0][0], _cell(tests[0][1].get("p"))) if tests else ("-", "-")
        rows.append([where, name, _cell(figure["value"]), interval, other, p])
        where = ""
    return rows


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
