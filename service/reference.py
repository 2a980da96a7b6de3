"""The reference, made from the code: HTTP routes, commands, settings, as pages of Markdown.

`python -m service.reference OUT` writes the pages; the site's build takes them from `pages`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from service import cli
from service.config import PREFIX, SECRETS, Settings

METHODS = ("get", "post", "put", "patch", "delete")


def pages() -> dict[str, str]:
    """Every page by its path below the reference."""
    return {
        "http.md": http_page(_openapi()),
        "commands.md": commands_page(),
        "configuration.md": configuration_page(),
    }


def _openapi() -> dict[str, Any]:
    from service.app import create_app  # imports torch

    return create_app(Settings()).openapi()


# HTTP ---------------------------------------------------------------------------------------------


def http_page(schema: Mapping[str, Any]) -> str:
    """Every route with its parameters, body and replies, by tag; then every schema."""
    routes: dict[str, list[str]] = {}
    for path, methods in schema["paths"].items():
        for method in METHODS:
            if method in methods:
                found = methods[method]
                tag = (found.get("tags") or ["others"])[0]
                routes.setdefault(tag, []).extend(_route(method, path, found))
    lines = [
        "# HTTP",
        "",
        "Made from `/openapi.json` of the server; `/docs` shows it with forms.",
        "",
    ]
    for tag, said in sorted(routes.items()):
        lines += [f"## {tag}", "", *said]
    lines += ["## Schemas", ""]
    for name, one in sorted(schema["components"]["schemas"].items()):
        lines += _schema(name, one)
    return "\n".join(lines) + "\n"


def _route(method: str, path: str, found: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"### {method.upper()} `{path}`", "", _text(found.get("description", "")), "")
    rows = [
        (f"`{p['name']}`", p["in"], _type(p.get("schema", {})), _text(p.get("description", "")))
        for p in found.get("parameters", ())
    ]
    if rows:
        yield from _table(("parameter", "in", "type", "what"), rows)
    for kind, body in found.get("requestBody", {}).get("content", {}).items():
        yield from (f"Body (`{kind}`): {_type(body.get('schema', {}))}", "")
        if own := body.get("schema", {}).get("properties"):
            yield from _properties(own, body["schema"].get("required", ()))
    replies = []
    for status, reply in found.get("responses", {}).items():
        shapes = [_type(one.get("schema", {})) for one in reply.get("content", {}).values()]
        replies.append(
            (status, " or ".join(dict.fromkeys(shapes)) or "–", _text(reply["description"]))
        )
    yield from _table(("reply", "shape", "when"), replies)


def _schema(name: str, one: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"### {name}", "", _text(one.get("description", "")), "")
    if "properties" in one:
        yield from _properties(one["properties"], one.get("required", ()))
    elif "enum" in one or "anyOf" in one or "type" in one:
        yield from (_type(one), "")


def _properties(found: Mapping[str, Any], required: Sequence[str]) -> Iterator[str]:
    rows = [
        (f"`{name}`", _type(one), "yes" if name in required else _default(one), _field_text(one))
        for name, one in found.items()
    ]
    yield from _table(("field", "type", "required, or default", "what"), rows)


def _default(one: Mapping[str, Any]) -> str:
    return f"`{one['default']!r}`" if "default" in one else "no"


def _field_text(one: Mapping[str, Any]) -> str:
    bounds = {
        "minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most",
        "exclusiveMaximum": "less than", "maxLength": "longest", "maxItems": "most",
    }  # fmt: skip
    shapes = [one, *one.get("anyOf", ())]
    said = [f"{word} {s[key]:,}" for s in shapes for key, word in bounds.items() if key in s]
    what = _text(one.get("description", "")).removesuffix(".")
    return "; ".join(filter(None, [what, ", ".join(said)]))


def _type(one: Mapping[str, Any]) -> str:
    """A JSON schema's type in a few words; a named one links to its schema."""
    if "$ref" in one:
        name = one["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf", "allOf"):
        if several in one:
            return " or ".join(dict.fromkeys(_type(part) for part in one[several]))
    if "const" in one:
        return f"`{one['const']!r}`"
    if "enum" in one:
        return ", ".join(f"`{value}`" for value in one["enum"])
    if one.get("type") == "array":
        return f"list of {_type(one.get('items', {}))}"
    return str(one.get("format") or one.get("type") or "any")


# Commands -----------------------------------------------------------------------------------------


def commands_page() -> str:
    """Every command with its arguments and options, as `--help` has them."""
    lines = ["# Commands", "", "Made from the code, as `--help` is. Exit status:", ""]
    lines += [*_table(("", ""), [(str(c), what) for c, what in cli.EXIT_STATUS.items()])]
    lines += [
        "`nibble --install-completion` teaches the shell to complete commands, flags, and the",
        "adapters of a running server. With `--json` a result is JSON on standard output; so is",
        'an error: `{"error": {"message": …, "next": …, "field": …}}`.',
        "",
    ]
    for name in commands():
        lines += _command(f"nibble {name}", get_command(cli.load(name)), 2)
    return "\n".join(lines) + "\n"


def commands() -> list[str]:
    """The commands that are installed, in the order of `nibble --help`."""
    return [name for name in (*cli.OWN, *cli.KNOWN) if cli.has(name)]


def _command(name: str, command: Any, depth: int) -> Iterator[str]:
    inside: Mapping[str, Any] = getattr(command, "commands", {})
    yield from (f"{'#' * depth} {name}", "", _text(command.help or ""), "")
    context = typer.Context(command, info_name=name)
    rows = [_parameter(one, context) for one in command.params if one.name not in ("help", None)]
    rows = [row for row in rows if "-completion" not in row[0]]
    if rows:
        yield from _table(("", "type", "what", "default"), rows)
    for other, found in inside.items():
        yield from _command(f"{name} {other}", found, min(depth + 1, 4))


def _parameter(one: Any, context: Any) -> tuple[str, str, str, str]:
    is_option = one.param_type_name == "option"
    shown = ", ".join(f"`{flag}`" for flag in (*one.opts, *one.secondary_opts))
    names = shown if is_option else f"`{(one.metavar or one.name).upper()}`"
    default = one.default
    plain = isinstance(default, str | int | float) and not isinstance(default, bool)
    kind = one.display_type(context).strip("<>")
    return (names, kind, _text(getattr(one, "help", None) or ""), f"`{default}`" if plain else "")


# Settings -----------------------------------------------------------------------------------------


def configuration_page() -> str:
    """Every setting: its flag, variable, type, bounds and default, by panel."""
    properties = Settings.model_json_schema()["properties"]
    panels: dict[str, list[tuple[str, ...]]] = {}
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict), "every setting names its panel"
        one = {**properties[name], "description": field.description}
        default = "" if field.default_factory else f"`{field.default}`"
        flag = "variable or file only" if name in SECRETS else f"`--{name.replace('_', '-')}`"
        row = (f"`{name}`", flag, _type(one), _field_text(one), default)
        panels.setdefault(str(extra["panel"]), []).append(row)
    lines = [
        "# Configuration",
        "",
        f"A flag wins over a variable (`{PREFIX}PORT`), that over a key of `nibble.toml` (`port`),",
        "that over the default. Sizes take `512MiB`; `none` unsets what may be unset.",
        "`nibble config` shows what is in force and where each value came from.",
        "",
    ]
    for panel, rows in panels.items():
        lines += [f"## {panel}", "", *_table(("setting", "flag", "type", "what", "default"), rows)]
    return "\n".join(lines) + "\n"


# Markdown -----------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
    yield ""


def _text(said: str) -> str:
    """One line, with nothing that Markdown would take for HTML."""
    parts = " ".join(said.split()).split("`")
    return "`".join(p if i % 2 else p.replace("<", "&lt;") for i, p in enumerate(parts))


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (out / name).write_text(text, encoding="utf-8")
        print(out / name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python -m service.reference OUT: the directory that the pages go to")
    main(Path(sys.argv[1]))
