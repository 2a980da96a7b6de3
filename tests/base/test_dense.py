"""Embedding and head in the checkpoint's own dtype: the same numbers in half the memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from base.dense import StoredEmbedding, StoredLinear
from base.load import load_base
from tests.oracle import make_base


def in_bfloat16(directory: Path) -> Path:
    weights = directory / "model.safetensors"
    tensors = {name: t.bfloat16() for name, t in load_file(str(weights)).items()}
    save_file(tensors, str(weights), {"format": "pt"})
    return directory


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma"])
def test_bfloat16_stays_and_computes_in_float32(name: str, tmp_path: Path) -> None:
    base = load_base(in_bfloat16(make_base(tmp_path / "b", name)), device="cpu", dtype="float32")
    table, head = base.model.get_input_embeddings(), base.model.get_output_embeddings()
    assert type(table) is StoredEmbedding
    assert type(head) is StoredLinear
    assert table.weight.dtype is head.weight.dtype is torch.bfloat16
    assert (table.weight is head.weight) == base.spec.tied_embeddings
    assert base.embedding("model.embed_tokens") is table
    assert base.linear("lm_head") is head
    ids = torch.tensor([[3, 7, 500]])
    rows = table(ids)
    scale = base.spec.hidden_size**0.5 if name == "gemma" else 1.0
    assert rows.dtype is torch.float32
    assert torch.equal(rows, table.weight[ids].float() * torch.tensor(scale))
    x = torch.randn(1, 4, base.spec.hidden_size, requires_grad=True)
    y = head(x)
    assert torch.allclose(y, x @ head.weight.float().t(), atol=1e-5)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.allclose(gradient, 2 * y.detach() @ head.weight.float(), atol=1e-4)
    # Whoever else stays float32, and the logits are those of the widened weights.
    assert base.model.model.norm.weight.dtype is torch.float32
    ours = base.model(input_ids=ids, use_cache=False).logits
    table.weight.data = table.weight.data.float()
    head.weight.data = table.weight.data if base.spec.tied_embeddings else head.weight.data.float()
    assert torch.allclose(ours, base.model(input_ids=ids, use_cache=False).logits, atol=1e-5)


def test_float32_checkpoints_stay_as_they_are(tmp_path: Path) -> None:
    base = load_base(make_base(tmp_path / "b", "llama"), device="cpu", dtype="float32")
    assert type(base.model.lm_head) is torch.nn.Linear
    assert base.model.get_input_embeddings().weight.dtype is torch.float32


def test_other_compute_dtypes_cast(tmp_path: Path) -> None:
    source = in_bfloat16(make_base(tmp_path / "b", "llama"))
    base = load_base(source, device="cpu", dtype="bfloat16")
    assert type(base.model.lm_head) is torch.nn.Linear
