"""The trial run refuses what only shows when a model runs."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig

from base.errors import UnservableBase
from base.load import load_base
from base.probe import AttentionShape, probe_attention
from tests.base.tiny import CONFIGS, SIZES, save_tiny

CPU = torch.device("cpu")


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(deepcopy(config), dtype=torch.float32).eval()


def config_of(model_type: str, **more: Any) -> Any:
    return AutoConfig.for_model(model_type, **{**SIZES, **more})


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shape_of_the_attention(name: str) -> None:
    model = model_of(CONFIGS[name])
    before = model.config._attn_implementation
    assert probe_attention(model, CPU) == AttentionShape(2, 4, 2, 32)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma3TextConfig(**SIZES, use_bidirectional_attention=True), "not causal"),
        (config_of("bert"), "not causal"),
        (config_of("granite_swa"), "needs attention sinks"),
        (config_of("minicpm3"), "queries, keys and values of 96, 96 and 16 per head"),
        (config_of("diffllama"), r"are \[0, 0, 1, 1\], expected each of 2 once"),
    ],
    ids=["bidirectional", "bert", "sinks", "latent attention", "two calls a layer"],
)
def test_refused_with_the_reason(config: Any, reason: str) -> None:
    with pytest.raises(UnservableBase, match=reason):
        probe_attention(model_of(config), CPU)


def test_a_model_that_ignores_position_ids_is_refused() -> None:
    model = model_of(CONFIGS["llama"])
    rotary = model.model.rotary_emb
    plain = rotary.forward
    rotary.forward = lambda x, position_ids: plain(x, torch.arange(x.shape[1])[None])
    with pytest.raises(UnservableBase, match="does not follow position ids"):
        probe_attention(model, CPU)


def test_a_model_that_mixes_its_sequences_is_refused() -> None:
    model = model_of(CONFIGS["llama"])
    model.model.layers[0].mlp.forward = _running_mean
    with pytest.raises(UnservableBase, match="its sequences mix"):
        probe_attention(model, CPU)


def test_a_model_that_cannot_be_called_is_refused() -> None:
    model = model_of(CONFIGS["llama"])
    model.model.layers[0].mlp.forward = None
    with pytest.raises(UnservableBase, match="a trial run of LlamaForCausalLM fails: 'NoneType'"):
        probe_attention(model, CPU)


def test_loading_runs_the_trial(tmp_path: Path) -> None:
    save_tiny(Gemma3TextConfig(**SIZES, use_bidirectional_attention=True), tmp_path / "base")
    with pytest.raises(UnservableBase, match="not causal"):
        load_base(tmp_path / "base", cache_dir=tmp_path)


def _running_mean(x: Tensor) -> Tensor:
    """A state that flows from each token to the next, whoever owns them."""
    return x.cumsum(dim=1) / torch.arange(1, x.shape[1] + 1)[:, None]
