"""The C library, compiled from the sources of this checkout, on each instruction set in turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from base.kernels import build, native


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> native.Native:
    folder = tmp_path_factory.mktemp("kernels")
    if build.build(folder) is None:
        reason = (folder / build.REASON).read_text()
        if reason.startswith("no C compiler"):
            pytest.skip(reason)
        pytest.fail(reason)
    loaded, status = native.load(folder)
    if loaded is None:
        pytest.skip(f"the C library is {status}")
    return loaded


@pytest.fixture(scope="module", params=["portable", "avx2", "avx512"])
def kernels(library: native.Native, request: pytest.FixtureRequest) -> native.Native:
    try:
        library.select(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    return library


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Two threads whatever the machine, and what a test changes is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
