"""`nibble config`: the effective configuration, and where each value came from."""

from __future__ import annotations

from typing import Annotated

import typer

from service.commands.flags import with_settings
from service.commands.output import print_json, print_table
from service.config import Configuration

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
@with_settings
def show(
    configuration: Configuration,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the effective configuration: flags over environment over file over defaults.

    Takes the same flags as `nibble serve`. Secrets are masked.
    """
    values = configuration.settings.shown()
    if as_json:
        settings = {
            name: {"value": value, "source": configuration.sources[name]}
            for name, value in values.items()
        }
        file = str(configuration.file) if configuration.file else None
        print_json({"file": file, "unknown": list(configuration.unknown), "settings": settings})
        return
    rows = [
        (name, "-" if value is None else value, configuration.sources[name])
        for name, value in values.items()
    ]
    print_table(("setting", "value", "source"), rows)
    for variable in configuration.unknown:
        typer.echo(f"warning: {variable} is set, but there is no such setting", err=True)
