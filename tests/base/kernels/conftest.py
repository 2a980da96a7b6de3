"""The C library, compiled from the sources of this checkout, on each instruction set in turn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from base.kernels import build, native


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> native.Native:
    folder = Path(os.environ.get("NIBBLE_NATIVE") or Path(build.__file__).parent)
    if "NIBBLE_NATIVE" not in os.environ and not build.is_current(folder / build.LIBRARY):
        folder = tmp_path_factory.mktemp("kernels")
        build.build(folder)
    if not (folder / build.LIBRARY).exists():
        reason = (folder / build.REASON).read_text()
        if reason.startswith("no C compiler"):
            pytest.skip(reason)
        pytest.fail(reason)
    loaded, status = native.load(folder)
    if loaded is None:
        pytest.skip(f"the C library is {status}")
    return loaded


@pytest.fixture(scope="module", params=["portable", "avx2", "avx512"])
def kernels(library: native.Native, request: pytest.FixtureRequest) -> Iterator[native.Native]:
    try:
        library.select(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield library
    library.select()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Two threads whatever the machine, and what a test changes is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def triton_here() -> torch.device:
    """Where Triton's kernels can run: a GPU, or the CPU in a process that interprets them."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; test_triton.py runs this in the interpreter")
    return torch.device("cuda")
