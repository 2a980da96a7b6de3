from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.adapters.lowering.mixed_batch import Server
from tests.oracle import make_base


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Server]:
    """server("qwen3", tied=True): a tiny base with the operator installed, one for each shape."""

    @cache
    def make(architecture: str = "qwen3", **config: Any) -> Server:
        return Server(make_base(tmp_path_factory.mktemp(architecture), architecture, **config))

    return make
