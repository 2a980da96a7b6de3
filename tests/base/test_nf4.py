"""NF4Linear against a dense layer that holds the same, dequantised weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from base import nf4
from base.kernels import NF4Weight
from base.nf4 import NF4Linear

SHAPES = [(96, 64), (64, 192), (40, 100), (1, 64)]  # 100: blocks of 64 straddle the rows


def twins(
    out: int, width: int, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[NF4Linear, nn.Linear]:
    """The layer under test, and a dense one that computes the same in plain torch."""
    weight = NF4Weight.quantize(torch.randn(out, width), double_quant=False)
    b = torch.randn(out, dtype=dtype) if bias else None
    dense = nn.Linear(width, out, bias=bias).to(dtype)
    dense.weight = nn.Parameter(weight.dequantize(dtype))
    if b is not None:
        dense.bias = nn.Parameter(b.clone())
    return NF4Linear(weight, b), dense


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


@pytest.mark.parametrize(("out", "width"), SHAPES)
@pytest.mark.parametrize("rows", [(1,), (3, 5), (0,)])
def test_forward_equals_the_dense_layer(out: int, width: int, rows: tuple[int, ...]) -> None:
    layer, dense = twins(out, width)
    x = torch.randn(*rows, width)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)


def test_matmul_leaves_the_bias_out() -> None:
    layer, dense = twins(96, 64)
    x = torch.randn(4, 64)
    torch.testing.assert_close(layer.matmul(x), x @ dense.weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_gradient_of_the_input_equals_the_dense_layer(out: int, width: int) -> None:
    layer, dense = twins(out, width)
    x = torch.randn(2, 3, width)
    gradients = [_gradient(module, x) for module in (layer, dense)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_gradient_equals_finite_differences() -> None:
    layer, _ = twins(8, 64)
    x, direction = torch.randn(64), torch.randn(64)
    step = 0.5  # the layer is linear, so any step is exact up to rounding
    rise = (_loss(layer(x + step * direction)) - _loss(layer(x - step * direction))) / (2 * step)
    torch.testing.assert_close(_gradient(layer, x) @ direction, rise, rtol=1e-4, atol=1e-4)


def test_gradient_in_bfloat16() -> None:
    layer, dense = twins(96, 64, dtype=torch.bfloat16)
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, dense(x), rtol=2e-2, atol=2e-2)
    gradient = _gradient(layer, x)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, _gradient(dense, x), rtol=2e-2, atol=5e-2)


def test_the_weight_takes_no_gradient_and_is_no_parameter() -> None:
    layer, _ = twins(96, 64)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_row_square_norms(out: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "_TILE_WEIGHTS", 7 * width)  # several tiles, the last one short
    layer, dense = twins(out, width)
    norms = layer.row_square_norms()
    torch.testing.assert_close(norms, dense.weight.square().sum(dim=1), rtol=1e-5, atol=0)
    assert norms.dtype == torch.float32
    assert layer.row_square_norms() is norms


def test_a_cast_leaves_the_scales_alone() -> None:
    layer, dense = twins(96, 64)
    before = layer.weight.dequantize()
    layer.to(torch.bfloat16)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight.dequantize(), before)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), dense.to(torch.bfloat16)(x), rtol=2e-2, atol=2e-2)


def test_the_weight_moves_with_the_module() -> None:
    layer, _ = twins(96, 64)
    layer.row_square_norms()
    layer.to("meta")
    assert {t.device.type for t in layer.weight.tensors().values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_the_dense_layer() -> None:
    layer, dense = (module.to("cuda") for module in twins(96, 64, dtype=torch.bfloat16))
    x = torch.randn(8, 64, dtype=torch.bfloat16, device="cuda")
    torch.testing.assert_close(layer(x), dense(x), rtol=2e-2, atol=5e-2)
    torch.testing.assert_close(_gradient(layer, x), _gradient(dense, x), rtol=2e-2, atol=5e-2)


def _gradient(module: nn.Module, x: Tensor) -> Tensor:
    """∂loss/∂x, with a loss that weighs each output differently."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(_loss(module(x)), x)[0]


def _loss(y: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, y.numel(), device=y.device).view_as(y)
    return (y * weights.to(y.dtype)).sum()
