"""`nibble keys`: who may use a server; in its catalog directly, or over HTTP as an admin."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from adapters.errors import AdapterError
from adapters.manifest import DEFAULT_TENANT
from service.access.audit import AuditLog
from service.access.caller import SCOPES
from service.access.keys import MAX_DAYS, OVERLAP, TOKEN, Keys, opened
from service.commands.output import fail, print_json, print_table
from service.commands.server import Json, connect
from service.config import ConfigError, configure
from service.errors import InvalidRequest, ServiceError

app = typer.Typer(
    help="Create, list, rotate and revoke API keys.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Url = Annotated[
    str | None,
    typer.Option(
        envvar="NIBBLE_URL",
        help="A running server, asked with the key in NIBBLE_API_KEY; by default the catalog of "
        "this machine's own server is used, whether it runs or not.",
        show_default=False,
    ),
]
Home = Annotated[Path | None, typer.Option(help="Home of another server than the configured one.")]


def _id(given: str) -> str:
    """Of a whole key its id: who has to revoke one in a hurry has it at hand. Its secret goes no
    further."""
    key = TOKEN.fullmatch(given.strip())
    return key[1] if key else given


KeyId = Annotated[
    str,
    typer.Argument(
        metavar="ID", callback=_id, help="The key's id, as `list` shows it; or the whole key."
    ),
]


class Office(Protocol):
    """What makes keys: `service.client.Client` for a running server, `_Own` without one."""

    def create_key(self, body: dict[str, Any]) -> dict[str, Any]: ...
    def keys(self) -> list[dict[str, Any]]: ...
    def rotate_key(self, key_id: str, overlap_seconds: float) -> dict[str, Any]: ...
    def revoke_key(self, key_id: str) -> dict[str, Any]: ...


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="For people; need not be unique.")],
    scopes: Annotated[str, typer.Option(help=f"Parted by commas: {', '.join(SCOPES)}.")] = "infer",
    tenant: Annotated[
        str, typer.Option(help="Whose adapters, templates, collections and jobs it sees.")
    ] = DEFAULT_TENANT,
    days: Annotated[
        float | None,
        typer.Option(help=f"Days until it expires, at most {MAX_DAYS:g}; never by default."),
    ] = None,
    url: Url = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it, this once. With the first key a server begins to ask for keys."""
    body = {
        "name": name,
        "tenant": tenant,
        "scopes": [scope.strip() for scope in scopes.split(",") if scope.strip()],
        **({} if days is None else {"days": days}),
    }
    with _office(url, home, as_json) as office:
        _print_new(office.create_key(body), as_json)


@app.command(name="list")
def list_keys(url: Url = None, home: Home = None, as_json: Json = False) -> None:
    """List keys of all tenants, oldest first. Secrets are kept nowhere."""
    with _office(url, home, as_json) as office:
        found = office.keys()
    if as_json:
        print_json(found)
        return
    print_table(
        ("id", "name", "tenant", "scopes", "state", "created", "expires"),
        (
            (
                one["id"],
                one["name"],
                one["tenant"],
                " ".join(one["scopes"]),
                one["state"] + (f", now {one['successor']}" if one["successor"] else ""),
                _day(one["created"]),
                _day(one["expires"]),
            )
            for one in found
        ),
    )


@app.command()
def rotate(
    key_id: KeyId,
    hours: Annotated[
        float, typer.Option(min=0, max=8760, help="How long the old key still opens.")
    ] = OVERLAP / 3600,
    url: Url = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make a key in place of another and print it; the old one opens for a while more."""
    with _office(url, home, as_json) as office:
        _print_new(office.rotate_key(key_id, hours * 3600), as_json)


@app.command()
def revoke(key_id: KeyId, url: Url = None, home: Home = None, as_json: Json = False) -> None:
    """Let a key open nothing any more: within a second, on every server over the catalog."""
    with _office(url, home, as_json) as office:
        gone = office.revoke_key(key_id)
    if as_json:
        print_json(gone)
        return
    typer.echo(f"{gone['id']} ({gone['name']}) is revoked")


class _Own:
    """The keys of a catalog, opened directly; what is done is in the home's audit log."""

    def __init__(self, keys: Keys, audit: AuditLog) -> None:
        self._keys = keys
        self._audit = audit

    def create_key(self, body: dict[str, Any]) -> dict[str, Any]:
        made = self._keys.create(body["name"], body["tenant"], body["scopes"], body.get("days"))
        whose = made.key.tenant
        self._audit.note("keys create", made=made.key.id, whose=whose, scopes=made.key.scopes)
        return made.view()

    def keys(self) -> list[dict[str, Any]]:
        return [key.view() for key in self._keys.list()]

    def rotate_key(self, key_id: str, overlap_seconds: float) -> dict[str, Any]:
        made = self._keys.rotate(key_id, overlap_seconds)
        self._audit.note("keys rotate", of={"key_id": key_id}, made=made.key.id)
        return made.view()

    def revoke_key(self, key_id: str) -> dict[str, Any]:
        gone = self._keys.revoke(key_id)
        self._audit.note("keys revoke", of={"key_id": key_id})
        return gone.view()


@contextmanager
def _office(url: str | None, home: Path | None, as_json: bool) -> Iterator[Office]:
    if url is not None and home is None:
        with connect(url, as_json) as client:
            yield client
        return
    try:
        settings = configure({"home": home}).settings
        with opened(settings) as keys, closing(AuditLog(settings.home / "audit")) as audit:
            yield _Own(keys, audit)
    except ConfigError as error:
        fail(str(error), status=2, as_json=as_json)
    except AdapterError as error:
        fail(str(error), "Is the database up, and NIBBLE_CATALOG its URL?", as_json=as_json)
    except InvalidRequest as error:
        fail(f"{error.field}: {error}", as_json=as_json, status=2, field=error.field)
    except ServiceError as error:
        fail(str(error), "`nibble keys list` shows what is there.", as_json=as_json)


def _print_new(made: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(made)
        return
    typer.echo(
        f"{made['name']}: tenant {made['tenant']}, scopes {' '.join(made['scopes'])}, expires "
        f"{_day(made['expires'])}. The key is shown this once; clients send it as "
        "`Authorization: Bearer KEY`, commands read it from NIBBLE_API_KEY.",
        err=True,
    )
    typer.echo(made["key"])


def _day(seconds: float | None) -> str:
    return "never" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))
