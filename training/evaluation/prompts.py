"""Prompt templates to measure: a file, or a version in the catalog of a server's home."""

from __future__ import annotations

from pathlib import Path

from adapters.catalog import Catalog
from adapters.prompts.filling import check
from adapters.prompts.shelf import SUFFIXES, TemplateShelf, read_template
from adapters.prompts.template import PromptTemplate
from training.errors import ConfigError

HOME = Path("~/.local/share/nibble")  # where `nibble serve` keeps what it is given


def find_template(reference: str, home: Path | None = None) -> PromptTemplate:
    """A template by its file's path, or by `name`, `name@version` or `name@alias`.

    Raises InvalidTemplate, TemplateNotFound, ConfigError, StoreUnavailable.
    """
    path = Path(reference)
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise ConfigError(f"--template {reference}: there is no such file")
        found = read_template(path)[1]
        check(found)
        return found
    place = (home or HOME).expanduser() / "catalog.db"
    if not place.is_file():
        raise ConfigError(
            f"--template {reference}: no catalog in {place.parent}; name a server's home by "
            "--store, or a YAML file"
        )
    catalog = Catalog(str(place))
    try:
        return TemplateShelf(catalog).get(reference).template
    finally:
        catalog.close()
