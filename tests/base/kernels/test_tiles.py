"""Rows of a weight as floats from the C library, and the products of training made of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base.kernels import (
    NF4Weight,
    native,
    nf4_backward,
    nf4_linear,
    reference,
    tiles,
    with_precision,
)
from tests.base.kernels.guarded import Guarded

relaxed = settings(max_examples=12)


@relaxed
@given(
    out=st.integers(1, 70),
    width=st.integers(1, 200) | st.integers(1, 5).map(lambda n: 64 * n),
    double_quant=st.booleans(),
    ends=st.tuples(st.integers(0, 70), st.integers(0, 70)),
)
def test_rows_are_the_bits_of_the_torch_path(
    kernels: native.Native, out: int, width: int, double_quant: bool, ends: tuple[int, int]
) -> None:
    start, stop = sorted(min(end, out) for end in ends)
    weight = NF4Weight.quantize(torch.randn(out, width), double_quant)
    for layout in (weight, with_precision(weight, "fast")):
        to = Guarded(stop - start, width)
        kernels.rows(layout, start, stop, to.inside)
        to.check()
        assert torch.equal(to.inside, weight.dequantize_rows(start, stop))


@pytest.mark.parametrize("rows", [(0,), (1,), (3, 5), (tiles.MANY_ROWS + 1,)])
@pytest.mark.parametrize(("out", "width"), [(96, 64), (40, 100), (1, 64), (300, 128)])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_products_by_tiles_are_those_of_the_whole_matrix(
    kernels: native.Native,
    monkeypatch: pytest.MonkeyPatch,
    rows: tuple[int, ...],
    out: int,
    width: int,
    precision: str,
) -> None:
    monkeypatch.setattr(tiles, "TILE_WEIGHTS", 1 << 12)  # so that there are several
    weight = NF4Weight.quantize(torch.randn(out, width), double_quant=False)
    layout = with_precision(weight, precision)  # type: ignore[arg-type]
    whole = weight.dequantize(torch.float64)
    x, grad = torch.randn(*rows, width), torch.randn(*rows, out)
    y, gx = tiles.multiply(kernels, x, layout), tiles.backward(kernels, grad, layout)
    torch.testing.assert_close(y.double(), x.double() @ whole.t(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gx.double(), grad.double() @ whole, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gx, reference.nf4_backward(grad, weight), rtol=1e-5, atol=1e-4)


def test_a_gradient_goes_by_tiles_where_the_library_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatch reaches them, forward with many rows and backward always."""
    called: list[str] = []
    for name in ("multiply", "backward"):
        plain = getattr(tiles, name)
        monkeypatch.setattr(
            tiles, name, lambda *args, n=name, f=plain: (called.append(n), f(*args))[1]
        )
    weight = NF4Weight.quantize(torch.randn(64, 64), double_quant=False)
    for rows in (4, tiles.MANY_ROWS):
        x = torch.randn(rows, 64, requires_grad=True)
        nf4_linear(x, weight).sum().backward()  # type: ignore[no-untyped-call]
        want = torch.ones(rows, 64) @ weight.dequantize()
        torch.testing.assert_close(x.grad, want, rtol=1e-5, atol=1e-4)
    nf4_backward(torch.randn(4, 64).to(torch.bfloat16), weight)  # bfloat16: plain torch
    from base import kernels as package

    expected = [] if package._native is None else ["backward", "multiply", "backward"]
    assert called == expected


@pytest.mark.parametrize("rows", [(3,), (2, 5), (tiles.MANY_ROWS + 1,), (2, tiles.MANY_ROWS)])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_product_may_be_added_to_in_place(rows: tuple[int, ...], precision: str) -> None:
    """As PEFT's AdaLoRA does: a view that came out of a function of autograd would refuse."""
    layout = with_precision(NF4Weight.quantize(torch.randn(96, 64)), precision)  # type: ignore[arg-type]
    x = torch.randn(*rows, 64, requires_grad=True)
    y = nf4_linear(x, layout)
    y += 1
    (grad,) = torch.autograd.grad(y.sum(), x)
    wanted = layout.dequantize().sum(dim=0).expand_as(x)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4)
