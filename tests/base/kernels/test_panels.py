"""Weights in panels: moved, never rounded, and as small as they were."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from base.kernels import NF4Weight, PanelWeight, with_precision


def nf4(out: int, width: int, blocksize: int = 64, double_quant: bool = False) -> NF4Weight:
    if blocksize == 64:
        return NF4Weight.quantize(torch.randn(out, width), double_quant)
    packed, state = quantize_4bit(torch.randn(out, width), blocksize=blocksize, quant_type="nf4")
    return NF4Weight(packed.reshape(-1), state.absmax, (out, width), blocksize)


@pytest.mark.parametrize("shape", [(1, 64), (32, 64), (33, 128), (70, 192), (130, 320)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_weights_stay_what_they_are(shape: tuple[int, int], double_quant: bool) -> None:
    weight = nf4(*shape, double_quant=double_quant)
    panels = PanelWeight.pack(weight)
    assert panels.is_nested == double_quant
    assert torch.equal(panels.dequantize(), weight.dequantize())
    assert torch.equal(panels.unpack().packed, weight.packed)
    assert torch.equal(panels.unpack().absmax, weight.scales())


@pytest.mark.parametrize("blocksize", [128, 256, 4096])
def test_larger_blocks_of_scales(blocksize: int) -> None:
    weight = nf4(40, 192, blocksize)  # rows that start inside a block
    assert torch.equal(PanelWeight.pack(weight).dequantize(), weight.dequantize())


def test_a_large_weight_is_laid_out_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nf4(100, 192, 128)
    whole = PanelWeight.pack(weight)
    monkeypatch.setattr("base.kernels.panels._AT_ONCE", 192 * 32)
    assert torch.equal(PanelWeight.pack(weight).panels, whole.panels)


def test_rows_alone() -> None:
    weight = nf4(100, 128)
    panels = PanelWeight.pack(weight)
    for start, stop in ((0, 100), (0, 1), (31, 33), (64, 100), (99, 100), (5, 5)):
        rows = panels.dequantize_rows(start, stop, torch.bfloat16)
        assert torch.equal(rows, weight.dequantize_rows(start, stop, torch.bfloat16))


def test_bytes() -> None:
    weight = nf4(608, 896)
    assert PanelWeight.pack(weight).nbytes == weight.nbytes
    nested = nf4(224, 896, double_quant=True)
    assert PanelWeight.pack(nested).nbytes < 1.1 * nested.nbytes


def test_eight_bits() -> None:
    w = torch.randn(70, 128)
    w[3, 64:] = 0
    w[5, :64] = 1e-40
    panels = PanelWeight.quantize8(w.bfloat16())
    largest = w.bfloat16().float().view(70, 2, 64).abs().amax(-1, keepdim=True)
    error = (panels.dequantize() - w.bfloat16().float()).view(70, 2, 64).abs()
    assert (error <= largest / 254 * 1.001 + 1e-36).all()
    assert panels.nbytes == 3 * 2 * (2048 + 128)
    assert not panels.dequantize()[3, 64:].any()


def test_what_cannot_be_laid_out_stays_exact() -> None:
    for weight in (nf4(8, 70), nf4(8, 64, 32)):
        assert with_precision(weight, "fast") is weight
        with pytest.raises(ValueError, match="multiples of 64"):
            PanelWeight.pack(weight)
    assert isinstance(with_precision(nf4(8, 64), "exact"), NF4Weight)


def test_another_device_reads_bitsandbytes_layout() -> None:
    panels = PanelWeight.pack(nf4(8, 64))
    assert panels.to("cpu") is panels
    moved = panels.to("meta")
    assert isinstance(moved, NF4Weight)
    assert moved.device.type == "meta"
    with pytest.raises(ValueError, match="8 bits"):
        PanelWeight.quantize8(torch.randn(8, 64)).to("meta")


def test_refuses_wrong_parts() -> None:
    good = PanelWeight.pack(nf4(8, 64)).panels
    for wrong, shape, bits in (
        (good[:, :, :-1].contiguous(), (8, 64), 4),
        (good.to(torch.int8), (8, 64), 4),
        (good, (40, 64), 4),
        (good, (8, 64), 8),
        (good, (8, 65), 4),
        (good, (8, 64), 5),
        (torch.cat([good, good], -1)[..., ::2], (8, 64), 4),
    ):
        with pytest.raises(ValueError, match="panels"):
            PanelWeight(wrong, shape, bits)


@pytest.mark.parametrize("shape", [(1, 64), (31, 64), (33, 128), (70, 448)])
def test_rows_are_looked_up_with_the_bits_of_the_whole(shape: tuple[int, int]) -> None:
    weight = PanelWeight.quantize8(torch.randn(shape))
    ids = torch.randint(0, shape[0], (3, 5))
    ids[0, 0], ids[2, 4] = 0, shape[0] - 1
    assert torch.equal(weight.rows(ids), weight.dequantize()[ids])
    assert weight.rows(torch.empty(1, 0, dtype=torch.int64)).shape == (1, 0, shape[1])
