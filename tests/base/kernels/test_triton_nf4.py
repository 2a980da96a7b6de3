"""Triton's NF4 product against float64 and bitsandbytes' layout, where `triton_here` says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from base.kernels import NF4Weight

pytestmark = pytest.mark.cuda

SLOW = pytest.mark.slow  # in the interpreter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3, torch.float16: 5e-4}


def product(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    from base.kernels.triton_nf4 import nf4_linear

    return nf4_linear(x, weight, bias)


def random_weight(out: int, width: int, nested: bool) -> NF4Weight:
    """Random codes and scales: quantising would import bitsandbytes, for seconds."""
    if not nested:
        return NF4Weight.quantize(torch.randn(out, width), double_quant=False)
    blocks = -(-out * width // 64)
    return NF4Weight(
        torch.randint(0, 256, ((out * width + 1) // 2,), dtype=torch.uint8),
        torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        (out, width),
        nested_absmax=torch.rand(-(-blocks // 256)) + 0.5,
        nested_code=torch.linspace(-1, 1, 256),
        nested_offset=torch.tensor(1.5),
    )


def exact(x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    """Weights rounded to x's dtype, as they are dequantised; then all in float64."""
    y = x.double() @ weight.dequantize(x.dtype).double().t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", [*DTYPES[:2], pytest.param(DTYPES[2], marks=SLOW)])
@pytest.mark.parametrize(
    ("rows", "out", "width", "nested", "biased"),
    [
        (1, 33, 64, True, True),
        (3, 5, 7, False, False),  # rows of W begin inside a byte and inside a block
        (2, 20, 300, True, False),  # two splits, the second short; blocks ignore row ends
        (17, 40, 66, False, True),
        (2, 260, 65, True, True),  # more than 256 blocks: two of the outer scales
    ],
)
def test_odd_shapes_against_float64(
    triton_here: torch.device,
    dtype: torch.dtype,
    rows: int,
    out: int,
    width: int,
    nested: bool,
    biased: bool,
) -> None:
    torch.manual_seed(rows)
    weight = random_weight(out, width, nested).to(triton_here)
    x = torch.randn(rows, width, device=triton_here).to(dtype)
    bias = torch.randn(out, device=triton_here).to(dtype) if biased else None
    y = product(x, weight, bias)
    assert y.dtype is dtype
    wanted = exact(x, weight, bias)
    assert (y.double() - wanted).norm() / wanted.norm() < BOUND[dtype]


@pytest.mark.parametrize("blocksize", [pytest.param(32, marks=SLOW), 128])
def test_other_sizes_of_block(triton_here: torch.device, blocksize: int) -> None:
    codes = torch.randint(0, 256, (12 * 40 // 2,), dtype=torch.uint8)
    scales = torch.rand(-(-12 * 40 // blocksize))
    weight = NF4Weight(codes, scales, (12, 40), blocksize).to(triton_here)
    x = torch.randn(2, 40, device=triton_here)
    torch.testing.assert_close(
        product(x, weight).double(), exact(x, weight, None), rtol=1e-5, atol=1e-5
    )


def test_leading_dimensions_strides_and_no_rows(triton_here: torch.device) -> None:
    weight = random_weight(6, 34, False).to(triton_here)
    wide = torch.randn(2, 3, 40, device=triton_here)
    for x in (wide[..., 3:37], torch.randn(34, 4, device=triton_here).t(), wide[0, :0, :34]):
        y = product(x, weight)
        assert y.shape == (*x.shape[:-1], 6)
        torch.testing.assert_close(y.double(), exact(x, weight, None), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of NaN
@pytest.mark.parametrize("dtype", [DTYPES[0], *(pytest.param(d, marks=SLOW) for d in DTYPES[1:])])
def test_a_row_does_not_depend_on_its_batch(triton_here: torch.device, dtype: torch.dtype) -> None:
    weight = random_weight(32, 320, True).to(triton_here)
    x = torch.randn(20, 320, device=triton_here).to(dtype)
    together = product(x, weight)
    for row in (0, 7, 19):
        assert torch.equal(product(x[row : row + 1], weight)[0], together[row])
    poisoned = x.clone()
    poisoned[3] = torch.nan
    poisoned[18] = torch.inf
    rest = [n for n in range(20) if n not in (3, 18)]
    assert torch.equal(product(poisoned, weight)[rest], together[rest])


def test_splits_follow_the_weight_alone(triton_here: torch.device) -> None:
    from base.kernels.triton_nf4 import split_columns

    assert [
        split_columns(*shape) for shape in ((896, 896), (128, 4096), (16384, 4096), (1, 1))
    ] == [
        256,
        256,
        4096,
        256,
    ]


def test_scales_of_a_block_count(triton_here: torch.device) -> None:
    """One changed scale changes the rows of W that its block lies in, and no other."""
    weight = random_weight(8, 96, False).to(triton_here)
    absmax = weight.absmax.clone()
    absmax[4] *= 2  # weights 256 to 319: columns 64 and up of row 2, columns 0 to 31 of row 3
    x = torch.randn(1, 96, device=triton_here)
    changed = product(x, replace(weight, absmax=absmax)) != product(x, weight)
    assert changed[0].nonzero().flatten().tolist() == [2, 3]
