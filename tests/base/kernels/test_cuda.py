"""The arguments we hand to bitsandbytes' fused operator: it has a plain version for the CPU."""

import pytest
import torch

from base.kernels import NF4Weight, cuda, reference


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_operator_reads_our_fields(double_quant: bool) -> None:
    weight = NF4Weight.quantize(torch.randn(40, 128), double_quant)
    x, bias = torch.randn(2, 5, 128), torch.randn(40)
    y = cuda.nf4_linear(x, weight, bias)
    assert torch.allclose(y, reference.nf4_linear(x, weight, bias), atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(rows: int, double_quant: bool, dtype: torch.dtype) -> None:
    weight = NF4Weight.quantize(torch.randn(896, 896), double_quant).to("cuda")
    x = torch.randn(rows, 896, device="cuda", dtype=dtype)
    bias = torch.randn(896, device="cuda", dtype=dtype)
    right = reference.nf4_linear(x.double(), weight, bias.double())
    error = (cuda.nf4_linear(x, weight, bias) - right).abs().max() / right.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)
