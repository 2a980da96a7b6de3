"""DoRA's norm against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapters.lowering.dora import column_norms, weight_norms
from base.kernels import NF4Weight
from base.nf4 import NF4Linear


def exact(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = (weight.detach().double() + B.double() @ A.double()).norm(dim=1)
    return norms


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest relative error of any row."""
    return float(((got.double() - want) / want).abs().max())


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0], ids=["faint", "usual", "stronger than W"])
@pytest.mark.parametrize("rank", [1, 16, 64])
@pytest.mark.parametrize("shape", [(200, 192), (96, 1024)])
def test_norm_of_an_nf4_layer(shape: tuple[int, int], rank: int, strength: float) -> None:
    torch.manual_seed(0)
    linear = NF4Linear(NF4Weight.quantize(torch.randn(shape) / 30, double_quant=False))
    A, B = torch.randn(rank, shape[1]), strength * torch.randn(shape[0], rank)
    want = exact(linear.weight.dequantize(torch.float32), A, B)
    assert worst(weight_norms(linear, A, B), want) < 1e-6


def test_rows_where_the_adapter_cancels_the_base() -> None:
    """W + BA almost zero: the sum of squares has nothing left, so these rows go the long way."""
    torch.manual_seed(0)
    linear = NF4Linear(NF4Weight.quantize(torch.randn(64, 128), double_quant=False))
    weight = linear.weight.dequantize(torch.float32)
    A, B = torch.randn(4, 128), 0.1 * torch.randn(64, 4)
    A[0], B[5], B[9] = weight[5], 0, 0
    B[5, 0] = -1 + 1e-5
    A[1], B[9, 1] = weight[9], -1.0 + 1e-3
    got = weight_norms(linear, A, B)
    assert worst(got, exact(weight, A, B)) < 2e-3  # 1 - 1e-5 itself is rounded in float32
    assert worst(got[[9]], exact(weight, A, B)[[9]]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_a_float_layer_in_tiles(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 5000, bias=False, dtype=dtype)
    A, B = torch.randn(3, 64), 0.1 * torch.randn(5000, 3)
    assert worst(weight_norms(linear, A, B), exact(linear.weight, A, B)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_a_table_is_by_columns_over_the_vocabulary(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = torch.randn(9000, 32).to(dtype)
    A, B = torch.randn(3, 9000), torch.randn(32, 3)
    got = column_norms(table, A, B)
    assert got.shape == (32,)
    assert worst(got, exact(table.t(), A, B)) < 1e-6
