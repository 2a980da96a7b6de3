"""Virtual tokens over a base that came without transformers: the keys and values are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.lowering.virtual_run import run_virtual_tokens
from base import kernels
from base.fused import fuse
from base.lean.model import LeanModel
from base.load import load_base
from tests.base.tiny import CONFIGS, save_tiny


@pytest.mark.skipif(kernels.steps() is None, reason="the C library is not built")
@pytest.mark.parametrize(
    ("name", "precision"), [("qwen3", "exact"), ("gemma3", "exact"), ("gemma2", "fast")]
)
def test_virtual_tokens_are_those_of_transformers(
    name: str, precision: Any, tmp_path: Path
) -> None:
    save_tiny(CONFIGS[name], tmp_path / "b", dtype=torch.bfloat16)
    asked: dict[str, Any] = {"device": "cpu", "dtype": "float32", "precision": precision}
    theirs = load_base(tmp_path / "b", cache_dir=tmp_path / "cache", **asked)
    ours = load_base(tmp_path / "b", cache_dir=tmp_path / "cache", lean=True, **asked)
    assert isinstance(ours.model, LeanModel)
    fuse(ours.model)
    virtual = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    found, wanted = (run_virtual_tokens(virtual, base, {}) for base in (ours, theirs))
    assert torch.equal(found.keys, wanted.keys)
    assert torch.equal(found.values, wanted.values)
