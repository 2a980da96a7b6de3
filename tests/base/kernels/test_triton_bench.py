"""What the bench on a GPU races computes the same; without a GPU it says so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from base.kernels import bench_cuda


@pytest.mark.cuda
def test_candidates_compute_the_same(triton_here: torch.device) -> None:
    adapters = bench_cuda.lowrank_candidates((32, 64), 2, 1, triton_here)
    attention = bench_cuda.attention_candidates(2, 17, triton_here)
    _agree(attention["triton"](), attention["torch"]())
    first = adapters["triton"]()
    assert isinstance(first, Tensor)  # both add to the same y: the second adds it once more
    _agree(first.clone() * 2, adapters["torch"]())


@pytest.mark.cuda
def test_each_turn_takes_the_next_weight(triton_here: torch.device) -> None:
    product = bench_cuda.product_candidates((32, 64), 1, triton_here, rotation=3 * 32 * 64)
    outputs = [product["triton"]() for _ in range(2)]
    _agree(*outputs)  # copies of one weight
    assert isinstance(product["bfloat16"](), Tensor)


def _agree(y: object, wanted: object) -> None:
    assert isinstance(y, Tensor)
    assert isinstance(wanted, Tensor)
    assert (y.float() - wanted.float()).norm() / wanted.float().norm() < 1e-2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench_cuda.main([])
