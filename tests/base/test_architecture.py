"""Which architectures are refused from config.json alone, and that no code of theirs ever runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from base.architecture import empty_model, read_config
from base.errors import UnservableBase
from base.load import load_base
from tests.base.tiny import CONFIGS, SIZES, save_tiny, save_tokenizer

LLAMA = {"model_type": "llama", **SIZES}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "names no model_type"),
        ({"model_type": "evil"}, "has no model_type 'evil'$"),
        ({"model_type": "evil", "auto_map": {}}, "own Python code, which is never run"),
        ({"model_type": "llama", "hidden_size": "many"}, "not a valid llama config"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "a BertForMaskedLM"),
        ({"model_type": "gemma3"}, "no plain text decoder"),
        ({"model_type": "mixtral"}, r"mixture of experts \(num_.*experts = 8\)"),
        ({**LLAMA, "model_type": "hunyuan_v1_moe"}, r"layers\.0\.mlp\.experts is a mixture"),
        ({**LLAMA, "num_key_value_heads": 0}, "cannot build a llama of this config"),
        ({"model_type": "mamba"}, "recurrent state"),
        ({"model_type": "bamba", "time_step_limit": [0.0, {"__float__": "Infinity"}]}, "recurrent"),
        (
            {**LLAMA, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
            "layers of type conv",
        ),
        ({"model_type": "bloom"}, "does not go through transformers' attention interface"),
        (
            {**LLAMA, "rope_parameters": {**YARN, "rope_type": "dynamic"}},
            "rope type dynamic changes its frequencies",
        ),
        ({**LLAMA, "rope_parameters": LONGROPE}, "rope type longrope changes its frequencies"),
    ],
)
def test_refused_with_the_reason(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnservableBase, match=reason):
        empty_model(config, torch.float32)


@pytest.mark.parametrize(
    "rope",
    [YARN, {**LONGROPE, "original_max_position_embeddings": SIZES["max_position_embeddings"]}],
    ids=["yarn", "longrope that never switches"],
)
def test_rope_that_does_not_depend_on_the_length_is_served(rope: dict[str, Any]) -> None:
    model = empty_model({**LLAMA, "rope_parameters": rope}, torch.float32)
    assert model.config.rope_parameters["rope_type"] == rope["rope_type"]


def test_the_model_is_empty_but_its_buffers_are_real() -> None:
    model = empty_model(LLAMA, torch.float32)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {b.device.type for b in model.buffers()} == {"cpu"}
    assert model.model.rotary_emb.inv_freq[0] == 1.0


def test_kernels_of_the_checkpoint_s_choice_are_not_taken() -> None:
    """Either key makes transformers fetch a kernel from the hub, and run it."""
    for key in ("_attn_implementation", "attn_implementation"):
        config = read_config({**LLAMA, key: "evil/kernel"})
        assert config._attn_implementation != "evil/kernel"


PLANTED = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig as EvilConfig
from transformers import LlamaForCausalLM as EvilModel
from transformers import PreTrainedTokenizerFast as EvilTokenizer
"""


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_planted_code_never_runs(model_type: str, tmp_path: Path) -> None:
    directory, marker = tmp_path / "base", tmp_path / "marker"
    save_tiny(CONFIGS["llama"], directory)
    save_tokenizer(directory)
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        (directory / f"{name}.py").write_text(PLANTED.format(marker=str(marker)))
    plant(
        directory / "config.json",
        model_type=model_type,
        auto_map={
            "AutoConfig": "configuration_x.EvilConfig",
            "AutoModelForCausalLM": "modeling_x.EvilModel",
        },
    )
    plant(
        directory / "tokenizer_config.json",
        auto_map={
            "AutoTokenizer": ["tokenization_x.EvilTokenizer", "tokenization_x.EvilTokenizer"]
        },
    )
    if model_type == "llama":
        base = load_base(directory, cache_dir=tmp_path)
        assert type(base.model).__module__ == "transformers.models.llama.modeling_llama"
        assert base.tokenizer.encode("ab") == [4, 5]
    else:
        with pytest.raises(UnservableBase, match="never run"):
            load_base(directory, cache_dir=tmp_path)
    assert not marker.exists()


def plant(file: Path, **more: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
