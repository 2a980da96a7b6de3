"""`nibble catalog`: the tables of the catalog, for who starts several servers over one database."""

from __future__ import annotations

import typer

from adapters.errors import AdapterError
from base.extras import install
from service.commands.flags import with_settings
from service.commands.output import fail, print_json
from service.commands.server import Json
from service.config import Configuration

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _group() -> None:
    """The catalog's tables."""


@app.command("migrate")
@with_settings
def migrate(configuration: Configuration, as_json: Json = False) -> None:
    """Bring the catalog's tables up to date, or make them; twice is harmless.

    A server does this itself when it starts. Before several start at once over one PostgreSQL, it
    is done once: the Helm chart has a Job for it.
    """
    from adapters.catalog import HEAD, Catalog

    settings = configuration.settings
    if settings.catalog.startswith("sqlite:"):
        settings.home.mkdir(parents=True, exist_ok=True)
    try:
        Catalog(settings.catalog).close()
    except AdapterError as error:
        step = "Is the database up, and NIBBLE_CATALOG its URL?"
        fail(str(error), step, as_json=as_json)
    except ImportError as error:
        fail(str(error), f"A driver is missing: `{install('postgres')}`", as_json=as_json)
    shown = settings.shown()["catalog"]
    if as_json:
        print_json({"catalog": shown, "revision": HEAD})
    else:
        typer.echo(f"{shown}: revision {HEAD}")
