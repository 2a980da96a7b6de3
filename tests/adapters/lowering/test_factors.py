"""Factors in the dtype that the kernels of the base's precision stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.delta import LinearDelta, PrivateNorm
from adapters.lowering.factors import factor_dtype, low_rank, rounded
from base.kernels import LowRank, RoundedFactor, Segment, fast_status, lowrank_add
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
    torch.manual_seed(0)  # of one rank and few rows the error is that of a few numbers
    base = load(directory, dtype="float32", precision="fast")
    A, B, x = torch.randn(rank, 896), torch.randn(512, rank), torch.randn(3, 896)
    term = low_rank(A, B, base)
    assert term.A.dtype is term.B.dtype is torch.bfloat16
    assert term.A.nbytes + term.B.nbytes == (A.nbytes + B.nbytes) // 2
    y = lowrank_add(torch.zeros(3, 512), x, [Segment(0, 3, LowRank(term.A, term.B))])
    right = x @ A.t() @ B.t()
    assert 0 < (y - right).norm() <= 0.004 * right.norm()


@pytest.mark.skipif(fast_status().startswith("exact"), reason="no C library")
def test_plain_terms_serve_in_bytes_in_the_fast_precision(directory: Path) -> None:
    base = load(directory, dtype="float32", precision="fast")
    A, B, x = torch.randn(16, 896), torch.randn(512, 16), torch.randn(3, 896)
    plain = low_rank(A, B, base)
    scaled = low_rank(A, B, base, torch.randn(16))
    odd = low_rank(torch.randn(4, 100), B[:, :4], base)
    norm = PrivateNorm(torch.ones(4))
    given = {
        "one": LinearDelta((plain,)),
        "two": LinearDelta((plain, scaled)),
        "three": LinearDelta((odd,)),
        "norm": norm,
    }
    found = rounded(given, base)
    one, two, three = (found[name] for name in ("one", "two", "three"))
    assert isinstance(one, LinearDelta)
    assert isinstance(two, LinearDelta)
    assert isinstance(three, LinearDelta)
    term = one.low_rank[0]
    assert isinstance(term.A, RoundedFactor)
    assert isinstance(term.B, RoundedFactor)
    assert term.A.nbytes + term.B.nbytes <= 0.3 * (A.nbytes + B.nbytes)
    assert two.low_rank[0].A is term.A, "made once"
    assert two.low_rank[1] is scaled
    assert three.low_rank[0] is odd
    assert found["norm"] is norm
    again = rounded(found, base)["one"]
    assert isinstance(again, LinearDelta)
    assert again.low_rank[0] is term
    y = lowrank_add(torch.zeros(3, 512), x, [Segment(0, 3, LowRank(term.A, term.B))])
    right = x @ A.t() @ B.t()
    assert 0 < (y - right).norm() <= 0.013 * right.norm()
    assert rounded(given, load(directory, dtype="float32")) == given
