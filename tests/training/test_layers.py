from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn

from base.kernels import NF4Weight, PanelWeight, Weight
from base.nf4 import NF4Linear
from training.layers import DoraLinear, LoraLinear, gained, takes_gain


@pytest.fixture
def linear() -> NF4Linear:
    torch.manual_seed(1)
    return NF4Linear(NF4Weight.quantize(torch.randn(96, 64)), torch.randn(96))


def _random(layer: LoraLinear) -> LoraLinear:
    with torch.no_grad():
        layer.B.normal_()
        if isinstance(layer, DoraLinear):
            layer.m.mul_(torch.rand_like(layer.m) + 0.5)
    return layer


def _lora(layer: LoraLinear, weight: Tensor, x: Tensor) -> Tensor:
    assert layer.base.bias is not None
    return x @ (weight + layer.scale * layer.B @ layer.A).T + layer.base.bias


def _dora(layer: LoraLinear, weight: Tensor, x: Tensor) -> Tensor:
    """Equation 5 as it stands, with the whole matrix; the norm is a constant to the gradient."""
    assert isinstance(layer, DoraLinear)
    assert layer.base.bias is not None
    V = weight + layer.scale * layer.B @ layer.A
    norm = V.norm(dim=1, keepdim=True).detach()
    return x @ (layer.m[:, None] * V / norm).T + layer.base.bias


@pytest.mark.parametrize(("kind", "formula"), [(LoraLinear, _lora), (DoraLinear, _dora)])
def test_output_and_gradients_are_those_of_the_equation(
    linear: NF4Linear, kind: type[LoraLinear], formula
) -> None:
    layer = _random(kind(linear, rank=4, scale=1.7))
    x = torch.randn(3, 5, 64, requires_grad=True)
    weight = linear.weight.dequantize(torch.float32)
    wanted = [x, *layer.parameters()]
    wanted = [tensor for tensor in wanted if tensor.requires_grad]
    pull = torch.randn(3, 5, 96)
    got, want = layer(x), formula(layer, weight, x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(got, wanted, pull),
        torch.autograd.grad(want, wanted, pull),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", [LoraLinear, DoraLinear])
def test_a_fresh_layer_is_the_base(linear: NF4Linear, kind: type[LoraLinear]) -> None:
    x = torch.randn(7, 64)
    layer = kind(linear, rank=4, scale=2.0)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)


def test_parameters_stay_fp32_over_a_bf16_base(linear: NF4Linear) -> None:
    layer = _random(DoraLinear(linear.to(torch.bfloat16), rank=4, scale=1.0))
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}


def _weights() -> dict[str, Weight]:
    """Layouts that a gain goes into, and such that it does not: see `takes_gain`."""
    torch.manual_seed(1)
    W = torch.randn(96, 64)
    return {
        "double-quantised": NF4Weight.quantize(W),
        "plain": NF4Weight.quantize(W, double_quant=False),
        "panels": PanelWeight.pack(NF4Weight.quantize(W)),
        "blocks across rows": NF4Weight.quantize(torch.randn(64, 24), double_quant=False),
    }


@pytest.mark.parametrize("kind", [LoraLinear, DoraLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", _weights())
@pytest.mark.parametrize("dead", [False, True], ids=["", "a row with m = 0"])
def test_the_product_is_that_of_the_plain_way(
    kind: type[LoraLinear], dtype: torch.dtype, layout: str, dead: bool
) -> None:
    """The way that dropout takes, with nothing dropped, is the oracle."""
    weight = _weights()[layout]
    linear = NF4Linear(weight, torch.randn(weight.shape[0])).to(dtype)
    layer = _random(kind(linear, rank=4, scale=1.7, dropout=1e-12))
    if isinstance(layer, DoraLinear):
        assert takes_gain(weight) == (layout not in ("panels", "blocks across rows"))
        with torch.no_grad():
            layer.m[5] *= 1 - dead
    x = torch.randn(3, 5, weight.shape[1]).to(dtype).requires_grad_()
    pull = torch.randn(3, 5, weight.shape[0]).to(dtype)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    found = []
    for plain in (False, True):
        y = layer.train(plain)(x)
        assert y.dtype is dtype
        found.append([y, *torch.autograd.grad(y, wanted, pull)])
    tight = {"rtol": 1e-4, "atol": 1e-3} if dtype is torch.float32 else {"rtol": 5e-2, "atol": 0.5}
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **tight)


def test_a_gain_goes_into_the_scales_alone() -> None:
    weight, g = _weights()["double-quantised"], torch.rand(96) + 0.5
    assert isinstance(weight, NF4Weight)
    scaled = gained(weight, g)
    assert scaled.packed is weight.packed
    wanted = g[:, None] * weight.dequantize()
    torch.testing.assert_close(scaled.dequantize(), wanted, rtol=3e-7, atol=0)


def test_the_first_layer_asks_for_no_gradient_of_its_input(linear: NF4Linear) -> None:
    layer = _random(LoraLinear(linear, rank=4, scale=1.0))
    layer(torch.randn(5, 64)).sum().backward()
    assert layer.A.grad is not None


def test_doras_gradients_are_pefts(linear: NF4Linear) -> None:
    """PEFT dequantises W and takes the norm of the sum in every step."""
    layer = _random(DoraLinear(linear, rank=4, scale=2.0))
    dense = nn.Linear(64, 96)
    dense.weight.data, dense.bias.data = linear.weight.dequantize(), linear.bias.detach().clone()
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(dense), config)
    A, B = (p for n, p in theirs.named_parameters() if "lora_A" in n or "lora_B" in n)
    (m,) = (p for n, p in theirs.named_parameters() if "magnitude" in n)
    for parameter, own in ((A, layer.A), (B, layer.B), (m, layer.m)):
        parameter.data.copy_(own.detach())
    x, pull = torch.randn(7, 64, requires_grad=True), torch.randn(7, 96)
    got = torch.autograd.grad(layer(x), [x, layer.A, layer.B, layer.m], pull)
    want = torch.autograd.grad(theirs(x), [x, A, B, m], pull)
    for ours, other in zip(got, want, strict=True):
        assert (ours - other).abs().max() <= 1e-5 * other.abs().max()
