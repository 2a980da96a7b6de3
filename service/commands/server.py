"""Reaching a running server from a command: its address, and what to do when it does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

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
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_NEXT_STEPS = {
    404: "`nibble adapters list` shows what is there.",
    429: "The queue is full: try again in a moment.",
    503: "The server is starting, stopping or out of resources: its log tells which.",
}


@contextmanager
def connect(url: str | None, as_json: bool) -> Iterator[Client]:
    """A client of the server at `url`; whatever it raises ends the command with status 1."""
    try:
        with Client(url or default_url()) as client:
            yield client
    except ConfigError as error:
        fail(str(error), status=2, as_json=as_json)
    except ServerUnreachable as error:
        step = "Start one with `nibble serve`, or name another: --url http://HOST:PORT"
        fail(str(error), step, as_json=as_json)
    except ServerRefused as error:
        fail(str(error), _NEXT_STEPS.get(error.status, ""), as_json=as_json)
    except ClientError as error:
        fail(str(error), as_json=as_json)


def default_url() -> str:
    """Where `nibble serve` with the same configuration listens."""
    settings = configure().settings
    everywhere = settings.host in ("0.0.0.0", "::")
    host = "127.0.0.1" if everywhere else settings.host
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
