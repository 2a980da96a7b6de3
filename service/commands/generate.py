"""`nibble generate`: one text from a running server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from service.commands.output import print_json
from service.commands.server import AdapterOption, Json, Url, connect
from service.commands.streamed import pieces

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    prompt: Annotated[str, typer.Argument(help="The prompt; `-` reads it from standard input.")],
    adapter: AdapterOption = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest output; the server's default when unset.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user's message, not as raw text.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="A system message before it; implies --chat.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sample at this temperature; greedy when unset.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may repeat.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Ask a running server for a text."""
    text = sys.stdin.read() if prompt == "-" else prompt
    inputs = _messages(text, system) if chat or system else text
    given = {
        "adapter_id": adapter,
        "max_new_tokens": max_new_tokens,
        "do_sample": None if temperature is None else True,
        "temperature": temperature,
        "seed": seed,
        "stop": stop or None,
        "details": as_json or None,
    }
    parameters = {name: value for name, value in given.items() if value is not None}
    with connect(url, as_json) as client:
        if stream:
            _print_stream(client.stream(inputs, parameters), as_json)
        elif as_json:
            print_json(client.generate(inputs, parameters))
        else:
            typer.echo(client.generate(inputs, parameters)["generated_text"])


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


def _print_stream(events: Iterator[dict[str, Any]], as_json: bool) -> None:
    """Tokens as they come; with `as_json`, one event a line."""
    if as_json:
        for event in events:
            typer.echo(json.dumps(event, ensure_ascii=False))
        return
    for piece in pieces(events):
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()
