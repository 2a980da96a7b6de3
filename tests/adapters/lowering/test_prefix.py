"""Virtual tokens: what lowering keeps of them is what PEFT's own cache holds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters.delta import LoweredAdapter, Prefix
from adapters.errors import InvalidAdapter
from adapters.lowering import lower
from adapters.methods import METHODS
from adapters.operator import AdaptedNorm, OperatorContext
from tests.adapters.lowering.mixed_batch import Server
from tests.oracle import (
    VIRTUAL_KINDS,
    PeftOracle,
    edit_adapter,
    make_adapter,
    random_tokens,
    read_manifest,
    relative_error,
)

Servers = Callable[..., Server]
BOUND = 1e-5
SAVED = ["lm_head", "layers.0.input_layernorm", "layers.1.mlp.up_proj"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt tuning": ("prompt_tuning", {}),
    "prompt tuning and modules_to_save": ("prompt_tuning", {"modules_to_save": SAVED}),
    "multitask": ("multitask_prompt_tuning", {"num_ranks": 3}),
    "P-tuning by MLP": ("p_tuning", {"encoder_hidden_size": 16}),
    "P-tuning by LSTM": (
        "p_tuning",
        {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"},
    ),
    "CPT": ("cpt", {}),
    "prefix tuning": ("prefix_tuning", {}),
    "prefix tuning, projected": (
        "prefix_tuning",
        {"prefix_projection": True, "encoder_hidden_size": 16},
    ),
    "prefix tuning and modules_to_save": (
        "prefix_tuning",
        {"modules_to_save": [*SAVED, "embed_tokens"]},
    ),
    "cartridge": ("cartridge", {"num_frozen_tokens": 2}),
}


def made(served: Server, path: Path, variant: str, **options: Any) -> Path:
    kind, own = VARIANTS[variant]
    return make_adapter(path, served.directory, kind, **{"rank": 11, **own, **options})


def prefix_of(lowered: LoweredAdapter) -> Prefix:
    assert lowered.prefix is not None
    return lowered.prefix


@torch.inference_mode()
def peft_cache(oracle: PeftOracle, prompt: list[int], tokens: int) -> tuple[Any, Any]:
    """What PEFT's cache holds of the virtual tokens: keys and values [layers, n, heads, width]."""
    ids = torch.tensor([prompt])
    cache = oracle.model(input_ids=ids, use_cache=True, **oracle._task).past_key_values
    assert cache.get_seq_length() == tokens + len(prompt)
    keys, values = (
        torch.stack([getattr(layer, part)[0, :, :tokens].transpose(0, 1) for layer in cache.layers])
        for part in ("keys", "values")
    )
    return keys, values


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ["qwen3", "gemma"])
def test_keys_and_values_are_those_of_peft_s_cache(
    architecture: str, variant: str, server: Servers, tmp_path: Path
) -> None:
    served = server(architecture)
    adapter = made(served, tmp_path / "a", variant)
    oracle = PeftOracle(served.directory, adapter)
    found = prefix_of(served.lower(adapter))
    assert found.tokens == 11
    for got, want in zip(
        (found.keys, found.values), peft_cache(oracle, random_tokens(4), 11), strict=True
    ):
        assert got.shape == want.shape
        for layer in range(len(want)):
            assert relative_error(got[layer], want[layer]) < BOUND


def test_a_sliding_window_is_kept_among_virtual_tokens(server: Servers, tmp_path: Path) -> None:
    served = server("mistral", sliding_window=4)
    adapter = made(served, tmp_path / "a", "prompt tuning")
    found = prefix_of(served.lower(adapter))
    # PEFT runs them in one pass with the prompt, so its cache drops what no later token sees.
    prompts = load_file(str(adapter / "adapter_model.safetensors"))["prompt_embeddings"]
    plain = PeftOracle(served.directory).model
    kept: list[torch.Tensor] = []
    last = plain.model.layers[1].self_attn.k_proj
    hook = last.register_forward_hook(lambda *found: kept.append(found[2][0]))
    with torch.inference_mode():
        plain(inputs_embeds=prompts[None], use_cache=False)
    hook.remove()
    assert found.keys.shape[1] == len(kept[0]) == 11
    # A rotation changes no length of a pair of numbers.
    half = kept[0].shape[-1] // 2
    want = kept[0][:, :half].square() + kept[0][:, half:].square()
    got = found.keys[1, :, 0, :half].square() + found.keys[1, :, 0, half:].square()
    assert relative_error(got, want) < BOUND


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_and_cost_are_what_the_registry_says(
    variant: str, server: Servers, tmp_path: Path
) -> None:
    served = server("qwen3")
    adapter = made(served, tmp_path / "a", variant)
    manifest = read_manifest(adapter, served.base.spec)
    lowered = served.lower(adapter)
    assert (manifest.kind, manifest.rank) == (VARIANTS[variant][0], lowered.rank)
    assert manifest.memory_bytes == lowered.nbytes
    if manifest.targets:
        return  # modules_to_save cost more
    spec, row = served.base.spec, METHODS[manifest.kind.upper()]
    sizes = {"m": spec.num_kv_heads * spec.head_dim, "n": spec.num_heads * spec.head_dim}
    layer = eval(row.memory, {}, {**manifest.config, **sizes})
    assert lowered.nbytes == spec.num_layers * layer


def test_lowering_runs_beside_another_run_of_the_same_base(server: Servers, tmp_path: Path) -> None:
    """The engine computes while a worker lowers: neither may see the other's rows."""
    served = server("qwen3")
    norms = {"targets": ["input_layernorm", "norm"]}
    beside = served.lower(make_adapter(tmp_path / "b", served.directory, "ln_tuning", **norms))
    adapter = made(served, tmp_path / "a", "prompt tuning and modules_to_save", rank=40)
    alone, tokens = prefix_of(served.lower(adapter)), random_tokens(30)
    want = served.run([(tokens, beside), (tokens, None)])
    with ThreadPoolExecutor(1) as worker:
        futures = [worker.submit(served.lower, adapter) for _ in range(12)]
        while not all(future.done() for future in futures):
            for got, one in zip(served.run([(tokens, beside), (tokens, None)]), want, strict=True):
                assert torch.equal(got, one)
        for future in futures:
            assert torch.equal(prefix_of(future.result()).keys, alone.keys)


def test_a_prefix_is_never_merged(server: Servers, tmp_path: Path) -> None:
    served = server("qwen3")
    adapter = made(served, tmp_path / "a", "cartridge")
    with pytest.raises(InvalidAdapter, match="placement: a prefix has nothing to merge"):
        served.lower(adapter, placement="merged")


@pytest.mark.parametrize("kind", VIRTUAL_KINDS)
def test_every_tensor_is_consumed(kind: str, server: Servers, tmp_path: Path) -> None:
    served = server("qwen3")
    adapter = make_adapter(tmp_path / "a", served.directory, kind, rank=3)
    weights = adapter / "adapter_model.safetensors"
    manifest = read_manifest(adapter, served.base.spec)
    edit_adapter(adapter, tensors={"prompt_embeddings.more": torch.ones(3)})
    with pytest.raises(InvalidAdapter, match="left over") as caught:
        lower(manifest, weights, served.base)
    assert caught.value.where == "prompt_embeddings.more"


def test_an_own_norm_never_shows_in_the_base_s_module() -> None:
    """Which another thread may be running: what the test above meets only now and then."""
    seen: list[tuple[bool, torch.Tensor]] = []

    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self is inner, self.weight))
            return x * self.weight

    inner, context = Norm(), OperatorContext()
    layer = AdaptedNorm("norm", inner, context)
    context.plans = {"norm": [(1, 2, torch.full((4,), 3.0))]}
    assert layer(torch.ones(1, 3, 4))[0, :, 0].tolist() == [1.0, 3.0, 1.0]
    assert all(weight is inner.weight for ours, weight in seen if ours)
    assert {ours for ours, _ in seen} == {True, False}
    assert list(layer.state_dict()) == ["inner.weight"]
    assert not hasattr(layer._spare[0], "weight")  # no hold on an adapter that was evicted
