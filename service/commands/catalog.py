"""`nibble catalog`: the tables of the catalog, for who starts several servers over one database."""

from __future__ import annotations

import typer

from adapters.errors import AdapterError
from service.commands.flags import with_settings
from service.commands.output import fail
from service.config import Configuration

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _group() -> None:
    """The catalog's tables."""


@app.command("migrate")
@with_settings
def migrate(configuration: Configuration) -> None:
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
        fail(str(error), "Is the database up, and NIBBLE_CATALOG its URL?")
    except ImportError as error:
        fail(str(error), "A driver is missing: `pip install '.[postgres]'`")
    typer.echo(f"{settings.shown()['catalog']}: revision {HEAD}")
