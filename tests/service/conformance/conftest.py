from pathlib import Path

import pytest

from service.conformance.tiny import make_base


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("conformance") / "base", "qwen3")
