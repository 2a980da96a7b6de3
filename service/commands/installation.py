"""What is installed here: versions that matter, and whether another package hides one of ours."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("base", "adapters", "service", "training")
HOME = Path(__file__).resolve().parents[2]  # where the four packages stand side by side
REPORTED = (
    "nibble-serve",
    "torch",
    "transformers",
    "bitsandbytes",
    "peft",
    "safetensors",
    "tokenizers",
)


def versions() -> dict[str, str | None]:
    """Version by distribution; None where it is not installed."""
    return {name: _version(name) for name in REPORTED}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def shadowed(home: Path = HOME) -> str | None:
    """Why one of our packages would not be the one that is imported; None when all is well.

    The trap: an unrelated distribution on the package index is called `adapters` and installs a
    package of that name, over ours or before it.
    """
    if found := _version("adapters"):
        return f"the unrelated package adapters {found} is installed under our name"
    for name in PACKAGES:
        file = import_module(name).__file__
        if file is None or Path(file).resolve().parents[1] != home:
            return f"the package {name} is imported from {file}, not from {home}"
    return None
