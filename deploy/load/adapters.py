"""Many adapters out of one: the same shapes and costs, other weights, so that each is its own."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

PREFIX = "load-"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def names(count: int) -> list[str]:
    return [f"{PREFIX}{number:04}" for number in range(count)]


@contextmanager
def uploaded(
    http: httpx.Client, directory: Path, count: int, told: Callable[[str], None]
) -> Iterator[Sequence[str]]:
    """`count` adapters made of the one in `directory`, on the server; gone afterwards."""
    try:
        upload(http, directory, count, told)
        yield names(count)
    finally:
        remove(http, names(count))


def upload(http: httpx.Client, directory: Path, count: int, told: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="nibble-load-") as scratch:
        for number, name in enumerate(names(count)):
            weights = _scaled(directory / WEIGHTS, Path(scratch) / WEIGHTS, number)
            _upload(http, name, directory / CONFIG, weights)
            told(f"{number + 1} of {count} adapters are there")


def remove(http: httpx.Client, gone: Sequence[str]) -> None:
    for name in gone:
        response = http.delete(f"/adapters/{name}")
        if response.status_code != 404:
            response.raise_for_status()


def _scaled(source: Path, target: Path, number: int) -> Path:
    """The weights, each 1 + number / 10000 times as large: hardly another adapter, but another."""
    from safetensors.torch import load_file, save_file

    scale = 1 + number / 10_000
    tensors = {name: (t.float() * scale).to(t.dtype) for name, t in load_file(source).items()}
    save_file(tensors, target, metadata={"format": "pt", "load": str(number)})
    return target


def _upload(http: httpx.Client, name: str, config: Path, weights: Path) -> None:
    with config.open("rb") as one, weights.open("rb") as other:
        response = http.post(
            "/adapters",
            data={"name": name},
            files={"config": (CONFIG, one), "weights": (WEIGHTS, other)},
        )
    if response.is_error:
        raise SystemExit(f"{name} was refused (HTTP {response.status_code}): {response.text[:500]}")


def main() -> None:
    """Adapters for tools that bring none: there until they are removed again."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.load.adapters", description=main.__doc__
    )
    parser.add_argument("count", type=int)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--adapter", type=Path, required=True, help="what they are made of")
    parser.add_argument("--remove", action="store_true", help="remove them instead")
    given = parser.parse_args()
    key = os.environ.get("NIBBLE_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=given.url, headers=headers, timeout=120) as http:
        if given.remove:
            remove(http, names(given.count))
        else:
            upload(http, given.adapter, given.count, print)


if __name__ == "__main__":
    main()
