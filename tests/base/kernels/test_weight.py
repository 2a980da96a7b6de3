import dataclasses

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from base.kernels import NF4Weight
from base.kernels.quantization import NF4_LEVELS, dynamic_code, quantize_scales

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


@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 40_000])  # of scales; nested ones have 256
def test_double_quantisation_is_to_the_byte_that_of_bitsandbytes(blocks: int) -> None:
    weight = torch.randn(blocks, 64) * torch.rand(blocks, 1)
    _, theirs = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = NF4Weight.quantize(weight, True)
    assert torch.equal(ours.absmax, theirs.absmax)
    assert torch.equal(some(ours.nested_code), theirs.state2.code)
    if torch.get_num_threads() == 1 or blocks < 1 << 15:
        assert torch.equal(some(ours.nested_absmax), theirs.state2.absmax)
        assert some(ours.nested_offset) == theirs.offset


def test_blocks_of_zeros_and_scales_that_are_all_one_keep_theirs() -> None:
    for weight in (torch.zeros(300, 64), torch.ones(300, 64), torch.eye(64).repeat(5, 1)):
        packed, theirs = quantize_4bit(
            weight, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        ours = NF4Weight.quantize(weight, True)
        assert torch.equal(ours.absmax, theirs.absmax)
        assert torch.equal(ours.dequantize(), dequantize_4bit(packed, theirs).view(weight.shape))


def test_the_number_of_threads_changes_no_bit() -> None:
    """torch adds up so many scales in another order for each number of threads."""
    drawn = torch.rand(4, 1 << 17, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    means, found = set(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            means.add(tuple(float(absmax.mean()) for absmax in drawn))
            found.append([tensor for absmax in drawn for tensor in quantize_scales(absmax)])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(means) > 1, "torch no longer does: nothing was tested"
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))


def some(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor


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


def test_the_code_of_scales_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one = dynamic_code()
    monkeypatch.setattr(torch, "linspace", lambda *_, **__: pytest.fail("computed again"))
    other = dynamic_code()
    assert torch.equal(one, other)
    assert one.data_ptr() != other.data_ptr(), "two weights would share it"
