"""Which quantised checkpoints load, and why the others do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from base.checkpoint import WEIGHTS, Checkpoint
from base.errors import UnservableBase
from base.kernels import NF4Weight
from base.prequantized import PrequantizedParts, nf4_levels, refuse_foreign_quantization

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("quantization", [None, BNB])
def test_float_and_nf4_pass(quantization: Any) -> None:
    refuse_foreign_quantization({"quantization_config": quantization})
    refuse_foreign_quantization({})


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({}, "an unnamed method"),
        ({**BNB, "load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes in 8 bit"),
        ({**BNB, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes in fp4"),
    ],
)
def test_others_are_refused(quantization: dict[str, Any], name: str) -> None:
    with pytest.raises(UnservableBase, match=f"quantised by {name}; float weights and"):
        refuse_foreign_quantization({"quantization_config": quantization})


def test_the_levels_are_those_of_bitsandbytes() -> None:
    from bitsandbytes.functional import get_4bit_type

    assert torch.equal(nf4_levels(), get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_what_bitsandbytes_packs_comes_back(
    double_quant: bool, storage: torch.dtype, tmp_path: Path
) -> None:
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(96, 64)
    packed, state = quantize_4bit(
        weight, compress_statistics=double_quant, quant_type="nf4", quant_storage=storage
    )
    parts = {f"w.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    read, _ = of(tmp_path, {"w.weight": packed, **parts, "norm.weight": torch.ones(4)})
    assert read.weights == {"w.weight"}
    assert read.extras == set(parts)
    expected = NF4Weight.quantize(weight, double_quant)
    assert torch.equal(read.read("w.weight").dequantize(), expected.dequantize())


def test_fp4_is_refused(tmp_path: Path) -> None:
    key = "w.weight.quant_state.bitsandbytes__fp4"
    with pytest.raises(UnservableBase, match=r"w\.weight is quantised as fp4; nf4 is served"):
        of(tmp_path, {key: torch.zeros(2)})


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"quant_state.bitsandbytes__nf4": torch.tensor([123])}, "no whole NF4 weight of bits"),
        ({"absmax": None}, r"w\.weight\.absmax"),
        ({"absmax": torch.ones(3)}, "absmax of an NF4 weight 96x64"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    parts: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(96, 64), quant_type="nf4", compress_statistics=False)
    tensors = {"w.weight": packed}
    for name, value in {**state.as_dict(packed=True), **parts}.items():
        if value is not None:
            tensors[f"w.weight.{name}"] = value
    read, _ = of(tmp_path, tensors)
    with pytest.raises(UnservableBase, match=reason):
        read.read("w.weight")


def of(directory: Path, tensors: dict[str, torch.Tensor]) -> tuple[PrequantizedParts, Checkpoint]:
    save_file(tensors, directory / WEIGHTS)
    checkpoint = Checkpoint(directory)
    return PrequantizedParts(checkpoint), checkpoint
