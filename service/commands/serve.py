"""`nibble serve`: one base and its adapters over HTTP, until it is told to stop."""

from __future__ import annotations

import gc
from importlib import import_module

import typer

from base.deferred import defer_torch
from base.heap import few_heaps
from base.machine import bound_threads
from base.preload import preload_torch
from service.commands.flags import with_settings
from service.commands.installation import shadowed
from service.commands.output import fail
from service.config import Configuration, Settings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@with_settings
def run(configuration: Configuration) -> None:
    """Serve one base and its adapters over HTTP.

    Every flag can also be set by a variable (NIBBLE_PORT) or in nibble.toml; `nibble config` shows
    what is in force. SIGTERM and Ctrl-C stop admitting, finish what runs, and exit with 0.
    """
    for variable in configuration.unknown:
        typer.echo(f"warning: {variable} is set, but there is no such setting", err=True)
    _check_closed(configuration.settings)
    if problem := shadowed():
        fail(problem, "Run `pip uninstall adapters`, then install nibble-serve again.")
    few_heaps()
    bound_threads()
    gc.disable()  # imports make much and drop little; it runs again once the server is ready
    preload_torch()
    defer_torch()
    _import_fastapi()
    from service.app import NotServing, serve  # imports much: seconds, and only needed here

    try:
        serve(configuration.settings)
    except NotServing as stop:
        fail(str(stop), stop.next_step)
    except SystemExit as stop:
        _explain(stop.code, configuration.settings)


def _import_fastapi() -> None:
    """Its models of an OpenAPI document are finished when somebody asks for one: 0.1 s later."""
    from pydantic import BaseModel, ConfigDict

    own = BaseModel.model_config
    BaseModel.model_config = ConfigDict(defer_build=True)
    try:
        import_module("fastapi.openapi.models")
    finally:
        BaseModel.model_config = own


def _explain(status: object, settings: Settings) -> None:
    """uvicorn ends like that where it cannot listen."""
    if status:
        address = f"{settings.host}:{settings.port}"
        fail(f"cannot listen on {address}", "Take another port: --port 0 finds a free one.")


def _check_closed(settings: Settings) -> None:
    """An address that others reach wants keys, or a word that it shall be open."""
    if settings.local:
        return
    if settings.open:
        typer.echo(
            f"warning: {settings.host} can be reached from outside, and --open serves whoever "
            "reaches it while there are no keys. Keep it behind a gateway that checks.",
            err=True,
        )
    elif settings.admin_key is None and not _has_keys(settings):
        fail(
            f"{settings.host} can be reached from outside and there are no keys yet",
            "Make one: `nibble keys create first --scopes admin`; or set NIBBLE_ADMIN_KEY; or, "
            "behind a gateway that checks, say --open.",
        )


def _has_keys(settings: Settings) -> bool:
    from adapters.errors import AdapterError
    from service.access.keys import opened

    try:
        with opened(settings) as keys:
            return keys.any()
    except AdapterError as error:
        fail(str(error), "Is the database up, and NIBBLE_CATALOG its URL?")
