"""Factors in the dtype that the kernels of the base's precision stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.lowering.factors import factor_dtype, low_rank
from base.kernels import LowRank, Segment, fast_status, lowrank_add
from base.load import Base, load_base
from tests.oracle import make_base


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "b", "qwen2")


def load(directory: Path, **more: Any) -> Base:
    return load_base(directory, device="cpu", keep=False, **more)


def test_exact_factors_stay_as_they_are(directory: Path) -> None:
    base = load(directory, dtype="float32")
    A, B = torch.randn(4, 64), torch.randn(128, 4)
    term = low_rank(A, B, base)
    assert torch.equal(term.A, A)
    assert torch.equal(term.B, B)
    assert factor_dtype(load(directory, dtype="bfloat16")) is torch.bfloat16


@pytest.mark.skipif(fast_status().startswith("exact"), reason="no C library")
@pytest.mark.parametrize("rank", [1, 8, 16, 33])
def test_fast_factors_take_half_the_memory_and_make_the_stated_error(
    directory: Path, rank: int
) -> None:
    base = load(directory, dtype="float32", precision="fast")
    A, B, x = torch.randn(rank, 896), torch.randn(512, rank), torch.randn(3, 896)
    term = low_rank(A, B, base)
    assert term.A.dtype is term.B.dtype is torch.bfloat16
    assert term.A.nbytes + term.B.nbytes == (A.nbytes + B.nbytes) // 2
    y = lowrank_add(torch.zeros(3, 512), x, [Segment(0, 3, LowRank(term.A, term.B))])
    right = x @ A.t() @ B.t()
    assert 0 < (y - right).norm() <= 0.004 * right.norm()
