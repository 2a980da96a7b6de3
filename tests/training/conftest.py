"""A tiny random base for the training tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from base.load import Base, load_base
from tests.oracle import make_base


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers this small only lose by sharing their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "qwen3", "qwen3")


@pytest.fixture(scope="session")
def _loaded(base_directory: Path) -> Base:
    return load_base(base_directory, device="cpu", dtype="float32")


@pytest.fixture
def base(_loaded: Base) -> Iterator[Base]:
    """The base; whatever a test attaches to it is taken out again."""
    before = dict(_loaded.model.named_modules())
    yield _loaded
    for path, module in before.items():
        parent, _, name = path.rpartition(".")
        if path and _loaded.model.get_submodule(path) is not module:
            setattr(_loaded.model.get_submodule(parent), name, module)
