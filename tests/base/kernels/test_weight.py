import dataclasses

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from base.kernels import NF4Weight
from base.kernels.weight import NF4_LEVELS

SHAPES = [(128, 256), (33, 70), (5, 64), (7, 9), (1, 1), (300, 64)]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_reads_what_bitsandbytes_wrote(shape: tuple[int, int], double_quant: bool) -> None:
    weight = torch.randn(shape)
    packed, state = quantize_4bit(
        weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4"
    )
    ours = NF4Weight.quantize(weight, double_quant)
    assert torch.equal(ours.packed, packed.reshape(-1))
    assert torch.equal(ours.dequantize(), dequantize_4bit(packed, state).view(shape))


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256])
@pytest.mark.parametrize("width", [32, 96, 70])
def test_blocks_that_straddle_rows(width: int, blocksize: int) -> None:
    """Weight by weight. bitsandbytes 0.50.2's own AVX-512 code is wrong for some of these."""
    weight = torch.randn(12, width)
    packed, state = quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
    ours = NF4Weight(packed.reshape(-1), state.absmax, (12, width), blocksize).dequantize()
    for n, value in enumerate(ours.flatten().tolist()):
        pair = int(packed[n // 2])
        code = pair & 15 if n % 2 else pair >> 4
        assert value == torch.tensor(NF4_LEVELS[code]) * state.absmax[n // blocksize]
    # Half the widest gap between two levels is the most that quantising may change.
    scales = state.absmax.repeat_interleave(blocksize)[: weight.numel()].view_as(weight)
    assert ((ours - weight).abs() <= 0.1525 * scales).all()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_rows_of_the_whole(shape: tuple[int, int], double_quant: bool) -> None:
    weight = NF4Weight.quantize(torch.randn(shape), double_quant)
    whole = weight.dequantize()
    for start in range(0, shape[0], 3):
        stop = min(shape[0], start + 4)
        assert torch.equal(weight.dequantize_rows(start, stop), whole[start:stop])
    assert weight.dequantize_rows(1, 1).shape == (0, shape[1])


def test_rounds_once_to_the_asked_dtype() -> None:
    weight = NF4Weight.quantize(torch.randn(16, 64).bfloat16(), True)
    assert torch.equal(weight.dequantize(torch.bfloat16), weight.dequantize().bfloat16())


def test_nbytes_counts_codes_and_scales() -> None:
    weight = torch.randn(512, 1024)
    blocks = 512 * 1024 // 64
    assert NF4Weight.quantize(weight, False).nbytes == 512 * 512 + 4 * blocks
    nested = 512 * 512 + blocks + 4 * blocks // 256 + 4 * 256 + 4
    assert NF4Weight.quantize(weight, True).nbytes == nested


def test_moves_as_one() -> None:
    moved = NF4Weight.quantize(torch.randn(8, 64), True).to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
    assert len(moved.tensors()) == 5


def test_refuses_parts_that_do_not_fit() -> None:
    weight = NF4Weight.quantize(torch.randn(8, 64), True)
    for wrong in (
        {"packed": weight.packed[:-1]},
        {"packed": weight.packed.to(torch.int8)},
        {"packed": weight.packed.repeat(2)[::2]},
        {"absmax": weight.absmax[:-1]},
        {"absmax": weight.absmax.float()},
        {"nested_code": None},
        {"nested_absmax": weight.nested_absmax.repeat(2)},
    ):
        with pytest.raises(ValueError, match=r"NF4 weight|nested_absmax"):
            dataclasses.replace(weight, **wrong)
