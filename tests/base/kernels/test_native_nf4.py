"""y = x Wᵀ + b from the C library, against float64 products of the same dequantised weights."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from base.kernels import NF4Weight, native, reference
from tests.base.kernels.guarded import Guarded, one_thread, unaligned

relaxed = settings(max_examples=20)
MODEL_SHAPES = [(896, 896), (128, 896), (896, 4864), (256, 768), (768, 256), (128, 256)]


def quantized(out: int, width: int, double_quant: bool, blocksize: int = 64) -> NF4Weight:
    if blocksize == 64:
        return NF4Weight.quantize(torch.randn(out, width), double_quant)
    packed, state = quantize_4bit(torch.randn(out, width), blocksize=blocksize, quant_type="nf4")
    return NF4Weight(packed.reshape(-1), state.absmax, (out, width), blocksize)


@one_thread()
def exact(x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    return reference.nf4_linear(x.double(), weight, None if bias is None else bias.double())


@one_thread()
def bound(x: Tensor, weight: NF4Weight) -> Tensor:
    """What rounding may do to a sum of products: 4e-7 of the sum of their sizes, by element."""
    return 4e-7 * (x.double().abs() @ weight.dequantize(torch.float64).abs().t()) + 1e-6


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", MODEL_SHAPES)
def test_relative_error_on_real_shapes(
    kernels: native.Native, shape: tuple[int, int], double_quant: bool
) -> None:
    weight = quantized(*shape, double_quant)
    bias = torch.randn(shape[0])
    for rows in (1, 4, 33):
        x = torch.randn(rows, shape[1])
        y, right = kernels.nf4_linear(x, weight, bias), exact(x, weight, bias)
        assert (y - right).abs().max() <= 1e-6 * right.abs().max()


@relaxed
@given(
    rows=st.integers(1, 70),
    out=st.integers(1, 70),
    width=st.integers(1, 200) | st.integers(1, 5).map(lambda n: 64 * n),
    double_quant=st.booleans(),
    with_bias=st.booleans(),
)
@example(rows=3, out=5, width=1088, double_quant=True, with_bias=True)  # a stretch, and one block
@example(rows=9, out=6, width=1030, double_quant=False, with_bias=True)
@example(rows=70, out=33, width=2048, double_quant=True, with_bias=False)
def test_any_shape(
    kernels: native.Native, rows: int, out: int, width: int, double_quant: bool, with_bias: bool
) -> None:
    weight = quantized(out, width, double_quant)
    x = unaligned(torch.randn(rows, width))
    bias = unaligned(torch.randn(out)) if with_bias else None
    y = Guarded(rows, out)
    kernels.nf4_linear(x, weight, bias, y.inside)
    y.check()
    assert ((y.inside - exact(x, weight, bias)).abs() <= bound(x, weight)).all()


@pytest.mark.parametrize("blocksize", [32, 128, 256])
@pytest.mark.parametrize("width", [64, 96, 192, 256])
def test_other_blocksizes(kernels: native.Native, blocksize: int, width: int) -> None:
    weight = quantized(10, width, False, blocksize)
    for rows in (2, 20):
        x = torch.randn(rows, width)
        y = kernels.nf4_linear(x, weight, None)
        assert ((y - exact(x, weight, None)).abs() <= bound(x, weight)).all()


@pytest.mark.parametrize("shape", [(896, 896), (130, 1984), (61, 70)])
def test_the_bits_of_a_row_depend_on_that_row_alone(
    kernels: native.Native, shape: tuple[int, int]
) -> None:
    weight, bias = quantized(*shape, True), torch.randn(shape[0])
    x = torch.randn(70, shape[1])
    whole = kernels.nf4_linear(x, weight, bias)
    for start, stop in ((0, 1), (69, 70), (3, 5), (10, 16), (1, 8), (7, 40), (0, 64)):
        part = kernels.nf4_linear(x[start:stop].contiguous(), weight, bias)
        assert torch.equal(part, whole[start:stop]), (start, stop)
    turned = torch.randperm(70)
    assert torch.equal(kernels.nf4_linear(x[turned].contiguous(), weight, bias), whole[turned])
    other = x.clone()
    other[1:] = float("nan")
    assert torch.equal(kernels.nf4_linear(other, weight, bias)[0], whole[0])


def test_many_rows_are_laid_out_in_turns(
    kernels: native.Native, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,096 columns: 256 rows fill the workspace, the rest comes after."""
    weight, x = quantized(8, 4096, False), torch.randn(530, 4096)
    whole = kernels.nf4_linear(x, weight, None)
    assert ((whole - exact(x, weight, None)).abs() <= bound(x, weight)).all()
    assert torch.equal(kernels.nf4_linear(x[500:].contiguous(), weight, None), whole[500:])


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_the_number_of_threads_changes_no_bit(kernels: native.Native, rows: int) -> None:
    weight, x = quantized(520, 448, True), torch.randn(rows, 448)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(kernels.nf4_linear(x, weight, None))
    assert all(torch.equal(result, results[0]) for result in results)


def test_no_rows(kernels: native.Native) -> None:
    assert kernels.nf4_linear(torch.zeros(0, 64), quantized(3, 64, False), None).shape == (0, 3)


def test_infinity_and_nan_stay_in_their_row(kernels: native.Native) -> None:
    weight, x = quantized(6, 70, False), torch.randn(3, 70)
    x[1, 69] = float("inf")
    y = kernels.nf4_linear(x, weight, None)
    assert y[[0, 2]].isfinite().all()
    assert not y[1].isfinite().any()
