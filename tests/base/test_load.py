"""load_base against transformers' own loading, on tiny random checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from base.load import Base, load_base
from tests.base.tiny import CONFIGS, save_tiny


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_logits_equal_transformers(name: str, double_quant: bool, tmp_path: Path) -> None:
    """Everything but the quantised weights comes out as from_pretrained loads it."""
    save_tiny(CONFIGS[name], tmp_path / "base")
    base = load_base(tmp_path / "base", double_quant=double_quant, cache_dir=tmp_path)
    oracle = dense_twin(base, tmp_path / "base")
    ids = torch.randint(3, 320, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(base.model(ids).logits, oracle(ids).logits, rtol=1e-5, atol=1e-5)


def dense_twin(base: Base, directory: Path) -> Any:
    """transformers' model of the same checkpoint, with the base's dequantised weights in it."""
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=base.dtype).eval()
    for path in quantised(base):
        weight = base.linear(path).weight
        oracle.get_submodule(path).weight.data.copy_(weight.dequantize())
    return oracle


def quantised(base: Base) -> list[str]:
    return [path for path, shape in base.spec.linears.items() if shape.quantized]
