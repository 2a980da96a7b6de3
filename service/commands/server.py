"""Reaching a running server from a command: its address, and what to do when it does not answer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from service.client import Client, ClientError, ServerRefused, ServerUnreachable
from service.commands.output import fail
from service.config import ConfigError, configure

Url = Annotated[
    str | None,
    typer.Option(
        envvar="NIBBLE_URL",
        help="Address of the server; by default the host and port that `nibble serve` would use.",
        show_default=False,
    ),
]


def newest(client: Client) -> dict[str, dict[str, Any]]:
    """The newest version of every adapter, by name."""
    found: dict[str, dict[str, Any]] = {}
    for one in client.adapters()["adapters"]:
        if one["version"] > found.get(one["name"], {"version": 0})["version"]:
            found[one["name"]] = one
    return found


def adapter_names(incomplete: str) -> list[str]:
    """For the shell's completion: the adapters of a running server, none where none answers."""
    try:
        url = os.environ.get("NIBBLE_URL") or default_url()
        with Client(url, key=os.environ.get("NIBBLE_API_KEY"), timeout=2.0) as client:
            return [name for name in newest(client) if name.startswith(incomplete)]
    except (ConfigError, ClientError):
        return []


AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="name, name@version, name@alias or sha256:…; none: the base.",
        autocompletion=adapter_names,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_NEXT_STEPS = {
    401: "Set NIBBLE_API_KEY to a key of this server: `nibble keys create` makes one.",
    403: "Set NIBBLE_API_KEY to a key that has it: `nibble keys create NAME --scopes …`",
    429: "Try again in a moment; `nibble tenants list` shows what a tenant may use.",
    503: "The server is starting, stopping or out of resources: its log tells which.",
}
# What lists what was not found, by how the refusal or else the path begins.
_LISTS = {
    "collection ": "rag",
    "template ": "templates",
    "adapter ": "adapters",
    "/collections": "rag",
    "/templates": "templates",
    "/keys": "keys",
    "/tenants": "tenants",
    "/v1/fine_tuning": "jobs",
}


@contextmanager
def connect(url: str | None, as_json: bool) -> Iterator[Client]:
    """A client of the server at `url`; whatever it raises ends the command with status 1."""
    try:
        with Client(url or default_url(), key=os.environ.get("NIBBLE_API_KEY")) as client:
            yield client
    except ConfigError as error:
        fail(str(error), status=2, as_json=as_json)
    except ServerUnreachable as error:
        step = "Start one with `nibble serve`, or name another: --url http://HOST:PORT"
        fail(str(error), step, as_json=as_json)
    except ServerRefused as error:
        fail(str(error), _next_step(error), as_json=as_json, field=error.field)
    except ClientError as error:
        fail(str(error), as_json=as_json)


def _next_step(error: ServerRefused) -> str:
    if error.status != 404:
        return _NEXT_STEPS.get(error.status, "")
    said = str(error)
    if said.startswith("'/"):  # a path that no server of ours has
        return "Name the server alone, without a path: --url http://HOST:PORT"
    found = [what for begins, what in _LISTS.items() if said.startswith(begins)]
    found += [what for begins, what in _LISTS.items() if error.path.startswith(begins)]
    return f"`nibble {(found or ['adapters'])[0]} list` shows what is there."


def default_url() -> str:
    """Where `nibble serve` with the same configuration listens."""
    settings = configure().settings
    everywhere = settings.host in ("0.0.0.0", "::")
    host = "127.0.0.1" if everywhere else settings.host
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
