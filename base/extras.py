"""How an optional part of the product is installed, for messages that say that it is missing."""

from __future__ import annotations


def install(extra: str) -> str:
    """The command, for a checkout; `extra` as pyproject.toml names it."""
    return f"pip install -c constraints.txt -e '.[{extra}]'"
