"""Embedding and head in the checkpoint's own dtype, the same numbers in half the memory; and the
head in 8 bits, in the fast precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from base.dense import (
    RoundedEmbedding,
    RoundedLinear,
    StoredEmbedding,
    StoredLinear,
    holds,
    is_copy,
)
from base.kernels import PanelWeight, fast_status
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


needs_panels = pytest.mark.skipif(fast_status().startswith("exact"), reason="no C library")


@needs_panels
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma"])
def test_the_fast_head_is_kept_in_8_bits(name: str, tmp_path: Path) -> None:
    """A tied table is the same bytes; another stays as it was. The spec knows no difference."""
    directory = in_bfloat16(make_base(tmp_path / "b", name))
    exact = load_base(directory, device="cpu", dtype="float32", keep=False)
    base = load_base(directory, device="cpu", dtype="float32", keep=False, precision="fast")
    table, head = base.model.get_input_embeddings(), base.model.get_output_embeddings()
    assert type(head) is RoundedLinear
    assert base.spec == exact.spec
    assert type(table) is (RoundedEmbedding if base.spec.tied_embeddings else StoredEmbedding)
    assert (table.weight is head.weight) == base.spec.tied_embeddings
    assert base.linear("lm_head") is head
    own = exact.model.get_output_embeddings().weight.float()
    steps = own.view(len(own), -1, 64).abs().amax(-1) / 254
    wrong = (head.weight.dequantize() - own).abs().view(len(own), -1, 64).amax(-1)
    assert (wrong <= steps * 1.001).all()
    ids = torch.tensor([[3, 7, 500], [511, 0, 3]])
    rows, wanted = table(ids), exact.model.get_input_embeddings()(ids)
    assert rows.shape == wanted.shape
    assert (rows - wanted).norm() <= 0.01 * wanted.norm()
    assert torch.equal(rows[1, 2], rows[0, 0])
    x = torch.randn(2, 3, base.spec.hidden_size)
    right = x @ own.t()
    assert (head(x) - right).norm() <= 0.015 * right.norm()
    assert sum("embed" in name or "head" in name for name, _ in base.model.named_parameters()) == (
        0 if base.spec.tied_embeddings else 1
    )


@needs_panels
def test_a_head_that_does_not_fit_stays(tmp_path: Path) -> None:
    """Rows of 96 are no blocks of 64; neither is the head of a base in another dtype rounded."""
    odd = make_base(tmp_path / "odd", "llama", hidden_size=96, head_dim=48)
    base = load_base(odd, device="cpu", dtype="float32", keep=False, precision="fast")
    assert type(base.model.lm_head) is torch.nn.Linear
    even = make_base(tmp_path / "even", "llama")
    base = load_base(even, device="cpu", dtype="bfloat16", keep=False, precision="fast")
    assert type(base.model.lm_head) is torch.nn.Linear


def test_what_a_weight_in_8_bits_still_knows_of_its_origin() -> None:
    """An upload may bring the base's own table along: known again, and one that differs is not."""
    for seed in (1, 33, 41, 43):  # at the later three a number that is 0 in 8 bits was rounded up
        torch.manual_seed(seed)
        table = torch.randn(70, 128) * torch.rand(70, 1)
        panels = PanelWeight.quantize8(table)
        half = table.bfloat16().float()
        assert holds(panels, table)
        assert is_copy(table, panels)
        assert is_copy(half, panels)
    assert is_copy(half, table)
    for row, column in ((0, 0), (69, 127)):
        other = table.clone()
        other[row, column] += 0.03 * table[row].abs().max()
        assert not holds(panels, other)
        assert not is_copy(other, panels)
        assert not is_copy(other, table)
