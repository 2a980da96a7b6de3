"""Tiny random bases, saved as real checkpoints."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-rope3": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, attention_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=16),
    "gemma": GemmaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, sliding_window=16),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=16),
}


def save_tiny(
    config: Any, directory: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any
) -> Any:
    """Save a random model of this config in a directory; every parameter is made non-trivial."""
    torch.manual_seed(seed)
    config = deepcopy(config)  # saving writes the dtype into it, and others start from the same
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at 0 and norms at 1 otherwise
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model = model.to(dtype)
    model.save_pretrained(directory, **more)
    return model


def save_tokenizer(directory: Path) -> None:
    """A tokenizer of six tokens: "ab" is [4, 5], and 3 ends an answer."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2, "</s>": 3, "a": 4, "b": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(directory)
