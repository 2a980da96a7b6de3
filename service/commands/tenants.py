"""`nibble tenants`: quotas of tenants, and what one lets others read; over HTTP, as an admin."""

from __future__ import annotations

from typing import Annotated

import typer

from service.commands.output import print_json, print_table
from service.commands.server import Json, Url, connect

app = typer.Typer(
    help="Quotas of tenants, and what one lets others read.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

TenantName = Annotated[str, typer.Argument(metavar="TENANT", help="Its name, as keys have it.")]
Limit = Annotated[int, typer.Option(min=0, help="0: no limit.", show_default=False)]


@app.command(name="list")
def list_tenants(url: Url = None, as_json: Json = False) -> None:
    """List tenants with their quotas. A tenant is there once it has a key."""
    with connect(url, as_json) as client:
        found = client.tenants()
    if as_json:
        print_json(found)
        return
    names = list(found[0]["quotas"]) if found else []
    print_table(
        ("tenant", *(name.replace("_", " ") for name in names)),
        (
            (one["name"], *("-" if (n := one["quotas"][name]) is None else n for name in names))
            for one in found
        ),
    )


@app.command()
def quota(
    tenant: TenantName,
    requests_per_minute: Limit = 0,
    tokens_per_minute: Limit = 0,
    concurrency: Limit = 0,
    adapters: Limit = 0,
    templates: Limit = 0,
    bytes_: Annotated[int, typer.Option("--bytes", min=0, help="0: no limit.")] = 0,
    train_minutes: Limit = 0,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Set all quotas of a tenant; what is not given has no limit."""
    body = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrency": concurrency,
        "adapters": adapters,
        "templates": templates,
        "bytes": bytes_,
        "train_minutes": train_minutes,
    }
    with connect(url, as_json) as client:
        found = client.set_quotas(tenant, body)
    if as_json:
        print_json(found)
        return
    limits = [f"{name.replace('_', ' ')} {value:,}" for name, value in found.items() if value]
    typer.echo(f"{tenant}: {', '.join(limits) or 'no limits'}")


@app.command()
def share(
    tenant: TenantName,
    name: Annotated[str, typer.Argument(help="Of its adapter, or template.")],
    with_: Annotated[
        str,
        typer.Option(
            "--with", help="Tenants, parted by commas; `*`: all; nothing: nobody any more."
        ),
    ] = "*",
    template: Annotated[bool, typer.Option("--template", help="It is a template.")] = False,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Let other tenants read an adapter or a template, and never write it."""
    audience = [one.strip() for one in with_.split(",") if one.strip()]
    with connect(url, as_json) as client:
        found = client.share("template" if template else "adapter", tenant, name, audience)
    if as_json:
        print_json(found)
        return
    readers = ", ".join(found["audience"]) or "nobody else"
    typer.echo(f"{found['kind']} {name} of {tenant} is read by {readers}")


@app.command()
def shares(url: Url = None, as_json: Json = False) -> None:
    """List what tenants let others read."""
    with connect(url, as_json) as client:
        found = client.shares()
    if as_json:
        print_json(found)
        return
    print_table(
        ("kind", "tenant", "name", "read by"),
        ((one["kind"], one["tenant"], one["name"], " ".join(one["audience"])) for one in found),
    )
