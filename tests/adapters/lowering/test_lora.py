"""Each variant of a LoRA file, through validation, lowering and a whole model, against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters.delta import LinearDelta, PrivateEmbedding, PrivateLinear, PrivateNorm
from adapters.errors import InvalidAdapter
from adapters.lowering import lower
from adapters.manifest import AdapterManifest
from tests.adapters.lowering.mixed_batch import Server
from tests.oracle import (
    ALL_LINEARS,
    ATTENTION,
    PeftOracle,
    edit_adapter,
    make_adapter,
    random_tokens,
    read_manifest,
    relative_error,
)

Servers = Callable[..., Server]
WEIGHTS = "adapter_model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj"

# name -> (architecture, make_adapter's options). qwen3 and qwen2 have biases; gemma scales its
# embeddings and adds one to its norms; qwen2 and gemma tie the head to the table.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "alpha other than rank": ("llama", {"rank": 8, "alpha": 5}),
    "rank of one": ("mistral", {"rank": 1}),
    "rsLoRA": ("qwen2", {"kind": "rslora", "rank": 6}),
    "rsLoRA and DoRA": ("qwen3", {"kind": "dora", "use_rslora": True}),
    "DoRA over biases": ("qwen2", {"kind": "dora"}),
    "rank_pattern": ("llama", {"rank_pattern": {"q_proj": 9, "layers.1.mlp.up_proj": 2}}),
    "rank_pattern as regex": ("llama", {"rank_pattern": {r"layers\.\d+\.mlp\..*": 6}}),
    "alpha_pattern": ("llama", {"alpha_pattern": {"layers.0.mlp.down_proj": 40, "k_proj": 1}}),
    "both patterns with rsLoRA": (
        "qwen3",
        {"kind": "rslora", "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 7}},
    ),
    "lora_bias where the base has biases": ("qwen2", {"lora_bias": True, "targets": ATTENTION}),
    "lora_bias where it has none": ("llama", {"lora_bias": True}),
    "bias lora_only": ("qwen3", {"bias": "lora_only", "targets": ["q_proj", "up_proj"]}),
    "bias all": ("qwen3", {"bias": "all", "targets": ["q_proj", "up_proj"]}),
    "bias all with lora_bias": ("qwen3", {"bias": "all", "lora_bias": True}),
    "bias all with DoRA": ("qwen3", {"bias": "all", "kind": "dora"}),
    "layers_to_transform": ("llama", {"layers_to_transform": [1]}),
    "exclude_modules": ("llama", {"exclude_modules": ["down_proj", "layers.0.mlp.up_proj"]}),
    "all-linear": ("mistral", {"targets": "all-linear"}),
    "targets as regex": ("llama", {"targets": r".*layers\.0\..*(q|v)_proj"}),
    "embeddings": ("llama", {"targets": ["embed_tokens", "q_proj"]}),
    "embeddings of a scaled, tied table": ("gemma", {"targets": ["embed_tokens", "q_proj"]}),
    "DoRA on embeddings": ("llama", {"kind": "dora", "targets": ["embed_tokens", "v_proj"]}),
    "DoRA on scaled, tied embeddings": ("gemma", {"kind": "dora", "targets": ["embed_tokens"]}),
    "embeddings alone": ("qwen2", {"targets": ["embed_tokens"]}),
    "lm_head, untied": ("qwen3", {"targets": ["lm_head", "o_proj"]}),
    "lm_head, tied": ("qwen2", {"targets": ["lm_head", "o_proj"]}),
    "DoRA on lm_head, untied": ("llama", {"kind": "dora", "targets": ["lm_head"]}),
    "DoRA on lm_head, tied": ("gemma", {"kind": "dora", "targets": ["lm_head"]}),
    "head and table, tied": ("qwen2", {"targets": ["lm_head", "embed_tokens", "k_proj"]}),
    "modules_to_save: lm_head": ("llama", {"modules_to_save": ["lm_head"]}),
    "modules_to_save: lm_head, tied": ("qwen2", {"modules_to_save": ["lm_head"]}),
    "modules_to_save: embed_tokens": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "modules_to_save: embed_tokens, tied": ("gemma", {"modules_to_save": ["embed_tokens"]}),
    "modules_to_save: head and table": ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "modules_to_save: norms": (
        "qwen3",
        {"modules_to_save": ["input_layernorm", "k_norm", "model.norm"]},
    ),
    "modules_to_save: norms that add one": ("gemma", {"modules_to_save": ["norm"]}),
    "head and table with one adapter": (
        "qwen2",
        {"targets": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "modules_to_save: one matrix for head and table": (
        "gemma",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "DoRA beside saved norms": ("llama", {"kind": "dora", "modules_to_save": ["norm"]}),
    "nothing trained": ("qwen3", {"zero": True}),
}


def matches_peft(server: Server, adapter: Path) -> float:
    """The relative error of the logits, beside a row of the base alone in the same batch."""
    tokens = random_tokens(24, seed=1)
    lowered = server.lower(adapter)
    base_tokens = random_tokens(5, seed=2)
    got, beside = server.run([(tokens, lowered), (base_tokens, None)])
    alone = PeftOracle(server.directory).logits(base_tokens)
    assert relative_error(beside, alone) < 1e-5
    return relative_error(got, PeftOracle(server.directory, adapter).logits(tokens))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_equals_peft(name: str, server: Servers, tmp_path: Path) -> None:
    architecture, options = VARIANTS[name]
    served = server(architecture)
    adapter = make_adapter(tmp_path / "adapter", served.directory, **options)
    assert matches_peft(served, adapter) < 1e-5


def test_the_variants_do_change_something(server: Servers, tmp_path: Path) -> None:
    """Guards the oracle itself: an adapter that both sides ignore would pass above."""
    tokens = random_tokens(24, seed=1)
    for name in ("bias all", "modules_to_save: norms", "DoRA on lm_head, tied", "embeddings alone"):
        architecture, options = VARIANTS[name]
        directory = server(architecture).directory
        adapter = make_adapter(tmp_path / name.replace(" ", "-"), directory, **options)
        changed = PeftOracle(directory, adapter).logits(tokens)
        assert relative_error(changed, PeftOracle(directory).logits(tokens)) > 1e-2


def test_a_fresh_lora_leaves_every_bit_of_the_base(server: Servers, tmp_path: Path) -> None:
    served = server("qwen3")
    fresh = served.lower(make_adapter(tmp_path / "a", served.directory, zero=True))
    tokens = random_tokens(16)
    assert torch.equal(served.run([(tokens, fresh)])[0], served.run([(tokens, None)])[0])


def test_a_fresh_dora_is_the_base(server: Servers, tmp_path: Path) -> None:
    """Its magnitudes are the norms of the weights that it was made over: here the NF4 ones."""
    served = server("qwen3")
    adapter = make_adapter(tmp_path / "a", served.directory, "dora", zero=True)
    norms = {
        f"base_model.model.{path}.lora_magnitude_vector": weight.dequantize().norm(dim=1)
        for path, shape in served.base.spec.linears.items()
        if shape.quantized and (weight := served.base.linear(path).weight)
    }
    edit_adapter(adapter, tensors=norms)
    tokens = random_tokens(16)
    got = served.run([(tokens, served.lower(adapter))])[0]
    assert relative_error(got, served.run([(tokens, None)])[0]) < 2e-6


def test_magnitudes_with_and_without_weight_in_their_name(server: Servers, tmp_path: Path) -> None:
    served = server("llama")
    adapter = make_adapter(tmp_path / "a", served.directory, "dora", targets=["q_proj"])
    plain = served.lower(adapter).deltas[Q0]
    names = [f"base_model.model.{Q0.replace('.0.', f'.{i}.')}" for i in (0, 1)]
    tensors = load_file(str(adapter / WEIGHTS))
    renamed: dict[str, torch.Tensor | None] = {}
    for name in names:
        old = f"{name}.lora_magnitude_vector"
        renamed |= {old: None, f"{old}.weight": tensors[old]}
    edit_adapter(adapter, tensors=renamed)
    other = served.lower(adapter).deltas[Q0]
    assert isinstance(plain, LinearDelta)
    assert isinstance(other, LinearDelta)
    assert plain.g is not None
    assert other.g is not None
    assert torch.equal(plain.g, other.g)


def test_the_scale_is_folded_in_float32_before_the_cast(server: Servers, tmp_path: Path) -> None:
    served = server("llama")
    adapter = make_adapter(tmp_path / "a", served.directory, rank=3, alpha=7, targets=["q_proj"])
    B = load_file(str(adapter / WEIGHTS))[f"base_model.model.{Q0}.lora_B.weight"]
    delta = served.lower(adapter).deltas[Q0]
    assert isinstance(delta, LinearDelta)
    assert torch.equal(delta.low_rank[0].B, B * (7 / 3))


def test_where_saved_modules_go(server: Servers, tmp_path: Path) -> None:
    served = server("llama")
    saved = ["lm_head", "embed_tokens", "norm", "layers.0.mlp.up_proj"]
    adapter = make_adapter(
        tmp_path / "a", served.directory, targets=["q_proj"], modules_to_save=saved
    )
    deltas = served.lower(adapter).deltas
    assert isinstance(deltas["lm_head"], PrivateLinear)
    assert isinstance(deltas["model.embed_tokens"], PrivateEmbedding)
    assert isinstance(deltas["model.norm"], PrivateNorm)
    assert isinstance(deltas["model.layers.0.mlp.up_proj"], PrivateLinear)


def test_lowered_tensors_own_their_memory(server: Servers, tmp_path: Path) -> None:
    """No view of the file's memory map, no second copy: a slot costs what nbytes says."""
    served = server("llama")
    adapter = make_adapter(tmp_path / "a", served.directory, rank=4, targets=ALL_LINEARS)
    lowered = served.lower(adapter)
    manifest = read_manifest(adapter, served.base.spec)
    assert lowered.nbytes == manifest.memory_bytes
    before = [tensor.clone() for tensor in lowered.tensors()]
    (adapter / WEIGHTS).write_bytes(b"\0" * (adapter / WEIGHTS).stat().st_size)
    assert all(torch.equal(*pair) for pair in zip(lowered.tensors(), before, strict=True))


# --- refused: the manifest is of the good file, the tensors have changed behind it


def refusal(served: Server, adapter: Path, manifest: AdapterManifest | None = None) -> str:
    manifest = manifest or read_manifest(adapter, served.base.spec)
    with pytest.raises(InvalidAdapter) as caught:
        lower(manifest, adapter / WEIGHTS, served.base)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        f"base_model.model.{Q0}.lora_C.weight",
        f"base_model.model.{Q0}.lora_B.bias",
        f"base_model.model.{Q0}.lora_magnitude_vector",
        f"base_model.model.{Q0}.base_layer.weight",
        f"base_model.model.{Q0}.base_layer.bias",
        "base_model.model.lm_head.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_a_left_over_tensor_is_refused_by_name(name: str, server: Servers, tmp_path: Path) -> None:
    served = server("qwen3")
    adapter = make_adapter(tmp_path / "a", served.directory, targets=["q_proj"])
    manifest = read_manifest(adapter, served.base.spec)
    edit_adapter(adapter, tensors={name: torch.zeros(64)})
    message = refusal(served, adapter, manifest)
    assert message.startswith(name)
    assert "left over" in message


@pytest.mark.parametrize(
    ("leaf", "tensor", "says"),
    [
        ("lora_A.weight", None, "missing"),
        ("lora_B.weight", None, "missing"),
        ("lora_magnitude_vector", None, "missing"),
        ("lora_A.weight", torch.zeros(5, 64), "expected [4, 64]"),
        ("lora_B.weight", torch.zeros(64, 5), "expected [64, 4]"),
        ("lora_magnitude_vector", torch.zeros(1, 64), "expected [64]"),
    ],
)
def test_a_missing_or_misshapen_tensor_is_refused_by_name(
    leaf: str, tensor: torch.Tensor | None, says: str, server: Servers, tmp_path: Path
) -> None:
    served = server("qwen3")
    adapter = make_adapter(tmp_path / "a", served.directory, "dora", targets=["q_proj"])
    manifest = read_manifest(adapter, served.base.spec)
    name = f"base_model.model.{Q0}.{leaf}"
    edit_adapter(adapter, tensors={name: tensor})
    message = refusal(served, adapter, manifest)
    assert message.startswith(name)
    assert says in message


def test_a_table_that_is_not_the_base_own_is_refused(server: Servers, tmp_path: Path) -> None:
    served = server("llama")
    adapter = make_adapter(tmp_path / "a", served.directory, targets=["embed_tokens"])
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    table = served.base.embedding("model.embed_tokens").weight.detach()
    edit_adapter(adapter, tensors={name: table.bfloat16()})
    served.lower(adapter)  # rounded, but the same
    edit_adapter(adapter, tensors={name: table + 0.01})
    assert "differs from the base's own" in refusal(served, adapter)


def test_dora_with_lora_bias_is_refused_as_peft_does(server: Servers, tmp_path: Path) -> None:
    served = server("llama")
    adapter = make_adapter(tmp_path / "a", served.directory, lora_bias=True)
    edit_adapter(adapter, config={"use_dora": True})
    with pytest.raises(InvalidAdapter, match="lora_bias: cannot be combined with use_dora"):
        served.lower(adapter)
