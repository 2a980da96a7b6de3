"""`nibble templates`: prompt templates of a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.errors import AdapterError
from adapters.prompts.shelf import SUFFIXES, read_template
from service.commands.output import fail, print_json, print_table
from service.commands.server import Json, Url, connect

app = typer.Typer(
    help="Push, list, show, render and remove prompt templates of a running server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Name = Annotated[str, typer.Argument(help="name, name@version or name@alias.")]
PlainName = Annotated[str, typer.Argument(help="Name of the template.")]


@app.command()
def push(
    paths: Annotated[list[Path], typer.Argument(help="YAML files, or directories of them.")],
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Keep templates as the next versions of their names; what is unchanged stays what it is."""
    made = []
    with connect(url, as_json) as client:
        for file in _files(paths, as_json):
            try:
                name, template = read_template(file)
            except AdapterError as error:
                fail(str(error), status=2, as_json=as_json)
            made.append(client.push_template({"name": name, **template.plain()}))
    if as_json:
        print_json(made)
        return
    for one in made:
        typer.echo(f"{one['name']}@{one['version']} {one['digest'][:16]}")


@app.command(name="list")
def list_templates(url: Url = None, as_json: Json = False) -> None:
    """List templates."""
    with connect(url, as_json) as client:
        found = client.templates()
    if as_json:
        print_json(found)
        return
    print_table(
        ("template", "version", "variables", "adapter", "description"),
        (
            (
                one["name"],
                one["version"],
                " ".join(one.get("variables", {})) or "-",
                one.get("adapter") or "-",
                one.get("description", ""),
            )
            for one in found["templates"]
        ),
    )


@app.command()
def show(name: Name, url: Url = None, as_json: Json = False) -> None:
    """Show one template as a file has it, with its versions and aliases."""
    with connect(url, as_json) as client:
        found = client.template(name)
    if as_json:
        print_json(found)
        return
    versions = ", ".join(str(one["version"]) for one in found["versions"])
    aliases = ", ".join(f"{alias} -> {version}" for alias, version in found["aliases"].items())
    typer.echo(f"# {found['name']}@{found['version']}, sha256 {found['digest']}")
    typer.echo(f"# versions: {versions}; aliases: {aliases or 'none'}")
    typer.echo(f"name: {found['name']}\n{found['yaml']}", nl=False)


@app.command()
def diff(
    name: PlainName,
    before: Annotated[int, typer.Argument(min=1, help="One version.")],
    after: Annotated[int, typer.Argument(min=1, help="The other.")],
    url: Url = None,
    as_json: Json = False,
) -> None:
    """What is different between two versions."""
    with connect(url, as_json) as client:
        found = client.diff_templates(name, before, after)
    if as_json:
        print_json(found)
    else:
        typer.echo(found["diff"] or "the same content")


@app.command()
def render(
    name: Name,
    var: Annotated[
        list[str] | None,
        typer.Option(help="`product=Brevo`; JSON where it is not a text. May repeat."),
    ] = None,
    ask: Annotated[str | None, typer.Option("--input", help="What {{ input }} stands for.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Whose chat template; by default the template's adapter.")
    ] = None,
    collection: Annotated[
        str | None, typer.Option(help="Find passages there, as a request would.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many passages at most.")] = 4,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Print the exact prompt that a request would get, and how many tokens it is."""
    with connect(url, as_json) as client:
        kinds = {
            field: one["type"] for field, one in client.template(name).get("variables", {}).items()
        }
        body: dict[str, Any] = {"variables": dict(_value(one, kinds, as_json) for one in var or ())}
        body |= {"inputs": ask, "adapter_id": adapter}
        if collection is not None:
            body["retrieval"] = {"collection": collection, "k": k}
        found = client.render_template(name, body)
    if as_json:
        print_json(found)
        return
    typer.echo(found["text"])
    typer.echo(f"{found['tokens']} tokens, {found['name']}@{found['version']}", err=True)


@app.command()
def alias(
    name: PlainName,
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
            found = client.drop_template_alias(name, alias)
        else:
            found = client.set_template_alias(name, alias, version)
    if as_json:
        print_json(found)
    else:
        typer.echo(f"{name}@{alias} " + ("dropped" if drop else f"-> {name}@{version}"))


@app.command()
def remove(name: Name, url: Url = None, as_json: Json = False) -> None:
    """Remove NAME with all its versions, or NAME@VERSION."""
    with connect(url, as_json) as client:
        found = client.remove_template(name)
    if as_json:
        print_json(found)
    else:
        typer.echo(f"removed {', '.join(found['deleted'])}")


def _files(paths: list[Path], as_json: bool) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        else:
            found.append(path)
    if not found:
        fail("no YAML file there", "A template is a file that ends in .yaml.", as_json=as_json)
    return found


def _value(given: str, kinds: dict[str, str], as_json: bool) -> tuple[str, Any]:
    """A text for a text; JSON for everything else."""
    name, equals, value = given.partition("=")
    if not equals or not name:
        fail(f"--var {given!r}; name=value is needed", status=2, as_json=as_json)
    if kinds.get(name) in ("string", "enum", None):
        return name, value
    try:
        return name, json.loads(value)
    except ValueError:
        fail(f"--var {given!r}: {kinds[name]} as JSON is needed", status=2, as_json=as_json)
