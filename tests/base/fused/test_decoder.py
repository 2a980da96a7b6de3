"""Fused decoders against transformers: the same logits, and the same bits by both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from base import kernels
from base.fused import Decoder, fuse
from base.load import Base, load_base
from base.probe import probe_attention
from tests.oracle import make_base, relative_error

SIDEWAYS: dict[str, Any] = {
    "layer_types": ["full_attention", "sliding_attention"],
    "sliding_window": 4,
    "query_pre_attn_scalar": 32,
    "head_dim": 32,
}
KNOWN: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True, "attention_bias": True},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {**SIDEWAYS, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "gemma3_text": SIDEWAYS,
}

pytestmark = pytest.mark.skipif(kernels.steps() is None, reason="the C library is not built")


def load(name: str, home: Path) -> Base:
    tied = name.startswith("gemma") or name == "qwen2"
    source = make_base(home / name, name, tied=tied, **KNOWN.get(name, {}))
    return load_base(source, device="cpu", dtype="float32")


def run(model: Any, decoder: Decoder | None) -> Tensor:
    """Two sequences laid end to end, through an attention of torch's."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    lengths = (9, 6)
    ids = torch.arange(sum(lengths)) * 7919 % 500
    positions = torch.cat([torch.arange(n) for n in lengths])
    owner = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **asked: Any) -> Any:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(2, 3) * asked["scaling"]
        if asked.get("softcap"):
            scores = asked["softcap"] * torch.tanh(scores / asked["softcap"])
        apart = positions[:, None] - positions[None]
        seen = (owner[:, None] == owner) & (apart >= 0)
        if asked.get("sliding_window"):
            seen &= apart < asked["sliding_window"]
        return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["nibble_test"] = attend
    model.set_attn_implementation("nibble_test")
    with torch.inference_mode():
        if decoder is not None:
            return decoder(ids[None], positions[None], torch.tensor([0, 8, 14]))
        return model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=torch.tensor([0, 8, 14]),
        ).logits[0]


@pytest.mark.parametrize("name", KNOWN)
def test_the_logits_are_transformers(name: str, tmp_path: Path) -> None:
    base = load(name, tmp_path)
    theirs = run(base.model, None)
    decoder = fuse(base.model)
    assert decoder is not None
    ours = run(base.model, decoder)
    assert relative_error(ours, theirs) < 2e-6
    assert all(layer.ready() is not None for layer in base.model.model.layers)
    # transformers' own loop over our layers, and layers that call their modules one by one.
    assert relative_error(run(base.model, None), theirs) < 2e-6
    base.model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    decoder.step.version += 1
    assert base.model.model.layers[0].ready() is None
    assert torch.equal(run(base.model, decoder), ours)


def test_hooks_and_wrappers_are_heard(tmp_path: Path) -> None:
    base = load("qwen3", tmp_path)
    decoder = fuse(base.model)
    before = run(base.model, decoder)
    heard: list[str] = []
    attention = base.model.model.layers[1].self_attn
    hook = attention.o_proj.register_forward_hook(lambda *_: heard.append("o"))
    run(base.model, decoder)
    assert heard == ["o"]
    hook.remove()

    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    attention.o_proj = Twice(attention.o_proj)
    assert relative_error(run(base.model, decoder), before) > 1e-2
    attention.o_proj = attention.o_proj.inner
    assert torch.equal(run(base.model, decoder), before)


def test_a_copy_reads_nothing_of_the_original(tmp_path: Path) -> None:
    """As virtual tokens are run: a twin of the model, beside the engine's steps."""
    base = load("qwen3", tmp_path)
    decoder = fuse(base.model)
    before = run(base.model, decoder)
    twin = copy.deepcopy(base.model, {id(p): p for p in base.model.parameters()})
    assert all(layer._record is None for layer in twin.model.layers)
    twin.model.layers[0].input_layernorm = nn.Identity()
    assert relative_error(run(twin, None), before) > 1e-2
    assert torch.equal(run(base.model, decoder), before)


def test_a_fused_model_stands_the_probe(tmp_path: Path) -> None:
    base = load("qwen2", tmp_path)
    fuse(base.model)
    shape = probe_attention(base.model, torch.device("cpu"))
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads) == (2, 2, 1)


def test_a_model_keeps_its_names(tmp_path: Path) -> None:
    base = load("gemma", tmp_path)
    names = {name for name, _ in base.model.named_parameters()}
    modules = {name for name, _ in base.model.named_modules()}
    decoder = fuse(base.model)
    assert decoder is not None
    assert {name for name, _ in base.model.named_parameters()} == names
    assert {name for name, _ in base.model.named_modules()} >= modules - {
        f"model.layers.{i}.mlp.act_fn" for i in range(2)
    }
    assert set(decoder.places) <= modules
    assert len(set(decoder.places.values())) == len(decoder.places) == 2 * 9


def test_what_is_not_known_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load("llama", tmp_path)
    before = [type(m) for m in base.model.modules()]
    monkeypatch.setattr(kernels, "_native", None)
    assert fuse(base.model) is None
    monkeypatch.undo()
    base.model.model.layers[0].mlp.act_fn = nn.ReLU()
    base.model.config.hidden_act = "relu"
    assert fuse(base.model) is None
    base.model.config.hidden_act = "silu"
    base.model.to(torch.bfloat16)
    assert fuse(base.model) is None
    assert len(before) == len(list(base.model.modules()))
