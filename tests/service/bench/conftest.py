"""A tiny random base and adapters for the benchmark's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.load import load_base
from service.bench.random_adapters import random_adapters
from tests.oracle import make_base


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bench") / "qwen3", "qwen3")


@pytest.fixture(scope="session")
def adapters(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    spec = load_base(base_directory, device="cpu").spec
    return tuple(random_adapters(tmp_path_factory.mktemp("adapters"), spec, 8, 4))
