from __future__ import annotations

from pathlib import Path

import pytest
import torch

from base import random_model
from base.load import load_base
from base.random_model import QWEN2_04B

SMALL = QWEN2_04B | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(random_model.SHAPES, "small", SMALL)
    return random_model.random_model("small", tmp_path)


def test_it_loads_as_a_base_in_nf4_and_computes(directory: Path) -> None:
    base = load_base(directory, device="cpu", dtype="float32")
    assert base.spec.hidden_size == 128
    assert base.spec.tied_embeddings
    assert len([each for each in base.spec.linears.values() if each.quantized]) == 14
    assert base.spec.linears["model.layers.1.self_attn.q_proj"].bias
    with torch.no_grad():
        logits = base.model(input_ids=torch.arange(20)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0
    assert len(set(logits[0].argmax(-1).tolist())) > 1


def test_weights_are_of_a_usual_size(directory: Path) -> None:
    base = load_base(directory, device="cpu", dtype="float32")
    weight = base.linear("model.layers.0.mlp.up_proj").weight.dequantize(torch.float32)
    assert 0.01 < weight.std() < 0.04
    assert abs(weight.mean()) < 0.005


def test_a_model_is_written_once_and_again_when_it_was_cut_short(directory: Path) -> None:
    weights = directory / "model-00001.safetensors"
    written = weights.stat().st_mtime_ns
    random_model.random_model("small", directory.parent)
    assert weights.stat().st_mtime_ns == written
    (directory / random_model.DONE).unlink()
    random_model.random_model("small", directory.parent)
    assert weights.stat().st_mtime_ns > written


def test_every_token_has_a_text(directory: Path) -> None:
    tokenizer = load_base(directory, device="cpu").tokenizer
    assert len(tokenizer) == 1000
    assert all(tokenizer.decode([token]) for token in (300, 999))
